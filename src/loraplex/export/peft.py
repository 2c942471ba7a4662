"""Target `peft`: a LoRA or DoRA folder that stock PEFT loads without loraplex, whatever method trained it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from loraplex.adapters.registry import SaveFormat
from loraplex.errors import UserError
from loraplex.export.base_lines import base_lines
from loraplex.export.pairs import SitePair, plain_form, write_plain_form
from loraplex.export.subject import ExportCandidate, not_one_pair
from loraplex.export.target import Logits, Target, WriteOptions
from loraplex.models.loading import resolve_model
from loraplex.models.stock_peft import stock_logits
from loraplex.tuner.sites import module_names

READER = "stock PEFT"


def write(model: PeftModel, folder: Path, how: WriteOptions) -> list[str]:
    """Write every pair with its own rank, alpha = r everywhere."""
    form = plain_form(model)
    write_plain_form(folder, form, module_names(model.get_base_model()), how.dtype, resolve_model(how.base))
    kind = SaveFormat.DORA if form.config.use_dora else SaveFormat.LORA
    return [f"{kind.value}, {ranks_in_words(form.pairs)}"]


def ranks_in_words(pairs: dict[str, SitePair]) -> str:
    """Return "rank 8 at 14 sites", or "ranks 2 to 8 at 14 sites"."""
    ranks = sorted(pair.rank for pair in pairs.values())
    span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{span} at {len(ranks)} sites"


def reload(folder: Path, base: str, rows: Sequence[Sequence[int]]) -> dict[str, Logits]:
    """Return what PEFT computes in a process without loraplex.

    Raises:
        UserError: when PEFT cannot load the folder.
    """
    try:
        return {READER: stock_logits(resolve_model(base), str(folder), rows)}
    except RuntimeError as error:
        raise UserError(f"{error}; nothing was put in place") from error


def snippet(folder: Path, base: str) -> str:
    """Return the lines that load the folder, run in it."""
    return f'from peft import PeftModel\n{base_lines(base)}\nmodel = PeftModel.from_pretrained(base, ".")\n'


def refuse(subject: ExportCandidate) -> str | None:
    """Refuse what is not one pair per site."""
    return not_one_pair(subject)


PEFT = Target(
    name="peft",
    summary="a LoRA or DoRA folder for PEFT, transformers, TRL",
    refuse=refuse,
    write=write,
    reload=reload,
    snippet=snippet,
    usage=lambda folder, base: "",
)
