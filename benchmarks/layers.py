"""Single adapted linears: forward and backward, the gradient of the input wanted, against PEFT's layer.

Both sit in one process and take turns; both hold the same A, B and magnitude, away from their start, and their
outputs are compared before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks import results
from benchmarks.ratios import judged
from benchmarks.results import Plan
from benchmarks.rounds import ContestantError
from benchmarks.terminal import errors, output
from benchmarks.workload import ALPHA, THREADS

RANK = 16
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))
"""(in, out)."""
TOKENS = (256, 64)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LONG_ENOUGH = 0.1
"""Seconds that a timed turn should last at least; short passes are repeated within it."""
_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
"""Largest difference of the outputs, relative to the largest output."""


@dataclass(frozen=True)
class Case:
    """One layer to measure."""

    adapter: str
    dtype: str
    in_features: int
    out_features: int
    tokens: int

    @property
    def goal(self) -> float | None:
        """The speed to reach over PEFT, where there is one."""
        wanted = ("dora", "bfloat16", 4096, 11008, 64)
        found = (self.adapter, self.dtype, self.in_features, self.out_features, self.tokens)
        return 2.8 if found == wanted else None


def cases(quick: bool) -> Iterator[Case]:
    """Yield what is measured."""
    for adapter in ("lora", "dora"):
        for dtype in DTYPES:
            for in_features, out_features in SHAPES[:1] if quick else SHAPES:
                for tokens in TOKENS:
                    yield Case(adapter, dtype, in_features, out_features, tokens)


def run(plan: Plan) -> None:
    """Measure all layers, print the table and write `layers.json`."""
    torch.set_num_threads(THREADS)
    beginning = results.header("layers", plan)
    todo = list(cases(plan.quick))
    measured = [measure(case, plan) for case in track(todo, "layers", console=errors, transient=True)]
    result = {**beginning, "settings": {"rank": RANK, "alpha": ALPHA, "adapters": "float32"}, "layers": measured}
    show(result)
    results.write(result, plan)


def measure(case: Case, plan: Plan) -> dict[str, Any]:
    """Return the seconds of a pass of both layers, round by round, and their ratio."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    base = nn.Linear(case.in_features, case.out_features, bias=False, dtype=dtype)
    ours, peers = _layers(case, base)
    x = torch.randn(1, case.tokens, case.in_features, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, case.tokens, case.out_features, dtype=dtype)
    _check_same(case, ours(x), peers(x))
    repeats = max(1, round(_LONG_ENOUGH / _seconds(peers, x, dy, 1)))
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    for index in range(plan.warm_up + plan.rounds):
        for name, layer in (("ours", ours), ("peft", peers)):
            spent = _seconds(layer, x, dy, repeats)
            if index >= plan.warm_up:
                seconds[name].append(spent)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["peft"], strict=True)]
    return {**vars(case), "repeats": repeats, "seconds": seconds, **judged(ratios, "speed", case.goal)}


def _layers(case: Case, base: nn.Linear) -> tuple[nn.Module, nn.Module]:
    """Return our layer and PEFT's over the same frozen weight, with the same adapter."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    from loraplex import AdapterConfig
    from loraplex.tuner.layer import SiteLayer

    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["site"]}
    mine = AdapterConfig(adapter=case.adapter, init_lora_weights=False, **fields)
    theirs = LoraConfig(use_dora=case.adapter == "dora", **fields)
    ours, peers = (
        get_peft_model(_Holder(base), config).get_submodule("base_model.model.site") for config in (mine, theirs)
    )
    assert isinstance(ours, SiteLayer)
    assert isinstance(peers, Linear)
    parameters = dict(ours.adapter("default").named_parameters())
    same = {"lora_A": "factors.lora_A", "lora_B": "factors.lora_B"}
    if case.adapter == "dora":
        same["lora_magnitude_vector"] = "combine.lora_magnitude_vector"
    with torch.no_grad():
        for peer_name, our_name in same.items():
            peers.get_parameter(f"{peer_name}.default.weight").copy_(parameters[our_name])
    return ours, peers


class _Holder(nn.Module):
    """A model with one linear."""

    def __init__(self, site: nn.Linear) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.site(x)
        return y


def _check_same(case: Case, mine: Tensor, theirs: Tensor) -> None:
    mine, theirs = mine.detach(), theirs.detach()
    difference = float((mine - theirs).abs().max() / theirs.abs().max())
    if not difference <= _TOLERANCE[case.dtype]:
        raise ContestantError(f"{case}: the two layers differ by {difference:.1e} of the largest output")


def _seconds(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, repeats: int) -> float:
    """Return the seconds of one forward and backward pass, the mean of `repeats`."""
    assert isinstance(layer, nn.Module)
    spent = 0.0
    for _ in range(repeats):
        layer.zero_grad()
        x.grad = None
        start = time.perf_counter()
        layer(x).backward(dy)
        spent += time.perf_counter() - start
    return spent / repeats


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("adapter", "weights", "in × out", "tokens", "ours ms", "PEFT ms", "× faster", "95 % interval", "goal")
    for layer in result["layers"]:
        ours, peers = (1e3 * sorted(layer["seconds"][name])[len(layer["ratios"]) // 2] for name in ("ours", "peft"))
        table.add_row(
            layer["adapter"],
            layer["dtype"],
            f"{layer['in_features']} × {layer['out_features']}",
            str(layer["tokens"]),
            f"{ours:.1f}",
            f"{peers:.1f}",
            f"{layer['median']:.2f}",
            results.bounds({**layer}),
            results.goal({**layer, "quantity": "speed"}),
        )
    output.print(table)
