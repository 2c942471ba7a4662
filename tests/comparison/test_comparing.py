"""A whole comparison on a tiny model: complete, continued after a kill, extended without training anything twice."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from tests.conftest import write_tiny_recipe
from tests.warm_python import WarmPython

from loraplex.cli.main import main
from loraplex.comparison.compare import _Sweep, compare
from loraplex.comparison.comparison_recipe import read_comparison
from loraplex.comparison.grouped import joined
from loraplex.comparison.identity import Identifier
from loraplex.comparison.jobs import Kind, make_job
from loraplex.comparison.results import Comparison, Item, Run, read_results
from loraplex.comparison.workers import Workers
from loraplex.errors import UserError
from loraplex.training.folder import RunFolder
from loraplex.training.reading import read_recipe

ARMS = """arms:
  lora: lora
  dora: dora
  peft: {peft: {peft_type: LORA, r: 4, lora_alpha: 16}}
"""


def write(
    folder: Path, model: Path, arms: str = ARMS, extra: str = "seeds: [0, 1]\nmatch: lora r=4\n", tested: bool = True
) -> Path:
    """Write a comparison over the rows of the tiny recipe; without test rows nothing is measured, which is quicker."""
    shared = write_tiny_recipe(folder, model).read_text().replace("max_steps: 6", "max_steps: 4")
    if not tested:
        shared = re.sub(r", test: [^}]*}", "}", shared)
    path = folder / "comparison.yaml"
    path.write_text(f"# A tiny comparison.\n\n{shared}{extra}{arms}".replace(str(folder / "run"), str(folder / "out")))
    return path


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    path = write(tmp_path_factory.mktemp("comparison"), tiny_model)
    return path, compare(read_comparison(path))


def outcome(comparison: Comparison) -> list[tuple[object, ...]]:
    """Return everything of a comparison that does not depend on the clock."""
    return [
        (arm.name, arm.learning_rate, arm.trainable, run.seed, run.state, run.accuracy, run.loss, run.items, run.flops)
        for arm in comparison.arms
        for run in arm.runs
    ]


@pytest.mark.slow
def test_every_arm_and_seed_is_there(finished: tuple[Path, Comparison]) -> None:
    _, found = finished
    assert [arm.name for arm in found.arms] == ["lora", "dora", "peft"]
    assert all(arm.within_budget and [run.state for run in arm.runs] == ["finished"] * 2 for arm in found.arms)
    assert found.arm("peft").trainable == found.arm("lora").trainable == found.budget_parameters
    assert 0.98 * found.budget_parameters <= found.arm("dora").trainable <= found.budget_parameters
    assert found.base is not None
    assert len(found.base.items) == 24
    ids = {tuple(item.id for item in run.items) for arm in found.arms for run in arm.runs}
    assert ids == {tuple(item.id for item in found.base.items)}
    assert all(run.flops > 0 and run.file_bytes > 4 * run.trainable for arm in found.arms for run in arm.runs)
    assert found.description == "A tiny comparison."


@pytest.mark.slow
def test_it_is_written_down(finished: tuple[Path, Comparison]) -> None:
    path, found = finished
    folder = path.parent / "out"
    assert read_results(folder) == found
    assert len((folder / "runs.csv").read_text().splitlines()) == 1 + 3 * 2
    assert len((folder / "items.csv").read_text().splitlines()) == 1 + 24 + 3 * 2 * 24
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "plans/dora.json").read_text())["ranks"]


@pytest.mark.slow
def test_the_printed_command_repeats_a_run(finished: tuple[Path, Comparison], tmp_path: Path) -> None:
    _, found = finished
    run = found.arm("dora").runs[1]
    words = run.command.split()
    assert words[:2] == ["loraplex", "train"]
    assert main([*words[1:-1], str(tmp_path / "again"), "--quiet"]) == 0
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert [(entry["step"], entry["loss"]) for entry in again["loss"]] == run.loss
    assert again["accuracy"]["after"]["value"] == run.accuracy


@pytest.mark.slow
def test_added_arms_and_seeds_reuse_what_is_there(finished: tuple[Path, Comparison], tiny_model: Path) -> None:
    path, before = finished
    stamps = {file: file.stat().st_mtime_ns for file in path.parent.glob("out/runs/*/metrics.json")}
    text = path.read_text().replace("  dora: dora\n", "  low: {adapter: {r: 1}}\n").replace("[0, 1]", "[0, 2]")
    larger = path.with_name("larger.yaml")
    larger.write_text(text)
    said: list[tuple[str, str]] = []
    found = compare(read_comparison(larger), say=lambda topic, words: said.append((topic, words)))
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert [arm.name for arm in found.arms] == ["lora", "low", "peft"]
    assert not found.arm("low").within_budget
    assert [run.seed for run in found.arm("lora").runs] == [0, 2]
    kept = [entry for entry in outcome(before) if entry[0] != "dora" and entry[3] == 0]
    assert len(kept) == 2
    assert all(entry in outcome(found) for entry in kept)
    # The base model and the runs of seed 0 that both have.
    assert ("reused", "3 of 7: base, lora-s0, peft-s0") in said


@pytest.mark.slow
def test_what_was_made_from_other_data_is_made_again_and_the_reason_is_said(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model, "arms:\n  lora: lora\n  low: {adapter: {r: 1}}\n", "seeds: [0]\n", tested=False)
    said: list[tuple[str, str]] = []

    def losses() -> list[object]:
        said.clear()
        found = compare(read_comparison(path), say=lambda topic, words: said.append((topic, words)))
        assert [arm.runs[0].state for arm in found.arms] == ["finished"] * 2
        return [arm.runs[0].loss for arm in found.arms]

    before = losses()
    assert not {"reused", "again"} & {topic for topic, _ in said}
    rows = tmp_path / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("hill", "mill").replace('"answer": 0', '"answer": 1'))
    assert all(now != old for now, old in zip(losses(), before, strict=True))
    assert ("again", f"lora-s0, low-s0: the data of {rows} have changed") in said
    # with the old content the old results are there again, and nothing is trained
    rows.write_text(text)
    assert losses() == before
    assert ("reused", "2 of 2: lora-s0, low-s0") in said
    assert "again" not in {topic for topic, _ in said}


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_table(
    finished: tuple[Path, Comparison], tiny_model: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    path = write(tmp_path, tiny_model)
    path.write_text(path.read_text().replace("[0, 1]", "[0]"))
    process = warm_python.start("-m", "loraplex", "compare", str(path), "--quiet")
    deadline = time.monotonic() + 300
    # In the middle: one run is finished, the next one has begun.
    while not any((tmp_path / "out/runs").glob("*-s0-*/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _workers(str(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/results.json").exists()
    # Its worker ends with it, so nothing writes into the folder any more.
    while _workers(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _workers(str(tmp_path))
    assert main(["compare", str(path), "--quiet"]) == 0
    mine = str(outcome(read_results(tmp_path / "out"))).replace(str(tmp_path), "")
    uninterrupted = [entry for entry in outcome(finished[1]) if entry[3] == 0]
    assert mine == str(uninterrupted).replace(str(finished[0].parent), "")


@pytest.mark.slow
def test_ctrl_c_lets_the_running_job_save_its_state(tiny_model: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    path = write(tmp_path, tiny_model, "arms:\n  lora: lora\n", "seeds: [0]\n", tested=False)
    path.write_text(path.read_text().replace("max_steps: 4", "max_steps: 5000"))
    # a process group of its own, as a terminal gives every command
    code = (
        "import os, sys\nfrom loraplex.cli.main import main\nos.setsid()\n"
        f"sys.exit(main(['compare', {str(path)!r}, '--quiet']))"
    )
    process = warm_python.start("-c", code)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/runs/*/checkpoints/checkpoint-3/loraplex_files.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.process.pid, signal.SIGINT)
    _, error = process.communicate(300)
    assert process.returncode == 130
    assert error.splitlines()[-1] == ("interrupted: what has finished is kept, the same command goes on from there")
    assert not _workers(str(tmp_path))
    (run,) = tmp_path.glob("out/runs/*")
    newest = max(run.glob("checkpoints/checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    assert RunFolder(run).last_checkpoint() == newest
    assert not RunFolder(run).metrics.exists()
    assert "Traceback" not in (tmp_path / "out/logs/lora-s0.log").read_text()


def _workers(folder: str) -> set[int]:
    """Return the processes that work on a comparison in `folder`: their log is a file there."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/2"):
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith(f"{folder}/out/logs/"):
                found.add(int(entry.parts[2]))
    return found


