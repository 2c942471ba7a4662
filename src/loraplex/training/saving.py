"""The adapter folder: written elsewhere, reloaded, compared with the model in memory, and only then put in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.registry import Deployed
from loraplex.errors import UserError
from loraplex.training.base_model import write_base
from loraplex.training.folder import fill_atomically
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.loading import load_adapter
from loraplex.tuner.plain import save_plain

# Largest difference of a logit, as a share of the largest logit, that rounding explains when PEFT computes the adapter
# in another order of operations than we do: in bfloat16 one rounding is 2**-8, and 30 blocks of them made 2**-4.9 of an
# adapter that is equal to the last bit in float32. Whether the file is complete is for the exact comparison to say.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-7, torch.bfloat16: 2**-4}
COMPARED_ROWS = 4


@dataclass(frozen=True)
class Reload:
    """How the reloaded adapter compares with the model that was trained, in the data type of the frozen weights."""

    rows: int
    """Training rows compared."""
    dtype: str
    largest_logit: float
    difference: float | None
    """Largest of any logit, reloaded by loraplex: the same operations, so 0 unless an allocation compacted ranks. None
    for an adapter of stock PEFT."""
    difference_peft: float | None
    """Largest of any logit, reloaded by PEFT; of a type of our own, its pairs written out as plain LoRA. None for one
    that is not one pair per site, which PEFT cannot compute."""
    tolerance_peft: float
    """Allowed `difference_peft` as a share of the largest logit."""
    same_prediction_peft: float | None
    """Share of positions at which both predict the same next token."""

    def __str__(self) -> str:
        ours = "equal to the bit" if self.difference == 0 else f"equal up to {self.difference or 0:.2g}"
        if self.difference_peft is None:
            return f"{ours} in loraplex, which alone can compute it"
        stock = (
            f"stock PEFT within {self.dtype} rounding ({self.difference_peft:.2g} on logits of up to "
            f"{self.largest_logit:.3g})"
        )
        return f"in {stock}" if self.difference is None else f"{ours} in loraplex, in {stock}"


def save_checked(
    model: PeftModel,
    folder: Path,
    rows: Sequence[Sequence[int]],
    base: dict[str, Any],
    fresh_base: Callable[[], PreTrainedModel],
) -> tuple[PeftModel, Reload]:
    """Save `model`'s adapter to `folder` and return it reloaded by PEFT on `fresh_base()`, with the comparison.

    `rows` are token ids to compute logits on, `base` the record of the base model. Until the comparison has passed
    nothing stands at `folder`, or what stood there before.

    Raises:
        UserError: when the reloaded adapter does not compute what the trained one does.
    """
    rows = rows[:COMPARED_ROWS]
    trained = _logits(model, rows)
    config = model.peft_config[model.active_adapter]
    # Compaction folds the scale into B, which rounds.
    is_exact = isinstance(config, AdapterConfig) and config.finished_ranks is None
    result: list[tuple[PeftModel, Reload]] = []

    def fill(temporary: Path) -> None:
        model.save_pretrained(str(temporary))
        write_base(temporary, base)
        # PEFT's model card is a form with nothing filled in.
        (temporary / "README.md").unlink(missing_ok=True)
        fresh = fresh_base()
        again = None
        if isinstance(config, AdapterConfig):
            ours = load_adapter(fresh, str(temporary))
            again, fresh = _logits(ours, rows), ours.unload()
        stock = _by_stock_peft(fresh, model, temporary)
        is_pair = not isinstance(config, AdapterConfig) or config.typed_adapter.plain is not Deployed.OWN
        by_peft = _logits(stock, rows) if is_pair else None
        result.append((stock, _compare(trained, again, by_peft, fresh.dtype, is_exact)))

    fill_atomically(folder, fill)
    return result[0]


def _by_stock_peft(fresh: torch.nn.Module, model: PeftModel, folder: Path) -> PeftModel:
    """Return the adapter on `fresh` under PEFT's own tuner: the folder's, or its pairs written out as plain LoRA.

    One that is not one pair per site comes back under ours.
    """
    config = model.peft_config[model.active_adapter]
    with tempfile.TemporaryDirectory() as plain:
        if isinstance(config, AdapterConfig) and config.deployed is not config.typed_adapter.plain:
            save_plain(model, plain, model.active_adapter)
            folder = Path(plain)
        stock = PeftModel.from_pretrained(fresh, str(folder))
    stock.eval()
    return stock


def _compare(
    trained: Sequence[Tensor],
    ours: Sequence[Tensor] | None,
    stock: Sequence[Tensor] | None,
    dtype: torch.dtype,
    is_exact: bool,
) -> Reload:
    same = None
    if stock is not None:
        agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(trained, stock, strict=True))
        same = agreeing / sum(len(logits) for logits in trained)
    report = Reload(
        rows=len(trained),
        dtype=str(dtype).removeprefix("torch."),
        largest_logit=max(float(logits.abs().max()) for logits in trained),
        difference=None if ours is None else _largest_difference(trained, ours),
        difference_peft=None if stock is None else _largest_difference(trained, stock),
        tolerance_peft=TOLERANCE.get(dtype, min(TOLERANCE.values())),
        same_prediction_peft=same,
    )
    allowed = report.tolerance_peft * report.largest_logit
    for who, difference, limit in (
        ("loraplex", report.difference, 0.0 if is_exact else allowed),
        ("PEFT", report.difference_peft, allowed),
    ):
        if difference is not None and not difference <= limit:
            raise UserError(
                f"the saved adapter, reloaded by {who}, does not compute what the trained one does: a logit differs by "
                f"{difference:.3g}, {limit:.3g} is allowed; nothing was put in place, the checkpoints are kept"
            )
    return report


def _largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@torch.no_grad()
def _logits(model: PeftModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (tokens, vocabulary) of every row, in float32 on the CPU."""
    was_training = model.training
    model.eval()
    logits = []
    for row in rows:
        ids = torch.tensor([list(row)], device=model.device)
        logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().cpu())
    model.train(was_training)
    return logits
