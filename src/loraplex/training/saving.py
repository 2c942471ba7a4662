"""The adapter folder: written elsewhere, reloaded, compared with the model in memory, and only then put in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import UserError
from loraplex.training.base_model import write_base
from loraplex.training.folder import fill_atomically

# Largest difference of a logit, as a share of the largest logit, that rounding explains. The saved adapter is computed
# by PEFT in another order of operations than by us; in bfloat16 one rounding is 2**-8, and 30 blocks of them made 2**-4.9
# of an adapter that is equal to the last bit in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-7, torch.bfloat16: 2**-4}
COMPARED_ROWS = 4


@dataclass(frozen=True)
class Reload:
    """How the reloaded adapter compares with the model that was trained."""

    rows: int
    """Training rows compared."""
    dtype: str
    """Of the frozen weights in both."""
    largest_difference: float
    """Of any logit, absolute."""
    largest_logit: float
    tolerance: float
    """Allowed difference as a share of the largest logit."""
    same_prediction: float
    """Share of positions at which both predict the same next token."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


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
    result: list[tuple[PeftModel, Reload]] = []

    def fill(temporary: Path) -> None:
        model.save_pretrained(str(temporary))
        write_base(temporary, base)
        # PEFT's model card is a form with nothing filled in.
        (temporary / "README.md").unlink(missing_ok=True)
        fresh = fresh_base()
        reloaded = PeftModel.from_pretrained(fresh, str(temporary))
        reloaded.eval()
        result.append((reloaded, _compare(trained, _logits(reloaded, rows), fresh.dtype)))

    fill_atomically(folder, fill)
    return result[0]


def _compare(trained: Sequence[Tensor], reloaded: Sequence[Tensor], dtype: torch.dtype) -> Reload:
    pairs = list(zip(trained, reloaded, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    scale = max(float(a.abs().max()) for a, _ in pairs)
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    positions = sum(a.shape[0] for a, _ in pairs)
    report = Reload(
        rows=len(pairs),
        dtype=str(dtype).removeprefix("torch."),
        largest_difference=difference,
        largest_logit=scale,
        tolerance=TOLERANCE[dtype],
        same_prediction=agreeing / positions,
    )
    if not difference <= report.tolerance * scale:
        raise UserError(
            f"the saved adapter does not compute what the trained one does: logits differ by {difference:.3g} of "
            f"{scale:.3g}; nothing was put in place, the checkpoints are kept"
        )
    return report


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
