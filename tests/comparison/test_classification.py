"""A comparison of adapters with a classification head: rates chosen on held-out rows, items paired, no bare base."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import write_pairs_recipe

from loraplex.comparison import compare as comparing
from loraplex.comparison.comparison_recipe import read_comparison
from loraplex.comparison.jobs import Job
from loraplex.comparison.worker import DO
from loraplex.training.reading import read_recipe

ARMS = """seeds: [0]
learning_rates: [1e-3, 1e-2]
arms:
  uniform: {adapter: {r: 1}}
  random: {adapter: {allocation: {name: hetero, proxy: constant, share: 0.25, unit: parameters}}, learning_rates: []}
  stock: {peft: {peft_type: LORA, r: 1}, learning_rates: []}
"""


def in_this_process(jobs: Sequence[Job], *arguments: object) -> dict[str, str]:
    """The jobs without a process of their own, which would import everything once more for each."""
    for job in jobs:
        DO[job.kind](dataclasses.replace(read_recipe(job.file), output=str(job.folder)))
    return {}


@pytest.mark.slow
def test_arms_with_heads_are_compared_item_by_item(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "run_jobs", in_this_process)
    text = write_pairs_recipe(tmp_path, tiny_encoder).read_text().replace("max_steps: 8", "epochs: 1")
    path = tmp_path / "comparison.yaml"
    path.write_text(text.replace("save_every: 4", "validation_rows: 8") + ARMS)
    found = comparing.compare(read_comparison(path))
    assert found.base is None
    assert [run.state for arm in found.arms for run in arm.runs] == ["finished"] * 3
    ids = {tuple(item.id for item in run.items) for arm in found.arms for run in arm.runs}
    assert [len(items) for items in ids] == [40]
    uniform, random, stock = found.arms
    assert len(uniform.trials) == 2
    assert uniform.learning_rate == max(uniform.trials, key=lambda t: (t.accuracy or 0, -t.learning_rate)).learning_rate
    assert {trial.standard_error is not None for trial in uniform.trials} == {True}
    assert uniform.trainable == stock.trainable
    assert sum(random.runs[0].ranks.values()) > 0
    assert uniform.runs[0].steps == 4
    assert all(run.flops and run.flops > 0 for arm in found.arms for run in arm.runs)
