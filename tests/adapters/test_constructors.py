"""Every method under the name that people know: the constructor gives what the recipe's name gives."""

import dataclasses
import inspect

import pytest

import loraplex
from loraplex import AdapterConfig, DoRA, EchoLoRA, HeteroLoRA, HydraLoRA, LoRA, LoRAXS, PRoLoRA, TiedLoRA, UserError
from loraplex.adapters.hydra import Heads, Route


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (LoRA(), "lora"),
        (DoRA(), "dora"),
        (TiedLoRA(), "tied-tl6"),
        (TiedLoRA(train_u=False, train_v=False), "tied-tl5"),
        (PRoLoRA(), "prolora"),
        (LoRAXS(), "lora-xs"),
        (HydraLoRA(), "hydra"),
        (HydraLoRA(2, balance=0.1), {"name": "hydra", "heads": 2, "balance": 0.1}),
        (DoRA(LoRA(use_rslora=True)), {"name": "dora", "use_rslora": True}),
        (DoRA(TiedLoRA()), {"factors": "tied", "combine": "magnitude"}),
    ],
    ids=str,
)
def test_a_constructor_gives_what_the_name_gives(made: object, name: object) -> None:
    config = AdapterConfig(adapter=made)
    assert config.adapter == AdapterConfig(adapter=name).adapter
    assert config.to_dict()["adapter"] == name


def test_options_stay_objects_until_they_are_written() -> None:
    config = AdapterConfig(allocation=HeteroLoRA(share=0.5), objective=EchoLoRA(probability=0.3))
    assert config.allocation == HeteroLoRA(share=0.5)
    assert config.objective == EchoLoRA(probability=0.3)
    written = config.to_dict()
    assert (written["allocation"], written["objective"]) == (
        {"name": "hetero", "share": 0.5},
        {"name": "echo", "probability": 0.3},
    )
    assert AdapterConfig(**{key: written[key] for key in AdapterConfig.own_fields()}).allocation == config.allocation
    config.allocation = "uniform"
    assert type(config.allocation).__name__ == "Uniform"


def test_hydras_constructor_has_all_its_options() -> None:
    fields = [entry.name for cls in (Heads, Route) for entry in dataclasses.fields(cls)]
    assert list(inspect.signature(HydraLoRA).parameters) == fields


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "TiedLoRA", "PRoLoRA", "LoRAXS", "HydraLoRA", "HeteroLoRA"])
def test_it_is_public(name: str) -> None:
    assert name in loraplex.__all__
    assert getattr(loraplex, name).__doc__


def test_factors_that_do_not_go_with_a_magnitude_are_refused() -> None:
    with pytest.raises(UserError, match="this adapter is not possible"):
        DoRA(Heads())
