"""Target `merged`: the base model with the adapter written into its weights, merged in float32 and cast once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from loraplex.errors import UserError
from loraplex.export.subject import ExportCandidate, has_shortcuts, without_weights
from loraplex.export.target import Logits, Target, WriteOptions
from loraplex.models.agreement import model_logits
from loraplex.models.loading import load_model, resolve_model
from loraplex.models.quiet import quiet
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.model import LoraplexTuner

READER = "transformers"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(subject: ExportCandidate) -> str | None:
    """Refuse what cannot be written into a weight, and quantized bases."""
    if (reason := has_shortcuts(subject)) is not None:
        return reason
    if not subject.adapter.mergeable:
        return f"'{subject.name}' changes tokens differently, so no weight holds it; {without_weights(subject)}"
    if subject.quantization is not None:
        return (
            f"the base model is quantized ({subject.quantization}), and merging would round the adapter to its levels; "
            "--dequantize merges into the dequantized weights and writes those, or '--to peft' keeps the adapter apart"
        )
    return None


def write(model: PeftModel, folder: Path, how: WriteOptions) -> list[str]:
    """Merge in float32, cast once, and write model and tokenizer.

    Raises:
        UserError: before anything is changed, when a site shares its weight with another module.
    """
    refuse_shared(model)
    said = _in_words(rounding_losses(model), how.dtype)
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    nn.Module.to(merged, dtype=how.dtype)
    with quiet():
        merged.save_pretrained(folder)
        # as it is: `load_tokenizer` may have given it a padding token
        AutoTokenizer.from_pretrained(resolve_model(how.base)).save_pretrained(folder)
    return [said]


def refuse_shared(model: PeftModel) -> None:
    """Raise a UserError when merging one site would change another module, as with tied embeddings."""
    owners: dict[int, list[str]] = {}
    for name, module in model.get_base_model().named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    for layer in _layers(model):
        others = set(owners[id(layer.frozen.parameter())]) - {layer.site}
        if others:
            raise UserError(
                f"{layer.site} shares its weight with {', '.join(sorted(others))}: merging the adapter into one would "
                "change the other; '--to peft' keeps it apart; nothing was merged"
            )


def _layers(model: PeftModel) -> list[SiteLayer]:
    assert isinstance(model.base_model, LoraplexTuner)
    return [layer for layer in model.base_model.site_layers() if model.active_adapter in layer.loraplex_adapters]


def rounding_losses(model: PeftModel) -> dict[torch.dtype, float]:
    """Return by data type which share of the weight change rounding the merged weights loses.

    ‖round(W') − W'‖ / ‖W' − W0‖, Frobenius norms over all sites, W' = W0 + ΔW in the data type of the model. Infinite
    where W' leaves the range of the type.
    """
    lost = dict.fromkeys(DTYPES, 0.0)
    changed = 0.0
    for layer in _layers(model):
        delta = layer.get_delta_weight(model.active_adapter)
        merged = layer.frozen.parameter().detach() + delta
        changed += float(delta.double().square().sum())
        for dtype in DTYPES:
            lost[dtype] += float((merged.to(dtype).double() - merged.double()).square().sum())
    return {dtype: (square / changed) ** 0.5 if changed else 0.0 for dtype, square in lost.items()}


def _in_words(losses: dict[torch.dtype, float], written: torch.dtype) -> str:
    shares = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {share:.2g}{' (written)' if dtype is written else ''}"
        for dtype, share in losses.items()
    )
    return f"merged in float32 and cast once; share of the adapter's change that rounding loses: {shares}"


def reload(folder: Path, base: str, rows: Sequence[Sequence[int]]) -> dict[str, Logits]:
    """Return what transformers computes with the written weights, in float32 so that only they make a difference."""
    return {READER: model_logits(load_model(str(folder), "float32"), rows)}


def snippet(folder: Path, base: str) -> str:
    """Return the lines that load the folder, run in it."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
    )


MERGED = Target(
    name="merged",
    summary="a whole model with the adapter in its weights, for everything that loads models",
    refuse=refuse,
    write=write,
    reload=reload,
    snippet=snippet,
    usage=lambda folder, base: "",
    dtype=None,
)
