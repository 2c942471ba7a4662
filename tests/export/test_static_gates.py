"""A routed adapter leaves loraplex only with its gates fixed, on request, and what that costs is measured."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import WORDS

from loraplex import UserError
from loraplex.cli.main import main
from loraplex.data import DataOptions
from loraplex.export.exporting import ExportRequest, export, export_per_task
from loraplex.export.static_gates import StaticGates
from loraplex.export.targets import TARGETS
from loraplex.models.loading import load_tokenizer
from loraplex.tuner.adapted_model import load_adapted

pytestmark = pytest.mark.usefixtures("stock_in_process")
HYDRA = {"adapter": {"name": "hydra", "heads": 3}}


def rows(path: Path, count: int = 6, tasks: tuple[str, ...] = (), shift: int = 0, **more) -> str:
    """Write `count` rows of two options, their tasks in turn."""
    words = WORDS.split()
    lines = []
    for index in range(count):
        row = {"question": f"{words[(index * 5 + shift) % 16]} {words[(index + shift) % 16]}?", "answer": index % 2}
        row["choices"] = ["cat", "dog sat on the mat"]
        if tasks:
            row["task"] = tasks[index % len(tasks)]
        lines.append(json.dumps(row | more) + "\n")
    path.write_text("".join(lines))
    return str(path)


def static(source: str, task: str | None = None) -> StaticGates:
    return StaticGates(DataOptions(test=source), task)


@pytest.mark.parametrize("target", list(TARGETS))
def test_without_the_flag_it_is_refused_with_what_can_be_done(make, target) -> None:
    with pytest.raises(UserError, match=r"'hydra' .*serve it with loraplex itself, or .*--static-gates ROWS"):
        export(ExportRequest(str(make(**HYDRA)), target, Path("nowhere")))
    assert not Path("nowhere").exists()


def test_what_is_written_is_the_fixed_model_and_its_distance_is_reported(make, tmp_path: Path) -> None:
    adapter = make(**HYDRA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    calibration, held_out = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl", shift=3)
    done = export(
        ExportRequest(
            str(adapter), "peft", tmp_path / "out", data=DataOptions(test=held_out), static=static(calibration)
        )
    )
    # stock PEFT computes what the fixed model computes, to rounding
    (found,) = done.agreements
    assert found.max_difference <= 1e-5 * found.largest_logit
    # and that is not what the routed one computes
    given_up = done.approximation
    assert given_up.agreement.max_difference > 1e-3
    assert given_up.agreement.kl > 0
    assert given_up.rows == 6
    routed, fixed = given_up.accuracy
    assert routed.items == fixed.items == 6
    card = (done.folder / "README.md").read_text()
    assert "gates at their means over 6 rows" in card
    assert "against the routed adapter" in card
    assert "This is not the adapter as it was trained" in card
    assert "compared with what that left" in card
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert set(config["rank_pattern"].values()) == {2}


def test_rows_without_options_leave_the_accuracy_to_the_others(make, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "the dog", "completion": " sat"}\n')
    data = DataOptions(test=(rows(tmp_path / "b.jsonl", shift=3), str(plain)))
    order = ExportRequest(
        str(make(**HYDRA)), "peft", tmp_path / "out", data=data, static=static(rows(tmp_path / "a.jsonl"))
    )
    given_up = export(order).approximation
    assert (given_up.agreement.rows, given_up.accuracy[0].items) == (7, 6)


def test_the_pair_is_a_and_the_mean_of_the_heads(make, tiny_model: Path, tmp_path: Path) -> None:
    """Formed here from the file of the routed adapter and from gates that hooks see."""
    adapter, calibration = make(**HYDRA), rows(tmp_path / "a.jsonl")
    export(ExportRequest(str(adapter), "peft", tmp_path / "out", static=static(calibration)))
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model, site = load_adapted(str(adapter)), "model.layers.1.mlp.up_proj"
    layer = model.get_base_model().get_submodule(site)
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    tokenizer = load_tokenizer(str(tiny_model))
    with torch.no_grad():
        for line in Path(calibration).read_text().splitlines():
            row = json.loads(line)
            from loraplex.data import read_examples, tokenize

            examples = [
                e for e in read_examples(DataOptions(test=calibration), "test") if row["question"] in str(e.prompt)
            ]
            model(input_ids=torch.tensor([tokenize(examples[:1], tokenizer).rows[0]["input_ids"]]))
        parts = layer.adapter("default")
        gates = (torch.cat(inputs) @ parts.combine.lora_route.T).softmax(-1).mean(0)
        heads = parts.factors.lora_B.view(48, 3, 4)
        expected = parts.factors.scale * sum(g * heads[:, i] for i, g in enumerate(gates))
    prefix = f"base_model.model.{site}."
    torch.testing.assert_close(written[f"{prefix}lora_B.weight"], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(written[f"{prefix}lora_A.weight"], parts.factors.lora_A)


def test_a_router_that_does_not_look_at_the_token_loses_nothing(make, tmp_path: Path) -> None:
    def no_router(model) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("lora_route"):
                parameter.data.zero_()

    adapter = make(**HYDRA, change=no_router)
    done = export(ExportRequest(str(adapter), "peft", tmp_path / "out", static=static(rows(tmp_path / "a.jsonl"))))
    found = done.approximation.agreement
    assert found.max_difference <= 1e-5 * found.largest_logit
    assert found.same_top1 == 1


def test_closed_ranks_are_left_out(make, tmp_path: Path) -> None:
    def close(model) -> None:
        model.base_model.close_ranks("default", "model.layers.0.self_attn.q_proj", range(4))
        model.base_model.close_ranks("default", "model.layers.1.mlp.down_proj", [1, 3])

    adapter = make(**HYDRA, change=close)
    done = export(ExportRequest(str(adapter), "peft", tmp_path / "out", static=static(rows(tmp_path / "a.jsonl"))))
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^model\.layers\.1\.mlp\.down_proj": 2}


def test_a_folder_per_task(make, tmp_path: Path) -> None:
    adapter = make(**HYDRA)
    calibration = rows(tmp_path / "a.jsonl", tasks=("sums", "logic/one"))
    held_out = rows(tmp_path / "b.jsonl", tasks=("sums", "logic/one"), shift=3)
    order = ExportRequest(
        str(adapter), "peft", tmp_path / "out", data=DataOptions(test=held_out), static=static(calibration)
    )
    done = export_per_task(order)
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["logic-one", "sums"]
    assert {one.approximation.rows for one in done.values()} == {3}
    assert {one.approximation.accuracy[0].items for one in done.values()} == {3}
    first, second = (load_file(one.folder / "adapter_model.safetensors") for one in done.values())
    assert any(not torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "lora"}, "'lora' has no gates over heads"),
        ({"data": "a.jsonl"}, "both name '.*a.jsonl': compare on rows not calibrated on"),
        ({"task": "other"}, "no calibration row is of task 'other'"),
    ],
)
def test_what_is_refused(make, tmp_path: Path, change, message) -> None:
    adapter = make(**({"adapter": "lora"} if "adapter" in change else HYDRA))
    source = rows(tmp_path / "a.jsonl", tasks=("one",))
    data = DataOptions(test=source) if "data" in change else None
    order = ExportRequest(str(adapter), "peft", tmp_path / "out", data=data, static=static(source, change.get("task")))
    with pytest.raises(UserError, match=message):
        export(order)
    assert not (tmp_path / "out").exists()


def test_rows_without_tasks_have_no_folders_of_their_own(make, tmp_path: Path) -> None:
    order = ExportRequest(str(make(**HYDRA)), "peft", tmp_path / "out", static=static(rows(tmp_path / "a.jsonl")))
    with pytest.raises(UserError, match="--per-task needs a 'task' in every calibration row"):
        export_per_task(order)


def test_the_command(make, tmp_path: Path, capsys) -> None:
    adapter, source = make(**HYDRA), rows(tmp_path / "a.jsonl", tasks=("one", "two"))
    command = ["export", str(adapter), "--to", "peft", "--static-gates", source, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["fixed", "fixed", "written", "verified", "done"]
    assert main([*command[:-1], str(tmp_path / "each"), "--per-task"]) == 0
    assert (tmp_path / "each" / "two" / "adapter_config.json").is_file()
    assert main(["export", str(adapter), "--to", "peft", "--per-task"]) == 2
    assert "--per-task belongs to --static-gates" in capsys.readouterr().err
