"""HydraLoRA: one A, N heads B_i, and a router that weighs the heads for every token.

Paper: Tian et al., HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, arXiv 2404.19245, section 3;
details as in its official code.
    g = softmax(W_g x) in float32, x without dropout,    y = W0 x + b + s·Σ_i g_i B_i diag(gate) A drop(x),
s = alpha/r. A and W_g start as `nn.Linear` draws them, U(−1/√in, 1/√in), the heads at 0: with equal gates for all of
them they would stay equal for ever, so W_g is random. The paper balances nothing: `top_k` and `balance` are not its.
Trainable parameters per site: r·in + N·r·out, and N·in of the router. N = 1 gives LoRA's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraplex.adapters.contracts import BaseWeight, Combine, Factors, Resolved, SiteInit, scaling, uniform
from loraplex.adapters.gates import GateRecord
from loraplex.adapters.registry import REGISTRY, Adapter, Axis, Capability, Method, Preset
from loraplex.errors import UserError, nearest
from loraplex.kernels.routed import balanced, routed_linear, softmax_gates, weighed
from loraplex.option_values import is_whole


@dataclass(frozen=True)
class Heads:
    """Options of the factors with several heads."""

    heads: int | Literal["auto"] = 4
    """N, the number of matrices B over one A; "auto": as many as the prompts of the training rows form groups."""

    def __post_init__(self) -> None:
        """Refuse a number of heads that is not whole, or below 1."""
        if self.heads == "auto":
            return
        if not is_whole(self.heads) or self.heads < 1:
            raise UserError(f"heads is {self.heads!r}: give a whole number of at least 1, or auto")

    def resolve_from_data(self, texts: Callable[[], Sequence[str]], seed: int) -> Resolved | None:
        """Return these options with the number of groups that k-means finds in `texts`, where it was left open."""
        if self.heads != "auto":
            return None
        from loraplex.data.clustering import group_texts

        found = group_texts(texts(), seed=seed)
        return Resolved(replace(self, heads=found.number), f"heads: {found.number}; {found.reason}", found.evidence())

    def scale(self, alpha: float, rank: int) -> float:
        """Return s = alpha/r; the number of heads does not enter, their gates sum to 1."""
        return scaling(alpha, rank)

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest rank that is allowed, as for LoRA."""
        return max(in_features, out_features)

    def build(self, site: SiteInit) -> HeadFactors:
        """Return freshly initialized factors for a site.

        Raises:
            UserError: when the number of heads is still open.
        """
        if self.heads == "auto":
            raise UserError("heads is 'auto' without training rows: give a number, 'loraplex heads DATA' finds one")
        return HeadFactors(site, self, self.heads)