@pytest.mark.slow
def test_a_failing_arm_ends_none_of_the_others(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "arms:\n  diverges: {adapter: lora, training: {learning_rate: 1e30, max_grad_norm: 0}}\n  lora: lora\n"
    path = write(tmp_path, tiny_model, arms, "seeds: [3]\nreference: lora\n", tested=False)
    assert main(["compare", str(path), "--quiet"]) == 1
    shown = capsys.readouterr()
    failure = r"1 runs failed: diverges seed 3 \(the loss is (nan|inf) .*\); the same command tries them again"
    assert re.search(failure, shown.err)
    found = read_results(tmp_path / "out")
    assert [arm.runs[0].state for arm in found.arms] == ["failed", "finished"]
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.slow
def test_learning_rates_are_chosen_on_validation_rows_alone(tiny_model: Path, tmp_path: Path) -> None:
    arms = "arms:\n  lora: lora\n  given: {adapter: dora, learning_rates: []}\n"
    path = write(tmp_path, tiny_model, arms, "seeds: [0]\nlearning_rates: [1e-6, 1e-2]\n")
    found = compare(read_comparison(path, ["--training.validation_rows", "8"]))
    trials = found.arm("lora").trials
    assert [trial.learning_rate for trial in trials] == [1e-6, 1e-2]
    best = max(trials, key=lambda trial: (trial.accuracy, -trial.learning_rate))
    assert found.arm("lora").learning_rate == best.learning_rate
    assert (found.arm("given").trials, found.arm("given").learning_rate) == ([], 1e-2)
    (measured,) = {
        len((folder / "evaluation/after.jsonl").read_text().splitlines())
        for folder in tmp_path.glob("out/runs/lora-lr*")
    }
    assert measured == 8
    assert len(found.arm("lora").runs[0].items) == 24


@pytest.mark.slow
def test_equal_compute_gives_the_cheaper_arm_more_steps(tiny_model: Path, tmp_path: Path) -> None:
    arms = "arms:\n  small: {adapter: {r: 1}}\n  large: {adapter: {r: 16}}\n"
    found = compare(read_comparison(write(tmp_path, tiny_model, arms, "seeds: [0]\nmatch: compute\n", tested=False)))
    small, large = found.arm("small").runs[0], found.arm("large").runs[0]
    assert large.steps == 4
    assert small.steps > 4
    # to within half a step
    assert abs(small.flops / large.flops - 1) < 0.5 / 4


@pytest.mark.slow
def test_one_arm_alone_gets_the_compute_of_another(tiny_model: Path, tmp_path: Path) -> None:
    """Two of three steps go through the model twice: the plain arm has 5/3 of the steps, the third arm its own."""
    echo = "{name: echo, targets: [0], sources: [2], probability: 0.6667, second_pass: full}"
    arms = f"arms:\n  lora: lora\n  equal: {{compute_of: echo}}\n  echo: {{adapter: {{objective: {echo}}}}}\n"
    found = compare(read_comparison(write(tmp_path, tiny_model, arms, "seeds: [0]\n", tested=False)))
    assert [found.arm(name).runs[0].state for name in ("lora", "equal", "echo")] == ["finished"] * 3
    assert [found.arm(name).runs[0].steps for name in ("lora", "equal", "echo")] == [4, 7, 4]


@pytest.mark.slow
def test_one_adapter_per_group_answers_the_items_of_its_group(tiny_model: Path, tmp_path: Path) -> None:
    arms = "arms:\n  groups: {adapter: lora, one_per_group: 2}\n"
    found = compare(read_comparison(write(tmp_path, tiny_model, arms, "seeds: [0]\nmatch: lora r=4\n")))
    run = found.arm("groups").runs[0]
    assert found.base is not None
    assert [item.id for item in run.items] == [item.id for item in found.base.items]
    assert run.accuracy == sum(item.correct for item in run.items) / 24
    assert (run.steps, run.trainable) == (4, found.budget_parameters)
    folders = list(tmp_path.glob("out/runs/groups-s0-group*"))
    answered = [
        [json.loads(line)["source"] for line in (folder / "evaluation/after.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert len(answered) == 2
    assert sorted(answered[0] + answered[1]) == sorted(item.id for item in run.items)
    assert "one for each of 2 groups" in found.arm("groups").summary


def test_the_runs_of_groups_are_joined_in_the_order_of_the_items() -> None:
    def run(steps: int, seconds: float, losses: tuple[float, float], items: list[Item]) -> Run:
        return Run(
            0, "finished", f"train {steps}", training_seconds=seconds, steps=steps, tokens_per_second=10.0 * steps,
            loss=[(1, losses[0]), (steps, losses[1])], trainable=5, file_bytes=20, peak_bytes=steps, flops=1e9,
            items=items,
        )  # fmt: skip

    one = run(3, 1.0, (2.0, 1.0), [Item("b", "y", True), Item("c", "x", False)])
    other = run(2, 3.0, (4.0, 3.0), [Item("a", "x", True)])
    both = joined([one, other], ["a", "b", "c"])
    assert [item.id for item in both.items] == ["a", "b", "c"]
    assert (both.accuracy, both.tasks) == (2 / 3, {"x": 0.5, "y": 1.0})
    # after a third of the steps, and at the end; three of five steps are the first one's
    assert both.loss == [(2, pytest.approx(2.8)), (5, pytest.approx(1.8))]
    assert (both.steps, both.trainable, both.peak_bytes, both.flops) == (5, 10, 3, 2e9)
    assert both.tokens_per_second == (30 * 1 + 20 * 3) / 4
    assert both.command == "train 3 && train 2"
    failed = joined([one, Run(0, "failed", "train", error="it broke")], ["a", "b", "c"])
    assert (failed.state, failed.error, failed.accuracy) == ("failed", "it broke", None)


@pytest.mark.parametrize(
    ("arms", "extra", "message"),
    [
        ("arms:\n  a: {one_per_group: 2}\n  b: {compute_of: a}\n", "", "arms.a.one_per_group goes with"),
        ("arms:\n  a: {one_per_group: 2}\n  b: lora\n", "match: compute\n", "leave equal compute out"),
        ("arms:\n  a: {one_per_group: 1}\n", "", "one_per_group is 1"),
        ("arms:\n  a: {compute_of: c}\n  b: lora\n", "", "arms.a.compute_of is 'c': name an arm whose steps are given"),
        ("arms:\n  a: {compute_of: a}\n  b: lora\n", "", "name an arm whose steps are given, such as b"),
        ("arms:\n  a: {compute_of: b}\n  b: lora\n", "match: compute\n", "beside match: compute"),
    ],
)
def test_compute_of_what_has_no_steps_of_its_own_is_refused(
    arms: str, extra: str, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_comparison(write(tmp_path, tiny_model, arms, extra))


@pytest.mark.slow
def test_without_test_rows_it_trains_and_reports(tiny_model: Path, tmp_path: Path) -> None:
    arms = "arms:\n  lora: lora\n  peft: {peft: {peft_type: LORA}}\n"
    found = compare(read_comparison(write(tmp_path, tiny_model, arms, "seeds: [0]\n", tested=False)))
    assert found.base is None
    assert [arm.runs[0].state for arm in found.arms] == ["finished"] * 2
    assert found.arms[0].runs[0].accuracy is None
    assert (tmp_path / "out/report.html").is_file()


def test_recipes_are_written_for_finished_jobs_too(tmp_path: Path, tiny_recipe: Path) -> None:
    """Another recipe may have left its file under the same name: the printed command has to repeat this run."""
    recipe = read_recipe(tiny_recipe)
    (tmp_path / "out").mkdir()
    job = make_job(Kind.TRAIN, "lora-s0", recipe, tmp_path / "out", Identifier())
    job.folder.mkdir(parents=True)
    job.result.write_text("{}")
    job.file.parent.mkdir()
    job.file.write_text("another recipe")
    sweep = _Sweep(
        read_comparison(write(tmp_path, Path(recipe.model.name))), lambda topic, text: None, False, Workers()
    )
    sweep.carry_out([job], "runs")
    assert read_recipe(job.file).training == recipe.training


def test_results_of_another_version_are_told_from_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"results\.json was written by another version of loraplex"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        read_results(tmp_path)


def test_two_comparisons_do_not_share_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    recipe = read_comparison(write(tmp_path, tiny_model))
    recipe.output.mkdir()
    with FileLock(recipe.output / ".lock"), pytest.raises(UserError, match="another comparison is writing to"):
        compare(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("arms:\n", "amrs:\n"), "unknown key 'amrs'. Did you mean 'arms'?"),
        (("dora: dora", "do/ra: dora"), "arms.do/ra: an arm's name is made of letters"),
        (("dora: dora", "dora: dorra"), "Did you mean 'dora'?"),
        (("dora: dora", "dora: {adaptor: dora}"), "arms.dora: unknown key 'adaptor'. Did you mean 'adapter'?"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "give at least one, and each of them once"),
        (("seeds: [0, 1]", "seeds: [a]"), "expected a valid integer"),
        (("seeds: [0, 1]", "reference: drao"), "reference is 'drao', which is not an arm. Did you mean 'dora'?"),
        (("seeds: [0, 1]", "budget: 1M"), "give one of them"),
        (("seeds: [0, 1]", "learning_rates: [1e-3]"), "set training.validation_rows above 0"),
        (("seeds: [0, 1]", "seed: 3"), "a comparison has seeds, not a seed"),
        (("match: lora r=4", "match: lora r=four"), "rank"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    change: tuple[str, str], message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tiny_model)
    path.write_text(path.read_text().replace(*change))
    assert main(["compare", str(path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out/runs/*"))
