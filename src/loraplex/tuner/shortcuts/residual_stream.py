"""Where a block's residual stream can be met, found by running the model on three tokens.

Names tell nothing here: OPT has the same modules in the same order whether its norms stand before the branches or on
the sums. What the modules really get and give does: the sum after attention is the block's input plus what some module
put out, and the block's output is that sum plus what another one put out, or a norm of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.errors import UserError, is_out_of_memory
from loraplex.models.modes import evaluation_mode

TOKENS = (0, 1, 2)
"""Every vocabulary has them."""


@dataclass(frozen=True)
class Places:
    """Modules of a block, by their names in it, that meet the sums of its residual stream."""

    after_attention: str
    """Gets the sum after attention as its input."""
    after_mlp: str | None
    """The norm that gets the sum after the MLP and gives the block's output; None where that sum is the output."""


def find_places(model: nn.Module, blocks: nn.ModuleList) -> list[Places]:
    """Return the places of every block; `model` is called without gradients, in evaluation mode.

    Raises:
        UserError: when the model does not run on `TOKENS` alone, or a block is not two branches one after the other,
            each added to the residual stream.
    """
    records = [_Record() for _ in blocks]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        for block, record in zip(blocks, records, strict=True):
            stack.enter_context(record.watching(block))
        stack.callback(blocks[-1].register_forward_hook(_stop).remove)
        try:
            with contextlib.suppress(_SeenError):
                model(input_ids=torch.tensor([TOKENS], device=_device(model)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"shortcuts need the residual stream, and the model does not run on three tokens to find it: {reason}"
            ) from error
    found = []
    for index, record in enumerate(records):
        places = record.places()
        if places is None:
            raise UserError(
                f"no place for shortcuts in block {index} ({type(blocks[index]).__name__}): it does not add attention "
                "and then an MLP to its input, one after the other; leave shortcuts out"
            )
        found.append(places)
    return found


class _SeenError(Exception):
    """The last block has run."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _SeenError


def _device(model: nn.Module) -> torch.device:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = next(embedding.parameters()).device
    return device


@dataclass
class _Record:
    """What the modules of a block got and gave, in the order of the calls."""

    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    """How many outputs there were when the input of the same index came."""
    computed: list[Tensor] = field(default_factory=list)
    """Outputs of modules without modules of their own: in them nothing is added to the stream."""

    @contextlib.contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Record within the context; the block itself is called ""."""
        handles = []
        for name, module in block.named_modules():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x = args[0] if args else kwargs.get("hidden_states")
                if isinstance(x, Tensor):
                    self.inputs.append((name, x))
                    self.given.append(len(self.outputs))

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                y = output[0] if isinstance(output, tuple) and output else output
                if isinstance(y, Tensor):
                    self.outputs.append((name, y))
                    if not any(module.children()):
                        self.computed.append(y)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def places(self) -> Places | None:
        """Return the places, None where there are none."""
        calls = [name for name, _ in self.inputs]
        if calls.count("") != 1 or not self.outputs or self.outputs[-1][0] != "":
            return None
        h, out = self.inputs[0][1], self.outputs[-1][1]
        inner = [y for name, y in self.outputs if name]
        after_attention = next(
            (
                (name, x)
                for (name, x), given in zip(self.inputs, self.given, strict=True)
                if name and self._is_sum(x, h, inner[:given])
            ),
            None,
        )
        if after_attention is None or calls.count(after_attention[0]) != 1:
            return None
        name, total = after_attention
        if self._is_sum(out, total, inner):
            return Places(name, None)
        # norms on the sums
        outputs = dict(self.outputs)
        for other, x in self.inputs:
            put_out = outputs.get(other)
            is_last = calls.count(other) == 1 and put_out is not None and _same_memory(put_out, out)
            if other and is_last and self._is_sum(x, outputs[name], inner):
                return Places(name, other)
        return None

    def _is_sum(self, x: Tensor, a: Tensor, others: Sequence[Tensor]) -> bool:
        """Whether x is a + b up to rounding, for some b of `others`, and was made by adding."""
        if x.numel() != a.numel() or not x.is_floating_point():
            return False
        # a norm's output is much larger than a small input, which then lies within its rounding
        if any(_same_memory(x, known) for known in (a, *self.computed)):
            return False
        eps, dtype = torch.finfo(x.dtype).eps, torch.promote_types(x.dtype, torch.float32)
        x, a = x.reshape(-1).to(dtype), a.reshape(-1).to(dtype)
        for other in others:
            if other.numel() == x.numel():
                b = other.reshape(-1).to(x)
                if bool(((x - a - b).abs() <= 4 * eps * (a.abs() + b.abs())).all()):
                    return True
        return False


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
