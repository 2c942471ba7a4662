"""The studies of allocations: every arm pays for the same number of parameters at the end, or of ranks."""

from pathlib import Path

import pytest

from loraplex.comparison.comparison_recipe import read_comparison
from loraplex.training.estimate import build_without_weights, model_config
from loraplex.training.preparation import adapter_config, head_size
from loraplex.tuner.counting import count_parameters

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
PARAMETERS, RANKS, HEAD = 82_944, 72, 770


@pytest.mark.parametrize("path", sorted(STUDIES.glob("hetero-*.yaml")), ids=lambda path: path.stem)
def test_the_arms_have_one_final_budget(path: Path) -> None:
    arms = read_comparison(path).arms
    config, dtype = model_config(arms["uniform"])
    for name, arm in arms.items():
        model = build_without_weights(arm, config, dtype)
        assert head_size(model) == HEAD
        budget = count_parameters(model).budget
        if arm.peft:
            assert adapter_config(arm).target_r * 36 == RANKS
        elif budget is None:
            assert model.get_nb_trainable_parameters()[0] == PARAMETERS + HEAD, name
        else:
            assert budget.amount == (RANKS if budget.unit == "ranks" else PARAMETERS), name
