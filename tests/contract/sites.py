"""What the contract tests share: every legal adapter, and sites of odd sizes to put them on."""

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from loraplex import Adapter
from loraplex.adapters.contracts import SiteAdapter, SiteInit
from loraplex.adapters.registry import Axis, Capability, Method, incompatibility
from loraplex.errors import UserError
from loraplex.methods import REGISTRY
from loraplex.tuner.layer import FrozenLinear


def oracle(method: Method):
    """The reference module beside a method's source file: it must exist for everything that registers."""
    return importlib.import_module(f"tests.reference.{method.options.__module__.rpartition('.')[2]}")


def variants(method: Method) -> list:
    """The options of a method that its oracle names."""
    return [options for options in oracle(method).VARIANTS if type(options) is method.options]


def adapters() -> list[Adapter]:
    """Every legal combination of factors and combine, in every variant their oracles name."""
    return [
        Adapter(factors, combine)
        for f in REGISTRY.members(Axis.FACTORS)
        for c in REGISTRY.members(Axis.COMBINE)
        if incompatibility(f, c) is None
        for factors in variants(f)
        for combine in variants(c)
    ]


def label(adapter: Adapter) -> str:
    described = adapter.describe()
    return described if isinstance(described, str) else "-".join(f"{v}" for v in described.values())


@dataclass
class BuiltSite:
    """A frozen linear, an adapter on it, and the raw tensors of both."""

    base: nn.Linear
    adapter: SiteAdapter
    options: Adapter
    alpha: float

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.output(x, self.base.weight, self.base.bias)

    def sum_of_deltas(self, x: Tensor) -> Tensor:
        """The path for several adapters on one site, and for frozen maps that only their module can apply."""
        y0 = self.base(x)
        return y0 + self.adapter.delta(x, y0, FrozenLinear(self.base))

    def reference(self, x: Tensor) -> Tensor:
        """The oracle's output, on the same tensors."""
        factors, combine = (oracle(method) for method in self.options.methods)
        if Capability.ROUTED in self.options.methods[0].provides:
            raw = dict(self.adapter.factors.state_dict(keep_vars=True)) | dict(self.adapter.combine.named_parameters())
            options = (self.options.factors, self.options.combine)
            return combine.output(*options, self.alpha, self.base.weight, self.base.bias, x, raw)
        raw = dict(self.adapter.factors.named_parameters()) | dict(self.adapter.factors.named_buffers())
        a, b = factors.pair(self.options.factors, self.alpha, self.adapter.factors.rank, self.base.weight, raw)
        own = dict(self.adapter.combine.named_parameters())
        weight = combine.weight(self.options.combine, self.base.weight, a, b, self.adapter.factors.gate, own)
        bias = 0 if self.base.bias is None else self.base.bias
        return x @ weight.T + bias


def fits(options: Adapter, in_features: int, out_features: int, rank: int) -> bool:
    """Whether this rank is allowed; when not, building must fail with the name of the site."""
    if rank <= options.factors.largest_rank(in_features, out_features):
        return True
    with pytest.raises(UserError, match=r"layers\.0\.site"):
        build(options, in_features, out_features, rank)
    return False


def build(
    options: Adapter, in_features: int, out_features: int, rank: int, *, bias: bool = True, dtype=torch.float64,
    name: str = "layers.0.site", seed: int = 7, perturb: bool = True, alpha: float = 5.0, dropout: float = 0.0,
    identity: bool = True,
) -> BuiltSite:  # fmt: skip
    """Build a site, by default away from its initial point: every trainable is perturbed."""
    torch.manual_seed(3)
    base = nn.Linear(in_features, out_features, bias=bias).to(dtype).requires_grad_(False)
    init = SiteInit(name, in_features, out_features, rank, alpha, seed, lambda: base.weight, identity)
    factors = options.factors.build(init)
    adapter = SiteAdapter(factors, options.combine.build(replace(init, heads=factors.heads)), dropout).to(dtype)
    if perturb:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return BuiltSite(base, adapter, options, alpha)
