"""`loraplex demo`: what it promises is checked, and every stage of it runs."""

from pathlib import Path
from typing import Any

import pytest

from loraplex.cli.demo import check_gain
from loraplex.cli.main import main
from loraplex.errors import UserError


def measured(value: float, standard_error: float, majority_share: float = 0.0) -> dict[str, Any]:
    return {"value": value, "standard_error": standard_error, "majority_share": majority_share}


def test_a_clear_gain_passes() -> None:
    check_gain(measured(0.0, 0.0), measured(0.40, 0.035, 0.005))


@pytest.mark.parametrize(
    ("before", "after", "bar"),
    [
        (measured(0.30, 0.03), measured(0.39, 0.01), r"0\.400 is needed to be clearly above the base model \(0\.300\)"),
        # Two standard errors of the difference: 2·√(0.05² + 0.05²) = 0.141.
        (measured(0.30, 0.05), measured(0.43, 0.05), r"0\.441 is needed to be clearly above the base model"),
        (
            measured(0.0, 0.0),
            measured(0.50, 0.03, 0.45),
            r"0\.550 is needed to be clearly above the most frequent answer",
        ),
        (measured(0.0, 0.0), measured(0.57, 0.10, 0.45), r"0\.650 is needed"),
        (measured(0.0, 0.0), measured(0.0, 0.0), r"0\.100 is needed"),
    ],
)
def test_a_gain_that_is_not_clear_is_an_error(before: dict[str, Any], after: dict[str, Any], bar: str) -> None:
    with pytest.raises(UserError, match=bar):
        check_gain(before, after)


@pytest.mark.slow
def test_the_short_form_passes_through_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(["demo", "--short", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "peft:     without loraplex: largest difference of a logit 0 in float32" in printed
    assert "with the adapter" in printed
    assert f"loraplex generate {output}" in printed
    assert {"adapter", "metrics.json", "recipe.yaml", "loss.png"} <= {entry.name for entry in output.iterdir()}
    assert main(["demo", "--short", "--output", str(output)]) == 1
    assert "is not empty" in capsys.readouterr().err
