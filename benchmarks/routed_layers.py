"""Single linears under a router, forward and backward: all heads in one product against loops over the heads.

`loop` multiplies A once and every head by itself, `official` does dropout and A once per head, as HydraLoRA's own code
does (arXiv 2404.19245); both work in the data type of the frozen weight, as we do. `frozen` is the linear alone: what
every contestant pays anyway. All sit in one process, take turns, hold the same matrices, and are compared before
anything is timed; where there is dropout its masks are drawn, and only then the outputs are not compared.
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
from torch.nn import functional as F

from benchmarks import results
from benchmarks.ratios import judged
from benchmarks.results import Plan
from benchmarks.rounds import ContestantError
from benchmarks.terminal import errors, output
from benchmarks.workload import ALPHA, THREADS

RANK = 16
HEADS = 4
SHAPE = (4096, 11008)
"""(in, out)."""
TOKENS = (256, 64)
_TOLERANCE = 2e-2
"""Largest difference of the outputs, relative to the largest output."""


@dataclass(frozen=True)
class Case:
    """One layer to measure."""

    tokens: int
    dropout: float

    @property
    def over(self) -> str:
        """Whom we are compared with: the official style matters where there is dropout."""
        return "official" if self.dropout else "loop"

    @property
    def goals(self) -> tuple[float | None, float | None]:
        """The speed to reach over the loop, as it is and with the frozen products taken off both."""
        return (None, None) if self.dropout else (1.15, 1.5)


def cases(quick: bool) -> Iterator[Case]:
    """Yield what is measured."""
    for tokens in TOKENS[1:] if quick else TOKENS:
        for dropout in (0.0, 0.05):
            yield Case(tokens, dropout)


def run(plan: Plan) -> None:
    """Measure all cases, print the table and write `routed-layers.json`."""
    torch.set_num_threads(THREADS)
    beginning = results.header("routed-layers", plan)
    todo = list(cases(plan.quick))
    measured = [measure(case, plan) for case in track(todo, "routed layers", console=errors, transient=True)]
    settings = {"rank": RANK, "heads": HEADS, "alpha": ALPHA, "weights": "bfloat16", "adapters": "float32"}
    result = {**beginning, "settings": settings | {"in_features": SHAPE[0], "out_features": SHAPE[1]}}
    result["layers"] = measured
    show(result)
    results.write(result, plan)


def measure(case: Case, plan: Plan) -> dict[str, Any]:
    """Return the seconds of a pass of every contestant, round by round, and the two ratios."""
    torch.manual_seed(0)
    base = nn.Linear(*SHAPE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    ours = _ours(base, case.dropout)
    x = torch.randn(1, case.tokens, SHAPE[0], dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(1, case.tokens, SHAPE[1], dtype=torch.bfloat16)
    looped = _Loop(base, ours, case.dropout, a_per_head=case.over == "official")
    contestants: dict[str, nn.Module] = {"ours": ours, case.over: looped, "frozen": base}
    _check_same(case, ours.eval()(x), looped.eval()(x))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(plan.warm_up + plan.rounds):
        for name, layer in contestants.items():
            spent = _seconds(layer.train(), x, dy)
            if index >= plan.warm_up:
                seconds[name].append(spent)
    rounds = list(zip(seconds["ours"], seconds[case.over], seconds["frozen"], strict=True))
    whole = [theirs / mine for mine, theirs, _ in rounds]
    added = [(theirs - frozen) / max(mine - frozen, 1e-9) for mine, theirs, frozen in rounds]
    return {
        **vars(case),
        "over": case.over,
        "seconds": seconds,
        "whole": judged(whole, "speed", case.goals[0]),
        "added": judged(added, "speed", case.goals[1]),
    }


def _ours(base: nn.Linear, dropout: float) -> nn.Module:
    from peft import get_peft_model

    from loraplex import AdapterConfig

    fields = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": dropout,
        "target_modules": ["site"],
        "init_lora_weights": False,
    }
    config = AdapterConfig(adapter={"name": "hydra", "heads": HEADS}, init_lora_weights=False, **fields)
    holder = nn.ModuleDict({"site": base})
    return get_peft_model(holder, config).get_submodule("base_model.model.site")


class _Loop(nn.Module):
    """y = W0 x + s Σ_i g_i B_i A drop(x), head after head, left to autograd."""

    def __init__(self, base: nn.Linear, ours: Any, dropout: float, *, a_per_head: bool) -> None:
        super().__init__()
        self.weight, self.dropout, self.a_per_head = base.weight, nn.Dropout(dropout), a_per_head
        adapter = ours.adapter("default")
        self.scale = adapter.factors.scale
        self.a, self.router = (
            nn.Parameter(matrix.detach().clone()) for matrix in (adapter.factors.lora_A, adapter.combine.lora_route)
        )
        heads = adapter.factors.lora_B.detach().split(RANK, dim=1)
        self.heads = nn.ParameterList(nn.Parameter(head.clone()) for head in heads)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        gates = F.linear(x, self.router.to(x.dtype)).float().softmax(-1).to(x.dtype)
        low = None if self.a_per_head else F.linear(self.dropout(x), self.a.to(x.dtype))
        for index, head in enumerate(self.heads):
            through = F.linear(self.dropout(x), self.a.to(x.dtype)) if low is None else low
            y = y + gates[..., index, None] * F.linear(through, head.to(x.dtype)) * self.scale
        return y


def _check_same(case: Case, mine: Tensor, theirs: Tensor) -> None:
    mine, theirs = mine.detach(), theirs.detach()
    difference = float((mine - theirs).abs().max() / theirs.abs().max())
    if not difference <= _TOLERANCE:
        raise ContestantError(f"{case}: the two layers differ by {difference:.1e} of the largest output")


def _seconds(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    assert isinstance(layer, nn.Module)
    layer.zero_grad()
    x.grad = None
    start = time.perf_counter()
    layer(x).backward(dy)
    return time.perf_counter() - start


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("over", "tokens", "dropout", "ours ms", "theirs ms", "frozen ms", "what", "× faster", "95 %", "goal")
    for layer in result["layers"]:
        middle = len(layer["seconds"]["ours"]) // 2
        times = [f"{1e3 * sorted(layer['seconds'][name])[middle]:.1f}" for name in ("ours", layer["over"], "frozen")]
        for what in ("whole", "added"):
            found = layer[what]
            place = (layer["over"], str(layer["tokens"]), str(layer["dropout"]))
            goal = results.goal({**found, "quantity": "speed"})
            table.add_row(*place, *times, what, f"{found['median']:.2f}", results.bounds(found), goal)
    output.print(table)
