"""Whether a reloaded adapter computes what the trained one does: site by site in float64, then in the logits.

Logits in bfloat16 cannot tell: the rounding of thirty blocks hides an adapter that is wrong by a tenth. So every site
is computed on its own, in float64, and the logits only guard what lies beside the sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from loraplex.errors import UserError
from loraplex.models.agreement import Agreement, compare
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.model import LoraplexTuner

_INPUTS = 4  # random x per site
_EXACT_LOGITS = 1e-5  # of the largest logit, for any logit, where the frozen weights have at least float32
_SITE_ROUNDING = 1e-6  # of the largest |y|: what folding the scale into B in float32 may change


@dataclass(frozen=True)
class Reload:
    """How the reloaded adapter compares with the model that was trained."""

    rows: int
    """Training rows whose logits were compared."""
    dtype: str
    """Of the frozen weights, and so of the logits."""
    largest_logit: float
    difference: float | None
    """Largest of any logit, reloaded by loraplex: the same operations, so 0 unless an allocation compacted ranks. None
    for an adapter of stock PEFT."""
    difference_peft: float | None
    """Largest of any logit, reloaded by PEFT; of a type of our own, its pairs written out as plain LoRA. None where
    there is no such form."""
    mean_difference_peft: float | None
    same_prediction_peft: float | None
    """Share of positions at which both predict the same next token."""
    site_difference_peft: float | None
    """Largest difference of y at any site, in float64, as a share of the site's largest |y|. None where no site could
    be compared: quantized weights, or an adapter of stock PEFT."""

    def __str__(self) -> str:
        parts = []
        if self.difference is not None:
            equal = "equal to the bit" if self.difference == 0 else f"equal up to {self.difference:.2g}"
            alone = ", which alone can compute it" if self.difference_peft is None else ""
            parts.append(f"{equal} in loraplex{alone}")
        if self.site_difference_peft is not None:
            parts.append(f"every site within {self.site_difference_peft:.1g} in stock PEFT")
        if self.difference_peft is not None:
            parts.append(
                f"logits within {self.dtype} rounding in stock PEFT ({self.difference_peft:.2g} at most, "
                f"{self.mean_difference_peft:.2g} on average, on logits of up to {self.largest_logit:.3g})"
            )
        return ", ".join(parts) or "with no form that could be compared"


@dataclass(frozen=True)
class SiteDifference:
    """How y at one site differs between two models."""

    site: str
    difference: float
    """Largest |y − y'|."""
    allowed: float
    largest: float
    """|y|."""

    @property
    def share(self) -> float:
        """The difference as a share of the largest |y|."""
        return self.difference / self.largest if self.largest else self.difference


def site_differences(trained: PeftModel, stock: PeftModel) -> Iterator[SiteDifference]:
    """Yield for every site of `trained` how far `stock` is from it, on fixed random x, in float64 on the CPU.

    y and y' differ by what the parameters differ, and by nothing else: copies of both layers are computed in float64.
    Allowed is 10⁻⁶ of the largest |y|, plus 16 roundings of Δy in the type of the adapter, as the scale is folded into
    B. Sites whose weights are quantized, sharded or elsewhere are left out.
    """
    assert isinstance(trained.base_model, LoraplexTuner)
    name = trained.active_adapter
    for layer in trained.base_model.site_layers():
        weight = layer.frozen.parameter()
        if name not in layer.loraplex_adapters or not _is_plain(weight):
            continue
        own = (torch.finfo(parameter.dtype).eps for parameter in layer.adapter(name).parameters())
        eps = max(own, default=torch.finfo(torch.float32).eps)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_INPUTS, layer.in_features, generator=generator, dtype=torch.float64)
        y0, y = _outputs(layer, x)
        _, theirs = _outputs(stock.get_base_model().get_submodule(layer.site), x)
        largest = float(y.abs().max())
        allowed = 16 * eps * float((y - y0).abs().max()) + _SITE_ROUNDING * largest
        yield SiteDifference(layer.site, float((y - theirs).abs().max()), allowed, largest)


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta


@torch.no_grad()
def _outputs(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (rows, out) of the frozen linear and of the whole layer; the layer itself is left alone."""
    layer = deepcopy(layer).cpu().double().eval()
    if isinstance(layer, SiteLayer):
        for name in layer.loraplex_adapters:
            for shared in layer.adapter(name).factors.borrowed():
                shared.cpu().double()
    base = getattr(layer, "base_layer", layer)
    return base(x), layer(x)


def checked(
    trained: Sequence[Tensor],
    ours: Sequence[Tensor] | None,
    stock: Sequence[Tensor] | None,
    sites: Sequence[SiteDifference],
    dtype: torch.dtype,
    is_exact: bool,
) -> Reload:
    """Return the comparison of the logits `trained` (tokens, vocabulary) per row with those of the reloaded adapter.

    `is_exact` demands equality to the bit of `ours`. Logits of frozen weights of at least float32 may differ by 10⁻⁵ of
    the largest logit; in narrower types their mean difference may be one rounding (eps) of it.

    Raises:
        UserError: when something differs by more.
    """
    for site in sites:
        if not site.difference <= site.allowed:
            raise _refusal("PEFT", f"at {site.site} the output differs", site.difference, site.allowed)
    by_ours = None if ours is None else compare("loraplex", trained, ours, _EXACT_LOGITS)
    by_stock = None if stock is None else compare("PEFT", trained, stock, _EXACT_LOGITS)
    if by_ours is not None:
        if is_exact and by_ours.max_difference != 0:
            raise _refusal("loraplex", "a logit differs", by_ours.max_difference, 0)
        _check_logits(by_ours, dtype)
    if by_stock is not None:
        _check_logits(by_stock, dtype)
    return Reload(
        rows=len(trained),
        dtype=str(dtype).removeprefix("torch."),
        largest_logit=max(float(logits.abs().max()) for logits in trained),
        difference=None if by_ours is None else by_ours.max_difference,
        difference_peft=None if by_stock is None else by_stock.max_difference,
        mean_difference_peft=None if by_stock is None else by_stock.mean_difference,
        same_prediction_peft=None if by_stock is None else by_stock.same_top1,
        site_difference_peft=max((site.share for site in sites), default=None),
    )


def _check_logits(agreement: Agreement, dtype: torch.dtype) -> None:
    if torch.finfo(dtype).bits >= 32:
        found, allowed, what = agreement.max_difference, _EXACT_LOGITS, "a logit differs"
    else:
        found, allowed, what = agreement.mean_difference, torch.finfo(dtype).eps, "logits differ on average"
    if not found <= allowed * agreement.largest_logit:
        raise _refusal(agreement.reader, what, found, allowed * agreement.largest_logit)


def _refusal(reader: str, what: str, found: float, allowed: float) -> UserError:
    return UserError(
        f"the saved adapter, reloaded by {reader}, does not compute what the trained one does: {what} by {found:.3g}, "
        f"{allowed:.3g} is allowed; nothing was put in place, the checkpoints are kept"
    )