class HeadFactors(Factors):
    """A (r, in), and B (out, N·r) with the heads side by side; closing a rank closes it in every head."""

    def __init__(self, site: SiteInit, options: Heads, heads: int) -> None:
        super().__init__(site, options.scale(site.alpha, site.rank))
        self.heads = heads
        generator = site.generator()
        self.lora_A = nn.Parameter(uniform((site.rank, site.in_features), 1 / math.sqrt(site.in_features), generator))
        b = torch.zeros(site.out_features, self.heads * site.rank)
        if not site.identity:
            b = uniform((site.out_features, self.heads * site.rank), 1 / math.sqrt(site.rank), generator)
        self.lora_B = nn.Parameter(b)

    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return the trained A (r, in) and [B_1 … B_N] (out, N·r)."""
        return self.lora_A, self.lora_B


@dataclass(frozen=True)
class Route:
    """Options of combine by routing."""

    top_k: int | None = None
    """Outside the paper: the softmax is over the k largest logits of a token; all heads when absent."""
    router: Literal["learned", "frozen", "uniform"] = "learned"
    """Controls outside the paper: "frozen" keeps the random W_g, "uniform" gives every head 1/N (heads stay equal)."""
    balance: float = 0.0
    """Outside the paper: weight w of w·(N Σ_i ḡ_i² − 1), which evens the heads' mean gates ḡ over a forward pass. It is
    scaled like the loss: by gradient accumulation and a gradient scaler."""
    dropout_per_head: bool = False
    """Every head has a dropout mask of its own, as in the official code: A is multiplied once per head then."""

    def __post_init__(self) -> None:
        """Refuse a top_k that is not whole, or below 1, and a router that is not known."""
        if self.router not in (known := ("learned", "frozen", "uniform")):
            hint = nearest(str(self.router), known)
            raise UserError(f"router is {self.router!r}: choose {', '.join(known)}.{hint}")
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise UserError(f"top_k is {self.top_k!r}: give a whole number of at least 1, or leave it out")
        if isinstance(self.balance, bool) or not 0 <= self.balance < math.inf:
            raise UserError(f"balance is {self.balance!r}: give a weight of at least 0, such as 0.01")
        if self.balance and self.router != "learned":
            raise UserError(f"balance is {self.balance!r}, but the router is {self.router}: leave one of them out")

    def build(self, site: SiteInit) -> Routing:
        """Return the combine for a site."""
        return Routing(site, self)


class Routing(Combine):
    """The router W_g (N, in), without bias."""

    gates: GateRecord
    lora_route: Tensor

    def __init__(self, site: SiteInit, options: Route) -> None:
        super().__init__()
        if options.top_k is not None and options.top_k > site.heads:
            raise UserError(f"top_k is {options.top_k}, but {site.name} has {site.heads} heads: lower top_k")
        self.options = options
        self.adds_loss = options.balance > 0
        self.gates = GateRecord(site.heads)
        # a generator of its own: the one of the site gives A these numbers
        generator = site.generator(f"{site.name}:router")
        route = uniform((site.heads, site.in_features), 1 / math.sqrt(site.in_features), generator)
        if options.router == "learned":
            self.lora_route = nn.Parameter(route)
        else:
            self.register_buffer("lora_route", route if options.router == "frozen" else torch.zeros_like(route))

    def drop(self, x: Tensor, dropout: nn.Module) -> Tensor:
        """Return x after dropout, with a mask per head (N, ..., in) where the options ask for it."""
        if self.options.dropout_per_head and isinstance(dropout, nn.Dropout) and dropout.training:
            heads = len(self.lora_route)
            return torch.stack([dropout(x) for _ in range(heads)])
        return super().drop(x, dropout)

    def output(self, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        """Return y (..., out) in the dtype of the frozen linear."""
        if dropped.dim() > x.dim():
            y0 = F.linear(x, weight, bias)
            return (y0 + self._delta(x, dropped, factors)).to(y0.dtype)
        a, b = factors.raw_pair()
        masked = None if dropped is x else dropped
        s = factors.rank_scale(b.dtype)
        options = self.options
        given = (options.top_k, options.balance, self.loss_scale)
        y, gates = routed_linear(x, masked, weight, bias, a, b, s, self.lora_route, *given)
        self._record(gates)
        return y

    def delta(self, x: Tensor, dropped: Tensor, y0: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return Δy = Σ_i g_i (drop(x) Aᵀ) B_iᵀ (..., out) in the dtype of the factors."""
        return self._delta(x, dropped, factors)

    def _delta(self, x: Tensor, dropped: Tensor, factors: Factors) -> Tensor:
        a, b = factors.pair()
        gates = softmax_gates(F.linear(x.to(self.lora_route.dtype), self.lora_route), self.options.top_k)
        gates = balanced(gates, self.options.balance, self.loss_scale)
        self._record(gates)
        low = F.linear(dropped.to(a.dtype), a)
        if low.dim() > x.dim():
            # (N, ..., r): every head has its own row of A drop(x)
            each = (low.movedim(0, -2) * gates.unsqueeze(-1)).flatten(-2).to(low.dtype)
            return F.linear(each, b)
        return F.linear(weighed(gates, low), b)

    def delta_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Refuse: the change of the weight depends on the token.

        Raises:
            UserError: always.
        """
        raise UserError("a routed adapter changes the weight by another matrix for every token: there is no ΔW")

    def collapsed(self, factors: Factors, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and Σ_i ḡ_i B_i (out, r), detached, scale and rank gates included once."""
        a, b = (tensor.detach() for tensor in factors.pair())
        heads = b.view(len(b), factors.heads, -1)
        return a.clone(), torch.einsum("onr,n->or", heads, gates.to(heads))

    def _record(self, gates: Tensor) -> None:
        if self.gates.on and not torch.compiler.is_compiling():
            self.gates.add(gates)


def HydraLoRA(  # noqa: N802  (the method's name)
    heads: int | Literal["auto"] = 4,
    *,
    top_k: int | None = None,
    router: Literal["learned", "frozen", "uniform"] = "learned",
    balance: float = 0.0,
    dropout_per_head: bool = False,
) -> Adapter:
    """Return HydraLoRA: y = W0 x + b + s·Σ_i g_i(x) B_i A x, one A (r, in) under `heads` matrices B_i (out, r).

    A router gives every token its gates g = softmax(W_g x) over the heads. What the options do stands with `Heads` and
    `Route`, whose fields they are. Paper: Tian et al., arXiv 2404.19245.

    Raises:
        UserError: for values out of range.
    """
    route = Route(top_k=top_k, router=router, balance=balance, dropout_per_head=dropout_per_head)
    return Adapter(Heads(heads), route)


REGISTRY.add(
    Method(
        name="heads",
        axis=Axis.FACTORS,
        options=Heads,
        summary="one A under several heads B",
        paper="arXiv 2404.19245",
        parameters="r·in + heads·r·out",
        provides=frozenset({Capability.ROUTED, Capability.GATES}),
        mergeable=False,
    )
)
REGISTRY.add(
    Method(
        name="route",
        axis=Axis.COMBINE,
        options=Route,
        summary="a router weighs the heads for every token",
        paper="arXiv 2404.19245",
        parameters="heads·in",
        needs=frozenset({Capability.ROUTED}),
        provides=frozenset({Capability.GATES}),
        mergeable=False,
    )
)
REGISTRY.add(
    Preset(
        "hydra",
        "heads",
        "route",
        "W0 + s·Σ g_i(x)·B_i A",
        "arXiv 2404.19245",
        "r·in + heads·(r·out + in)",
    ),
)
