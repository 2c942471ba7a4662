"""LoRA-XS factors: a trained r × r matrix between frozen singular vectors of W0.

Paper: Bałazy et al., LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604.
With the truncated W0 ≈ U S Vᵀ: A = S Vᵀ (r, in) and U (out, r) frozen, R (r, r) trained, B = U R, and
ΔW = s·B·diag(gate)·A with s = alpha/r. Trainable parameters per site: r².
R starts at 0, not at the official code's N(0, 1e-5²), so that the first output is the frozen one to the bit; its
gradient is not zero there, because A and U are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.adapters.bases import singular_bases
from loraplex.adapters.contracts import Factors, SiteInit, check_rank, scaling, uniform
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method, Preset
from loraplex.errors import UserError

_TOLERANCE = 2**-8
"""Largest difference of two fingerprints of one subspace, as a share of the norm: one rounding to bfloat16."""
_DIGEST_BYTES = 8
_PROBES = 2


@dataclass(frozen=True)
class LoRAXS:
    """Options of the LoRA-XS factors."""

    exact_svd: bool = False
    """Decompose W0 fully, instead of by the seeded randomized method."""
    store_bases: bool = False
    """Write the frozen A and U too: files as large as LoRA's, which do not depend on finding them again."""

    def scale(self, alpha: float, rank: int) -> float:
        """Return s = alpha/r."""
        return scaling(alpha, rank)

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest rank that is allowed: W0 has no more singular vectors."""
        return min(in_features, out_features)

    def build(self, site: SiteInit) -> XSFactors:
        """Return freshly initialized factors for a site."""
        return XSFactors(site, self)


class XSFactors(Factors):
    """A and U are buffers that the file leaves out; it holds R, 8 bytes of a hash of W0 and a fingerprint (4,)."""

    frozen_A: Tensor
    frozen_B: Tensor
    base_digest: Tensor
    fingerprint: Tensor

    def __init__(self, site: SiteInit, options: LoRAXS) -> None:
        super().__init__(site, options.scale(site.alpha, site.rank))
        check_rank(site.name, site.rank, options.largest_rank(site.in_features, site.out_features))
        a, b, digest = _frozen_pair(site, options)
        self.register_buffer("frozen_A", a, persistent=options.store_bases)
        self.register_buffer("frozen_B", b, persistent=options.store_bases)
        self.register_buffer("base_digest", digest)
        self.register_buffer("fingerprint", _fingerprint(a, b))
        r = torch.zeros(site.rank, site.rank)
        if not site.identity:
            r = uniform((site.rank, site.rank), 1 / math.sqrt(site.rank), site.generator())
        self.lora_R = nn.Parameter(r)

    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return the frozen A (r, in) and U R (out, r)."""
        # autocast would round a product that the magnitude's norm is sensitive to
        with torch.autocast(self.frozen_B.device.type, enabled=False):
            return self.frozen_A, self.frozen_B @ self.lora_R.to(self.frozen_B.dtype)

    def check_file(self, site: str, tensors: Mapping[str, Tensor]) -> None:
        """Compare the fingerprint in a file with that of A and U here; bases in the file need no comparison.

        Raises:
            UserError: for another base model, or another subspace of the same one.
        """
        theirs = tensors.get("fingerprint")
        if theirs is None or "frozen_A" in tensors or self.frozen_A.is_meta:
            return
        ours = _fingerprint(self.frozen_A, self.frozen_B)
        norms = [torch.linalg.vector_norm(frozen).cpu() for frozen in (self.frozen_A, self.frozen_B)]
        allowed = _TOLERANCE * torch.stack(norms).repeat_interleave(_PROBES)
        if bool(((theirs.to(ours) - ours).abs().cpu() <= allowed).all()):
            return
        if torch.equal(tensors["base_digest"].cpu(), self.base_digest.cpu()):
            raise UserError(
                f"{site}: the same base weights gave another subspace here than where the adapter was trained: "
                "save it there with store_bases"
            )
        raise UserError(
            f"{site}: this base model has other weights than the one the adapter was trained on: "
            "load that one, in the same data type, or train with store_bases"
        )


def _frozen_pair(site: SiteInit, options: LoRAXS) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (r, in), U (out, r) and the beginning of the hash of W0, empty where they are loaded anyway."""
    weight = site.weight().detach()
    if weight.is_meta or (site.meta and options.store_bases):
        a = torch.empty(site.rank, site.in_features, device=weight.device)
        b = torch.empty(site.out_features, site.rank, device=weight.device)
        return a, b, torch.empty(_DIGEST_BYTES, dtype=torch.uint8, device=weight.device)
    bases = singular_bases(weight, site.rank, exact=options.exact_svd)
    digest = torch.tensor(list(bases.digest[:_DIGEST_BYTES]), dtype=torch.uint8)
    return bases.s[:, None] * bases.vh, bases.u, digest


def _fingerprint(a: Tensor, b: Tensor) -> Tensor:
    """Return (4,): P A x and P Bᵀ y with fixed random P (2, r), x (in,), y (out,)."""
    if a.is_meta:
        return a.new_empty(2 * _PROBES)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(a.dtype, torch.float32)

    def fixed(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(a.device, dtype)

    probes, x, y = fixed(_PROBES, len(a)), fixed(a.shape[1]), fixed(len(b))
    with torch.autocast(a.device.type, enabled=False):
        return torch.cat([probes @ (a.to(dtype) @ x), probes @ (b.to(dtype).T @ y)])


REGISTRY.add(
    Method(
        name="xs",
        axis=Axis.FACTORS,
        options=LoRAXS,
        summary="an r × r matrix between frozen singular vectors",
        paper="arXiv 2405.17604",
        parameters="r²",
        provides=frozenset({Capability.STATIC, Capability.PAIR, Capability.GATES, Capability.RANK_INPUT}),
        only_peft_model="its file must be compared with the base model when it is loaded",
    )
)
REGISTRY.add(
    Preset("lora-xs", "xs", "add", "W0 + s·URA, U and A singular vectors of W0", "arXiv 2405.17604", "r²"),
)
