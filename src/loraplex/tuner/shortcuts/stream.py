"""The hooks by which shortcuts add to a model's residual stream.

A block's hooks take its input h, add to the sum after attention where a module gets it, and to the sum after the MLP
where a norm gets it or the block puts it out.

transformers checkpoints a block's forward, outside of which the block's hooks are. What goes in and out besides (the
previous block's f, this one's f and what is added behind it) therefore passes through the checkpoint as inputs and
outputs of its function, so that both kinds of checkpoints give it its gradient. Before 5.23 it checkpointed the block's
call, inside of which the hooks are: then only f passes through, and the module that holds the blocks arranges it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loraplex.allocation.sites import EDGES
from loraplex.compat.torch import child_names, child_of
from loraplex.compat.transformers import (
    checkpoint_function,
    checkpoints_calls,
    is_checkpointed,
    set_checkpoint_function,
)
from loraplex.errors import UserError
from loraplex.tuner.layer import ADAPTERS, AdapterLayer
from loraplex.tuner.shortcuts.layers import ShortcutLayer
from loraplex.tuner.shortcuts.residual_stream import Places, find_places

_STREAM = "loraplex_stream"
"""Attribute of a block: its `Stream`; no module."""


@dataclass
class _Slot:
    """What passes from block to block: f of the block that ran last, where the next one wants it."""

    f: Tensor | None = None


class Stream:
    """The hooks of one block, and the state of the call that is running."""

    def __init__(
        self, index: int, block: nn.Module, places: Places | None, slot: _Slot, before: Stream | None, holder: nn.Module
    ) -> None:
        self.index, self.block, self.places, self.slot = index, block, places, slot
        self.after: Stream | None = None
        if before is not None:
            before.after = self
        self.around: Callable[..., Any] | None = None
        """The block's own checkpoint function while its whole call is checkpointed through ours."""
        self._clear()
        if places is None:
            self.handles = [block.register_forward_pre_hook(self._refuse)]
            return
        inside = block.get_submodule(places.after_attention)
        # the hooks are bound methods: a deep copy of the model gets copies of its own
        self.handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            block.register_forward_hook(self._leave, prepend=True, always_call=True),
            inside.register_forward_pre_hook(self._after_attention),
        ]
        if checkpoints_calls(block):
            self.handles.append(holder.register_forward_pre_hook(self._open_checkpoint))
            self.handles.append(holder.register_forward_hook(self._close_checkpoint, always_call=True))
        if places.after_mlp is not None:
            last = block.get_submodule(places.after_mlp)
            self.handles.append(inside.register_forward_hook(self._normalized))
            self.handles.append(last.register_forward_pre_hook(self._after_mlp))

    def _clear(self) -> None:
        self.h: Tensor | None = None
        """(..., d), the block's input; None while nothing acts."""
        self.given: Tensor | None = None
        """f of the block before, where it is wanted."""
        self.f: Tensor | None = None
        self.behind: Tensor | None = None
        """What is added to the block's output."""
        self.met = False
        """Whether the sum after attention was met."""
        self.function: Callable[..., Any] | None = None
        """The block's own checkpoint function while ours stands in its place."""

    def layer(self, kind: str) -> ShortcutLayer | None:
        """Return the block's layer of a kind, if it has one."""
        found = child_of(self.block, kind)
        return found if isinstance(found, ShortcutLayer) else None

    def acts(self, kind: str) -> bool:
        """Whether a shortcut of that kind acts in this block."""
        layer = self.layer(kind)
        return layer is not None and bool(layer.acting)

    def remove(self) -> None:
        """Take the hooks and layers out of the block."""
        for handle in self.handles:
            handle.remove()
        for name in child_names(self.block):
            if isinstance(child_of(self.block, name), ShortcutLayer):
                delattr(self.block, name)
        del self.block.__dict__[_STREAM]

    def _refuse(self, block: nn.Module, args: Any) -> None:
        if any(layer.active for layer in map(self.layer, EDGES) if layer is not None):
            raise UserError(
                "these shortcuts were made on a model without weights: load those before the adapter is made"
            )

    @property
    def _sends(self) -> bool:
        return self.after is not None and self.after.acts("shortcut_mlp")

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clear()
        if self.index == 0:
            self.slot.f = None
        if not self._sends and not any(self.acts(kind) for kind in EDGES):
            return
        self.h = args[0] if args else kwargs["hidden_states"]
        if self.acts("shortcut_mlp"):
            self.given, self.slot.f = self.slot.f, None
            if self.given is None:
                raise UserError(
                    f"block {self.index} has a shortcut from the block before it, which did not run before it: leave "
                    "gradient checkpointing to transformers, or shortcut_mlp out"
                )
        function = checkpoint_function(block)
        if self._is_checkpointed and function is not None and not checkpoints_calls(block):
            self.function = function
            set_checkpoint_function(block, self._checkpointed)

    @property
    def _is_checkpointed(self) -> bool:
        block = self.block
        return block.training and is_checkpointed(block) and checkpoint_function(block) is not None

    def _open_checkpoint(self, holder: nn.Module, args: Any) -> None:
        if self._is_checkpointed and (self._sends or self.acts("shortcut_mlp")):
            self.around = checkpoint_function(self.block)
            set_checkpoint_function(self.block, self._checkpointed_call)

    def _close_checkpoint(self, holder: nn.Module, args: Any, output: Any) -> None:
        if self.around is not None:
            set_checkpoint_function(self.block, self.around)
            self.around = None

    def _checkpointed_call(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run the block's call under its own checkpoint function, with f as an input and an output of it."""
        assert self.around is not None
        sends, is_tuple = self._sends, False

        def again(given: Tensor | None, *inner: Any) -> tuple[Any, ...]:
            nonlocal is_tuple
            # in the backward pass the slot is as the last forward pass left it
            outer, self.slot.f = self.slot.f, given
            try:
                out = run(*inner)
                is_tuple = isinstance(out, tuple)
                return (self.slot.f if sends else None, *(out if is_tuple else (out,)))
            finally:
                self.slot.f = outer

        self.slot.f, *out = self.around(again, self.slot.f, *args)
        return tuple(out) if is_tuple else out[0]

    def _checkpointed(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block under its own checkpoint function, with what passes beside h as inputs and outputs of it."""
        assert self.function is not None
        h, sends, is_tuple = self.h, self._sends, False

        def again(given: Tensor | None, *inner: Any, **options: Any) -> tuple[Any, ...]:
            nonlocal is_tuple
            outer = self.h, self.given, self.f, self.behind
            self.h, self.given = inner[0] if inner else h, given
            try:
                out = run(*inner, **options)
                is_tuple = isinstance(out, tuple)
                return (self.f if sends else None, self.behind, *(out if is_tuple else (out,)))
            finally:
                self.h, self.given, self.f, self.behind = outer

        self.f, self.behind, *out = self.function(again, self.given, *args, **kwargs)
        return tuple(out) if is_tuple else out[0]

    def _after_attention(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.h is None:
            return None
        x, self.met = args[0], True
        if x.numel() != self.h.numel():
            raise UserError(
                f"block {self.index} was given {tuple(self.h.shape)} and has {tuple(x.shape)} after attention: "
                "shortcuts need all tokens at both; leave them out"
            )
        change = self._sum(("residual_attention", self.h), ("shortcut_mlp", self.given))
        total = x if change is None else _added(x, change)
        assert self.places is not None
        if self.places.after_mlp is None:
            self.f = total.reshape(self.h.shape)
            second = self._sum(("residual_mlp", self.f), ("shortcut_block", self.h))
            self.behind = change if second is None else second if change is None else change + second
        return None if change is None else (total, *args[1:])

    def _normalized(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.h is not None:
            self.f = output.reshape(self.h.shape)

    def _after_mlp(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.h is None:
            return None
        change = self._sum(("residual_mlp", self.f), ("shortcut_block", self.h))
        return None if change is None else (_added(args[0], change), *args[1:])

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Add what belongs behind the MLP, and hand f on; after an error (no output) only put things back."""
        if self.function is not None:
            set_checkpoint_function(block, self.function)
        h, f, behind, met = self.h, self.f, self.behind, self.met
        sends = self._sends
        self._clear()
        if h is None or output is None:
            return None
        if not met:
            raise UserError(
                f"block {self.index} ran otherwise than when its residual stream was found, past its shortcuts: "
                "leave them out"
            )
        if sends:
            self.slot.f = f
        if behind is None:
            return None
        if isinstance(output, tuple):
            return (_added(output[0], behind), *output[1:])
        return _added(output, behind)

    def _sum(self, *edges: tuple[str, Tensor | None]) -> Tensor | None:
        """Return what the shortcuts of these kinds add, each given its point of the stream."""
        total: Tensor | None = None
        for kind, point in edges:
            layer = self.layer(kind)
            change = None if layer is None or point is None else layer(point)
            if change is not None:
                total = change if total is None else total + change
        return total


def _added(x: Tensor, change: Tensor) -> Tensor:
    """Return x (n, d) or (..., d) plus a change of as many numbers, in the type of x."""
    return (x + change.reshape(x.shape).to(x.device)).to(x.dtype)


def stream_of(block: nn.Module) -> Stream | None:
    """Return the hooks of a block, if it has any."""
    found = block.__dict__.get(_STREAM)
    return found if isinstance(found, Stream) else None


def open_streams(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Put hooks on all `blocks` of a model, unless they are there.

    Without weights, on the meta device, nothing can be run and found: such a model can be counted, not called.

    Raises:
        UserError: see `find_places`.
    """
    if all(stream_of(block) is not None for block in blocks):
        return
    places: list[Places | None] = [None] * len(blocks)
    if not any(parameter.is_meta for name, parameter in model.named_parameters() if ADAPTERS not in name):
        with _adapters_off(model):
            places = [*find_places(model, blocks)]
    holder = next(module for module in model.modules() if any(child is blocks for child in module.children()))
    slot, before = _Slot(), None
    for index, block in enumerate(blocks):
        before = Stream(index, block, places[index], slot, before, holder)
        block.__dict__[_STREAM] = before


@contextlib.contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute without its adapters: tensors that are about to be loaded may not be there yet."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    flags = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer.switch(off=True)
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer.switch(off=flag)


def close_streams(model: nn.Module) -> None:
    """Take all hooks and shortcut layers out of a model."""
    for module in list(model.modules()):
        stream = stream_of(module)
        if stream is not None:
            stream.remove()
