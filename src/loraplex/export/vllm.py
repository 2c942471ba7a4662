"""Target `vllm`: a LoRA folder that is right under one global scale, for vLLM, SGLang, LoRAX and their like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from loraplex.export import peft
from loraplex.export.base_lines import is_embedded
from loraplex.export.engine import RANKS, engine_rank, read_as_engine
from loraplex.export.pairs import PlainForm, plain_form, write_plain_form
from loraplex.export.subject import ExportCandidate, not_plain_lora
from loraplex.export.target import Logits, Target, WriteOptions
from loraplex.export.verification import pair_logits
from loraplex.models.loading import load_model, resolve_model
from loraplex.tuner.sites import module_names

READER = "the engines' reading rule"


def refuse(subject: ExportCandidate) -> str | None:
    """Refuse what is not plain LoRA, and ranks beyond the engines' largest."""
    if (reason := not_plain_lora(subject, "vLLM")) is not None:
        return reason
    largest = max(subject.ranks.values(), default=1)
    if engine_rank(largest) is None:
        return f"rank {largest} is beyond the {RANKS[-1]} that vLLM holds; '--to merged' writes the whole model"
    return None


def write(model: PeftModel, folder: Path, how: WriteOptions) -> list[str]:
    """Fold all scaling into B, pad every site with zeros to one rank, write alpha = r and no patterns."""
    form = plain_form(model)
    rank = engine_rank(max(pair.rank for pair in form.pairs.values()))
    assert rank is not None, "refuse() has seen the ranks"
    form.config.rank_pattern = {}
    padded = PlainForm(form.config, {site: pair.padded(rank) for site, pair in form.pairs.items()}, form.beside)
    write_plain_form(folder, padded, module_names(model.get_base_model()), how.dtype, resolve_model(how.base))
    return [f"plain LoRA, {peft.ranks_in_words(form.pairs)}, padded with zeros to rank {rank}; scale 1"]


def reload(folder: Path, base: str, rows: Sequence[Sequence[int]]) -> dict[str, Logits]:
    """Return what stock PEFT computes, and what follows from the engines' own reading of the folder."""
    pairs = read_as_engine(folder)
    return {**peft.reload(folder, base, rows), READER: pair_logits(load_model(base, "float32"), pairs, rows)}


def usage(folder: Path, base: str) -> str:
    """Return the command that serves the folder."""
    rank = len(next(iter(read_as_engine(folder).values()))[0])
    name = "BASE_MODEL" if is_embedded(base) else base
    return f"vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules adapter=."


VLLM = Target(
    name="vllm",
    summary="a LoRA folder with one rank and one scale, for vLLM, SGLang and LoRAX",
    refuse=refuse,
    write=write,
    reload=reload,
    snippet=peft.snippet,
    usage=usage,
)
