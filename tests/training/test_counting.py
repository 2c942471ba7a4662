"""A run with an allocation says what it trains and what it will keep, and records what is left."""

from pathlib import Path

from safetensors.torch import load_file

from loraplex.training.reading import read_recipe
from loraplex.training.run import train


def test_a_run_says_both_and_records_what_is_left(tiny_recipe: Path) -> None:
    options = "{name: hetero, share: 0.25, unit: parameters, batches: 2, interval: 2}"
    said: dict[str, str] = {}
    result = train(read_recipe(tiny_recipe, ["--allocation", options]), say=said.__setitem__)
    assert said["adapter"].endswith("; candidates: 1,856 parameters in 14 sites || budget: 464 parameters")
    parameters = result.metrics["parameters"]
    written = load_file(result.adapter / "adapter_model.safetensors")
    assert parameters["deployed"] == sum(tensor.numel() for tensor in written.values())
    assert 0 < parameters["deployed"] <= 464 < parameters["trainable"] == 1856
