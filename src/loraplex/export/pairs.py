"""The pairs (A, B) of an adapter by site, out of the tensors of PEFT's form, and folders of that form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from loraplex.allocation.sites import is_edge
from loraplex.errors import UserError
from loraplex.tuner.file_tensors import PREFIX, peft_tensors
from loraplex.tuner.model import LoraplexTuner
from loraplex.tuner.peft_format import peft_adapter, write_adapter

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class SitePair:
    """What a finished adapter is at one site: W0 + BA, or DoRA's (m/n) ⊙ (W0 + BA)."""

    a: Tensor
    """A (r, in)."""
    b: Tensor
    """B (out, r), with all scaling in it."""
    magnitude: Tensor | None = None
    """m (out,), for DoRA."""

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return len(self.a)

    def padded(self, rank: int) -> SitePair:
        """Return the same BA with zeros up to `rank`."""
        assert self.rank <= rank
        a, b = self.a.new_zeros(rank, self.a.shape[1]), self.b.new_zeros(len(self.b), rank)
        a[: self.rank], b[:, : self.rank] = self.a, self.b
        return SitePair(a, b, self.magnitude)


@dataclass(frozen=True)
class PlainForm:
    """An adapter as stock PEFT holds it, alpha = r everywhere."""

    config: LoraConfig
    pairs: dict[str, SitePair]
    """By full module name, in float32 on the CPU."""
    beside: dict[str, Tensor]
    """Under their keys in the file: biases, whole modules, rows of the embedding."""


def plain_form(model: PeftModel) -> PlainForm:
    """Return the active adapter in PEFT's form; closed ranks are left out, all scaling is in B, once.

    Raises:
        UserError: when it is not one pair per site, or no rank is open.
    """
    config, tensors = peft_adapter(model, model.active_adapter)
    tensors = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return PlainForm(config, read_pairs(tensors, lambda site: 1.0), _beside(model))


def _beside(model: PeftModel) -> dict[str, Tensor]:
    """Return what is trained beside the sites under its keys in the file.

    Without the frozen embedding that PEFT adds where the output head is a site.
    """
    saved: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return {
        key: tensor.detach().cpu()
        for key, tensor in saved.items()
        if f".{LoraplexTuner.prefix}" not in key and not key.endswith((_A, _B, _MAGNITUDE))
    }


def read_pairs(tensors: Mapping[str, Tensor], scale: Callable[[str], float]) -> dict[str, SitePair]:
    """Return the pair of every site in the tensors of a file in PEFT's form; `scale` gives what B lacks at a site.

    Raises:
        UserError: when a half is missing.
    """
    pairs = {}
    for key in tensors:
        if not key.endswith(_A):
            continue
        stem = key.removesuffix(_A)
        site = stem.removeprefix(PREFIX)
        if stem + _B not in tensors:
            raise UserError(f"the adapter file holds '{key}' without '{stem}{_B}': it is damaged, copy it again")
        magnitude = tensors.get(stem + _MAGNITUDE)
        pairs[site] = SitePair(
            tensors[key].float(),
            tensors[stem + _B].float() * scale(site),
            None if magnitude is None else magnitude.float(),
        )
    return pairs


def write_plain_form(folder: Path, form: PlainForm, names: Collection[str], dtype: torch.dtype, base: str) -> None:
    """Write a folder that stock PEFT loads.

    Targets are listed; patterns are there only where ranks differ, as exact names. `names` are those of all modules of
    the base model, `base` is what PEFT shall load it from. Pairs are written in `dtype`, magnitudes in float32.
    """
    config, ranks = form.config, {site: pair.rank for site, pair in form.pairs.items()}
    config.target_modules, config.exclude_modules = explicit_targets(list(ranks), names)
    config.r = config.lora_alpha = max(ranks.values())
    patterns = {key: rank for key, rank in (config.rank_pattern or {}).items() if rank != config.r}
    config.rank_pattern, config.alpha_pattern = patterns, dict(patterns)
    config.base_model_name_or_path = base
    tensors = dict(form.beside)
    for site, pair in form.pairs.items():
        named = {_A: pair.a.to(dtype), _B: pair.b.to(dtype), _MAGNITUDE: pair.magnitude}
        tensors.update({f"{PREFIX}{site}{name}": value for name, value in named.items() if value is not None})
    write_adapter(folder, config, tensors)


def explicit_targets(sites: Collection[str], names: Collection[str]) -> tuple[list[str], list[str] | None]:
    """Return target_modules and exclude_modules that select exactly `sites` among the modules `names`.

    The short names (q_proj, …) where they select just these, which every engine reads; else every full name.
    """
    kinds = sorted({site.rpartition(".")[2] for site in sites})
    if {name for name in names if name.rpartition(".")[2] in kinds} == set(sites):
        return kinds, None
    # PEFT reads a name as the ending of a longer one, too
    endings = tuple(f".{site}" for site in sites)
    return sorted(sites), sorted(name for name in names if name not in sites and name.endswith(endings)) or None


def trained_parameters(model: PeftModel) -> int:
    """Return how many numbers the only adapter of a model has learned, shared ones counted once."""
    own = sum(p.numel() for name, p in model.named_parameters() if f".{LoraplexTuner.prefix}" in name)
    return own + sum(tensor.numel() for tensor in _beside(model).values())


def site_ranks(model: PeftModel) -> dict[str, int]:
    """Return by full module name the rank of the active adapter's exact pair, where it is not off."""
    assert isinstance(model.base_model, LoraplexTuner)
    name, ranks = model.active_adapter, {}
    for layer in model.base_model.site_layers():
        if name in layer.loraplex_adapters and (rank := len(layer.adapter(name).factors.compact()[0])):
            ranks[layer.site] = rank
    return ranks


def open_shortcuts(model: PeftModel) -> tuple[str, ...]:
    """Return the residual edges on which the active adapter has open ranks."""
    assert isinstance(model.base_model, LoraplexTuner)
    return tuple(model.base_model.open_shortcuts(model.active_adapter))


def every_pair(model: PeftModel) -> dict[str, SitePair]:
    """Return the pairs of the active adapter, one per site as PEFT holds it, and of its shortcuts by residual edge."""
    assert isinstance(model.base_model, LoraplexTuner)
    name = model.active_adapter
    _, tensors = peft_tensors(model.base_model.site_layers(), name)
    pairs = read_pairs({key: tensor.detach().cpu() for key, tensor in tensors.items()}, lambda site: 1.0)
    for layer in model.base_model.adapter_layers(name):
        if is_edge(layer.site) and layer.adapter(name).factors.open_ranks:
            a, b = layer.adapter(name).factors.compact()
            pairs[layer.site] = SitePair(a.cpu().float(), b.cpu().float())
    return pairs
