"""What is in an adapter folder: method, sites, ranks, spectra, parameters, and where it can go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from loraplex.adapters.registry import Capability, SaveFormat
from loraplex.allocation.sites import kind_of
from loraplex.analysis.spectrum import singular_values, stable_rank
from loraplex.compat.peft import SAFETENSORS_WEIGHTS_NAME
from loraplex.data import DataOptions, read_examples, tokenize
from loraplex.errors import UserError
from loraplex.export.base_lines import is_embedded
from loraplex.export.pairs import SitePair, every_pair, open_shortcuts, read_pairs, site_ranks, trained_parameters
from loraplex.export.subject import ExportCandidate, trained_beside
from loraplex.export.targets import refusals
from loraplex.models.loading import EMBEDDED, load_config, load_tokenizer
from loraplex.run_paths import RunPaths
from loraplex.tuner.adapted_model import adapter_folder, base_name, load_adapted
from loraplex.tuner.adapter_folder import check_weights, read_config
from loraplex.tuner.model import LoraplexTuner
from loraplex.tuner.routing import by_task, plain


@dataclass(frozen=True)
class SiteReport:
    """One site: BA with all scaling."""

    name: str
    in_features: int
    out_features: int
    rank: int
    spectrum: tuple[float, ...]
    """Singular values of BA, largest first."""
    norm: float
    """‖BA‖ (Frobenius)."""
    stable_rank: float
    """‖BA‖²_F / ‖BA‖²_2."""
    magnitude: float | None = None
    """Mean of DoRA's magnitudes."""

    @property
    def kind(self) -> str:
        """The kind of its site."""
        return kind_of(self.name)


@dataclass(frozen=True)
class Inspection:
    """An adapter folder read."""

    folder: Path
    method: str
    saved_as: str
    base: str | None
    parameters: int
    """Numbers that were trained, shared ones counted once."""
    bytes: int
    """Of the file of weights."""
    beside: list[str]
    """What it changes beside its sites, in words."""
    sites: list[SiteReport]
    exports: dict[str, str | None]
    """By target None, or why it is refused."""
    routing: dict[str, Any] | None = None
    """Of a routed adapter: gates by task and site, measured on rows that were given or kept by its run."""


def inspect(adapter: str, model: str | None = None, data: DataOptions | None = None) -> Inspection:
    """Read an adapter folder, run folder or hub id.

    Folders in PEFT's own form are read without their base model; of other types the base is loaded to form the pairs.
    The test rows of `data` are what the gates of a routed adapter are measured on.

    Raises:
        UserError: when there is no such adapter, or it is damaged; when `data` is given and nothing is routed.
    """
    folder = adapter_folder(adapter)
    config = read_config(folder)
    check_weights(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(file)
    routing = _kept_routing(folder)
    shortcuts: tuple[str, ...] = ()
    if data is not None and Capability.ROUTED not in config.adapter.methods[0].provides:
        raise UserError(f"'{adapter}' routes nothing, so there are no gates to measure: leave --data out")
    if not any(f".{LoraplexTuner.prefix}" in key for key in tensors):
        factors = config.adapter.factors
        pairs = read_pairs(tensors, lambda site: float(factors.scale(config.alpha_of(site), config.rank_of(site))))
        parameters, saved_as = sum(tensor.numel() for tensor in tensors.values()), config.adapter.save_format
    else:
        loaded = load_adapted(adapter, model, "float32")
        one_pair = config.adapter.peft_format is not SaveFormat.OWN and site_ranks(loaded)
        pairs, parameters = every_pair(loaded) if one_pair else {}, trained_parameters(loaded)
        saved_as, shortcuts = SaveFormat.OWN, open_shortcuts(loaded)
        if data is not None:
            routing = _measured_routing(loaded, load_tokenizer(model or base_name(adapter)), data)
    ranks = {site: pair.rank for site, pair in pairs.items()}
    subject = ExportCandidate(config, ranks, _base_config(adapter, model), shortcuts=shortcuts)
    return Inspection(
        folder=folder,
        method=subject.name,
        saved_as=saved_as.value,
        base=_base(adapter, model),
        parameters=parameters,
        bytes=file.stat().st_size,
        beside=trained_beside(config),
        sites=[_report(name, pair) for name, pair in pairs.items()],
        exports=refusals(subject),
        routing=routing,
    )


def _kept_routing(folder: Path) -> dict[str, Any] | None:
    """Return what the run around an adapter folder has kept of its gates; a damaged file counts as absent."""
    run = RunPaths(folder.parent)
    if folder.name != run.adapter.name:
        return None
    try:
        found = json.loads(run.routing.read_text(encoding="utf-8"))
        return {"rows": found["rows"], "tasks": found["tasks"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measured_routing(model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: DataOptions) -> dict[str, Any]:
    examples = read_examples(data, "test")
    ids = [row["input_ids"] for row in tokenize(examples, tokenizer).rows]
    found = by_task(model, ids, [example.task for example in examples])
    return {"rows": "given", "tasks": {task: plain(sites) for task, sites in found.items()}}


def _report(name: str, pair: SitePair) -> SiteReport:
    values = singular_values(pair.a, pair.b)
    return SiteReport(
        name=name,
        in_features=pair.a.shape[1],
        out_features=len(pair.b),
        rank=pair.rank,
        spectrum=tuple(values.tolist()),
        norm=float(values.square().sum().sqrt()),
        stable_rank=stable_rank(values),
        magnitude=None if pair.magnitude is None else float(pair.magnitude.float().mean()),
    )


def _base(adapter: str, model: str | None) -> str | None:
    try:
        name = model or base_name(adapter)
    except UserError:
        return None
    # PEFT has written the folder that it has on one machine
    return EMBEDDED if is_embedded(name) else name


def _base_config(adapter: str, model: str | None) -> Any:
    """Return the base model's configuration, or None where the base is not at hand: looking into a file needs none."""
    name = _base(adapter, model)
    try:
        return None if name is None else load_config(name)
    except UserError:
        return None
