"""Which forward pass is running, where the sites of a model can see it, also when a checkpoint runs a block again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraplex.adapters.contracts import BaseWeight, SiteAdapter, SiteInput
from loraplex.compat.transformers import checkpoint_function, set_checkpoint_function
from loraplex.errors import UserError
from loraplex.objectives.contracts import refuse_compiling
from loraplex.processes import several_processes


@dataclass(frozen=True)
class Pass:
    """One forward pass, and what it puts into the sites."""

    tokens: int = 0
    """Tokens that go through every site."""
    rows: Tensor | None = None
    """(n,) positions that get input."""
    sample: Tensor | None = None
    """(n,) which of the samples of `values` a position gets."""
    form: str = ""
    """How the input enters: additive, multiplicative, output."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Site name → (samples, r), or (samples, out) for form output."""
    fresh: Callable[[], Mapping[str, Tensor]] | None = None
    """Computes `values` once more."""


@dataclass
class PassContext:
    """Holds the pass that is running, None between passes."""

    owner: str
    """Whose passes they are, for messages."""
    current: Pass | None = None

    @contextlib.contextmanager
    def running(self, current: Pass | None) -> Iterator[None]:
        """Let this be the pass that is running, within the context."""
        before, self.current = self.current, current
        try:
            yield
        finally:
            self.current = before


@dataclass
class SiteInjector(SiteInput):
    """What a site takes from the pass that is running; a training forward outside of any is an error."""

    stage: PassContext
    site: str

    def change(self, y: Tensor, dropped: Tensor, adapter: SiteAdapter, base: BaseWeight) -> Tensor:
        """Return y with the input of this site at the rows that get it.

        additive: a' = a + v; multiplicative: a' = a ⊙ (1 + v), a = drop(x) Aᵀ in the rank space; output: y' = y + v.

        Raises:
            UserError: when gradients are wanted of a forward pass that the objective knows nothing of, and under
                torch.compile, which would mix up the passes.
        """
        refuse_compiling()
        current = self.stage.current
        if current is None:
            if torch.is_grad_enabled():
                raise UserError(
                    f"{self.stage.owner} could not act at {self.site}: this training forward did not come through "
                    "loraplex's tuner; give the adapter task_type='CAUSAL_LM', call the PEFT model itself, and leave "
                    "gradient checkpointing to transformers"
                )
            return y
        values = current.values.get(self.site)
        if values is None:
            return y
        assert current.rows is not None
        assert current.sample is not None
        flat, rows = y.reshape(-1, y.shape[-1]), current.rows.to(y.device)
        if len(flat) != current.tokens:
            raise UserError(
                f"{self.stage.owner} cannot act at {self.site}: it gets {len(flat)} of the batch's {current.tokens} "
                "tokens; leave its block out of the targets"
            )
        values, sample = values.to(y.device), current.sample.to(y.device)
        if current.form == "additive":
            change = adapter.combine.project_up(values, base, adapter.factors)[sample]
        elif current.form == "multiplicative":
            a, _ = adapter.factors.rank_space()
            low = F.linear(dropped.reshape(-1, dropped.shape[-1])[rows].to(a.dtype), a)
            change = adapter.combine.project_up(low * values[sample], base, adapter.factors)
        else:
            change = values[sample]
        return flat.index_add(0, rows, change.to(y.dtype)).view(y.shape)


@dataclass
class CheckpointWrapper:
    """A checkpoint function under which a block runs again in the pass in which it ran first."""

    function: Callable[..., Any]
    stage: PassContext

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block under its own checkpoint function; when it runs again, it does so in the same pass."""
        current, reentrant = self.stage.current, False

        def again(*inner: Any, **options: Any) -> Any:
            nonlocal reentrant
            chosen = current
            if reentrant and current is not None and current.fresh is not None:
                # this block has a backward pass of its own, which would free what the values of all blocks share
                chosen = replace(current, values=current.fresh())
            reentrant = not torch.is_grad_enabled()
            with self.stage.running(chosen):
                return run(*inner, **options)

        return self.function(again, *args, **kwargs)


def carry_through_checkpoints(model: nn.Module, stage: PassContext) -> None:
    """Let every block that is checkpointed now run again in its own pass.

    transformers checkpoints a block's forward, outside of which its hooks are: they do not run again with it.

    Raises:
        UserError: for reentrant checkpoints in several processes: DDP takes each parameter's gradient once, and two
            passes would bring it twice.
    """
    for module in model.modules():
        function = checkpoint_function(module)
        if isinstance(function, CheckpointWrapper) and function.stage is not stage:
            # of another adapter's objective
            function = function.function
        if function is None or isinstance(function, CheckpointWrapper):
            continue
        if several_processes() and _is_reentrant(function):
            raise UserError(
                f"{stage.owner} cannot train under reentrant checkpoints in several processes: set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        set_checkpoint_function(module, CheckpointWrapper(function, stage))


def _is_reentrant(function: Callable[..., Any]) -> bool:
    return bool(getattr(function, "keywords", {}).get("use_reentrant"))


def stop_carrying(model: nn.Module, stage: PassContext) -> None:
    """Give the blocks that carry `stage` their own checkpoint functions back."""
    for module in model.modules():
        function = checkpoint_function(module)
        if isinstance(function, CheckpointWrapper) and function.stage is stage:
            set_checkpoint_function(module, function.function)
