"""What is refused follows from the flags that a method registers, whatever its name is."""

from dataclasses import dataclass

import pytest

from loraplex import AdapterConfig
from loraplex.adapters.registry import Axis, Capability, Method, SaveFormat
from loraplex.export.subject import ExportCandidate
from loraplex.export.targets import TARGETS, refusals
from loraplex.methods import REGISTRY


@dataclass(frozen=True)
class Options:
    """Options of a combine that is not in the registry."""


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch):
    """A function that describes an adapter with a combine of given flags."""

    def make(**flags) -> ExportCandidate:
        combine = Method("other", Axis.COMBINE, Options, "", "", "", needs=frozenset({Capability.PAIR}), **flags)
        monkeypatch.setitem(REGISTRY.methods, (Axis.COMBINE, "other"), combine)
        return ExportCandidate(AdapterConfig(adapter={"factors": "lora", "combine": "other"}), {})

    return make


def test_what_is_no_pair_can_still_be_merged(subject) -> None:
    found = refusals(subject(save_format=SaveFormat.OWN, mergeable=True))
    assert found.pop("merged") is None
    for reason in found.values():
        assert reason is not None
        assert "'lora with other' is not one fixed pair of matrices per site; '--to merged' writes" in reason


def test_what_changes_every_token_differently_goes_nowhere(subject) -> None:
    found = refusals(subject(save_format=SaveFormat.OWN, mergeable=False))
    assert set(found) == set(TARGETS)
    for reason in found.values():
        assert reason is not None
        assert "serve it with loraplex itself" in reason


def test_a_magnitude_goes_to_peft_and_into_the_weights_only(subject) -> None:
    found = refusals(subject(save_format=SaveFormat.DORA))
    assert [name for name, reason in found.items() if reason is None] == ["peft", "merged"]
    assert "full rank" in str(found["vllm"])


def test_a_quantized_base_is_merged_into_on_request_only() -> None:
    base = type("Config", (), {"quantization_config": {"quant_method": "gptq"}, "model_type": "llama"})()
    config = AdapterConfig()
    assert "quantized (gptq)" in str(TARGETS["merged"].refuse(ExportCandidate(config, {}, base)))
    assert TARGETS["merged"].refuse(ExportCandidate(config, {}, base, dequantize=True)) is None
    assert TARGETS["vllm"].refuse(ExportCandidate(config, {}, base)) is None


def test_a_rank_beyond_the_engines_largest() -> None:
    assert TARGETS["vllm"].refuse(ExportCandidate(AdapterConfig(), {"q_proj": 512})) is None
    assert "rank 513 is beyond the 512" in str(
        TARGETS["vllm"].refuse(ExportCandidate(AdapterConfig(), {"q_proj": 513}))
    )
