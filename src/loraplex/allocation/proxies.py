"""Zero-cost proxies: what a site is worth, from a few batches and without an optimizer step.

Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS, arXiv 2101.08134, section 3; for pairs (A, B) as in
HeteroLoRA, arXiv 2406.14956, section 3. Here θ is a trained tensor of a site's factors (or the frozen W0), ℒ the mean
loss of a batch, and gradients are summed over the K batches: grad-norm of the sum, unless `mean_of_norms` asks for the
mean of the K norms. All candidates are open while they are scored, dropout is off.

Under B = 0, where adapters start, ∂ℒ/∂A = 0: SNIP and SynFlow of (A, B) are exactly 0 at every site, and grad-norm is
that of B alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import uniform
from loraplex.allocation.contracts import Batch, Candidate, ScoringContext
from loraplex.errors import UserError
from loraplex.models.modes import evaluation_mode
from loraplex.processes import several_processes

Scores = dict[str, float]
Norms = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
"""Of the tensors θ of a site and their gradients."""


@dataclass(frozen=True)
class Scoring:
    """How proxies are computed."""

    of: str = "adapter"
    """Whose gradients: those of the "adapter"'s factors, or of the "frozen" weight W0 (out, in)."""
    mean_of_norms: bool = False
    """For grad_norm: the mean of the batches' norms instead of the norm of their sum."""
    normalize: str = "none"
    """Divide by "numel", by "sqrt_numel" of θ, or by nothing ("none")."""
    init: str = "own"
    """"random" scores with B drawn as A is, where B = 0 would leave nothing to see; B is put back."""
    tolerance: float = 0.01
    """For alpha_test: by which share the loss may rise."""
    synflow: str = "logits"
    """What SynFlow differentiates: the sum of the "logits", or the "loss" as HeteroLoRA's code has it."""


def score(proxy: str, context: ScoringContext, how: Scoring) -> Scores:
    """Return the score of every candidate by site name; `proxy` is a name of `PROXIES`.

    Gates, gradients, weights, modes and the random generators are afterwards as they were.

    Raises:
        UserError: when a frozen weight that is asked for is quantized, or missing, as on a residual edge.
    """
    if proxy == "constant":
        # nothing to look at, and no size to divide by
        return constant(context, how)
    with _set_aside(context), _drawn(context, how):
        found = PROXIES[proxy](context, how)
    if how.normalize == "none":
        return found
    power = 1.0 if how.normalize == "numel" else 0.5
    sizes = {c.name: sum(tensor.numel() for tensor in _tensors(c, how)) for c in context.candidates}
    return {name: value / sizes[name] ** power for name, value in found.items()}


def grad_norm(context: ScoringContext, how: Scoring) -> Scores:
    """‖∂ℒ/∂A‖_F + ‖∂ℒ/∂B‖_F, of every site."""

    def norms(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
        return sum(float(torch.linalg.vector_norm(widest(gradient))) for gradient in gradients)

    if not how.mean_of_norms:
        return _of_gradients(context, how, norms, context.batches)
    each = [_of_gradients(context, how, norms, [batch]) for batch in context.batches]
    return {name: sum(scores[name] for scores in each) / len(each) for name in each[0]}


def snip(context: ScoringContext, how: Scoring) -> Scores:
    """Σ|A ⊙ ∂ℒ/∂A| + Σ|B ⊙ ∂ℒ/∂B|, of every site (Lee et al., arXiv 1810.02340)."""
    return _of_gradients(context, how, _products, context.batches)


def synflow(context: ScoringContext, how: Scoring) -> Scores:
    """Σ|A ⊙ ∂R/∂A| + Σ|B ⊙ ∂R/∂B| with every weight replaced by its modulus and an input of ones.

    R is the sum of the logits (Tanaka et al., arXiv 2006.05467), or the loss. Softmax and norms take from it what the
    argument for networks of positive weights needs.
    """
    batch = context.batches[0]
    kept = [(tensor, tensor.detach().clone()) for tensor in _floating(context.model)]
    try:
        for tensor, value in kept:
            tensor.data = value.abs()

        def flow(batch: Batch) -> Tensor:
            output = context.model(**_of_ones(context.model, batch))
            result: Tensor = output.loss if how.synflow == "loss" else output.logits.sum(dtype=torch.float32)
            return result

        return _of_gradients(context, how, _products, [batch], flow)
    finally:
        for tensor, value in kept:
            tensor.data = value


def fisher(context: ScoringContext, how: Scoring) -> Scores:
    """Σ_c ½·mean over samples of (Σ_t y_tc·∂ℒ/∂y_tc)², y (samples, tokens, out) the output of the site.

    Positions of padding have no gradient, so they do not count (Theis et al., arXiv 1801.05787, as the proxies' paper
    uses it).
    """
    squares = {candidate.name: 0.0 for candidate in context.candidates}
    samples = 0

    def watch(candidate: Candidate) -> Callable[..., None]:
        def forward(module: nn.Module, inputs: Any, y: Tensor) -> None:
            # y itself in its own hook would be a cycle through the graph, which nobody collects
            kept = y.detach()

            def backward(gradient: Tensor) -> None:
                product = kept.to(torch.promote_types(kept.dtype, torch.float32)) * gradient
                per_channel = product.flatten(1, -2).sum(1) if product.dim() > 2 else product
                squares[candidate.name] += float(widest(per_channel).square().sum()) / 2

            y.register_hook(backward)

        return forward

    for candidate in context.candidates:
        _weight(candidate)
    handles = [candidate.layer.register_forward_hook(watch(candidate)) for candidate in context.candidates]
    try:
        for batch in context.batches:
            samples += len(next(iter(batch.values())))
            context.loss(batch).backward()
    finally:
        for handle in handles:
            handle.remove()
    gate = context.candidates[0].gate
    totals = torch.tensor([*squares.values(), samples], dtype=widest(gate).dtype, device=gate.device)
    mean_over_processes([totals])
    return {name: value / float(totals[-1]) for name, value in zip(squares, totals.tolist(), strict=False)}


def grasp(context: ScoringContext, how: Scoring) -> Scores:
    """−Σ θ ⊙ (H g), g = ∂ℒ/∂θ, H the Hessian of ℒ in the θ of all candidates (Wang et al., arXiv 2002.07376).

    Both derivatives are of the mean of ℒ over the batches, in two passes over them; attention is computed eagerly,
    because fused kernels have no second derivative.
    """
    tensors = {candidate.name: _tensors(candidate, how) for candidate in context.candidates}
    every = [tensor for group in tensors.values() for tensor in group]
    count = len(context.batches)
    with _twice_differentiable(context):
        first = [torch.zeros_like(tensor) for tensor in every]
        for batch in context.batches:
            gradients = torch.autograd.grad(context.loss(batch) / count, every, allow_unused=True)
            first = [g if new is None else g + new for g, new in zip(first, gradients, strict=True)]
        mean_over_processes(first)
        second = [torch.zeros_like(tensor) for tensor in every]
        for batch in context.batches:
            gradients = torch.autograd.grad(context.loss(batch) / count, every, create_graph=True, allow_unused=True)
            pairs = [(g.detach(), new) for g, new in zip(first, gradients, strict=True) if new is not None]
            product = torch.stack([(g * new).sum() for g, new in pairs]).sum()
            if product.requires_grad:
                found = torch.autograd.grad(product, every, allow_unused=True)
                second = [h if new is None else h + new for h, new in zip(second, found, strict=True)]
        mean_over_processes(second)
    products = dict(zip(map(id, every), second, strict=True))
    return {
        name: -sum(float((widest(tensor.detach()) * widest(products[id(tensor)])).sum()) for tensor in group)
        for name, group in tensors.items()
    }


def alpha_test(context: ScoringContext, how: Scoring) -> Scores:
    """The smallest α of 0, .1, … 1 with which ΔW of the site may be multiplied before the loss rises by `tolerance`.

    Costs up to 1 + 4·sites passes over the batches; it says so before it starts. α multiplies what the adapter adds,
    not the whole output of the module.
    """
    passes = (1 + 4 * len(context.candidates)) * len(context.batches)
    context.say(f"alpha_test: up to {passes:,} forward passes, against {len(context.batches)} for a gradient's proxy")

    @torch.no_grad()
    def loss() -> float:
        total = torch.stack([widest(context.loss_alone(batch)) for batch in context.batches]).mean()
        mean_over_processes([total])
        return float(total)

    allowed = (1 + how.tolerance) * loss()
    scores = {}
    for candidate in context.candidates:
        low, high = 0, 10
        while low < high:
            middle = (low + high) // 2
            candidate.gate.fill_(middle / 10)
            low, high = (low, middle) if loss() <= allowed else (middle + 1, high)
        candidate.gate.fill_(1)
        scores[candidate.name] = low / 10
    return scores


def constant(context: ScoringContext, how: Scoring) -> Scores:
    """1 everywhere, which leaves the choice to chance."""
    return {candidate.name: 1.0 for candidate in context.candidates}


PROXIES: dict[str, Callable[[ScoringContext, Scoring], Scores]] = {
    "grad_norm": grad_norm,
    "snip": snip,
    "synflow": synflow,
    "fisher": fisher,
    "grasp": grasp,
    "alpha_test": alpha_test,
    "constant": constant,
}


def _products(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
    pairs = zip(tensors, gradients, strict=True)
    return sum(float((widest(tensor.detach()) * widest(gradient)).abs().sum()) for tensor, gradient in pairs)


def _of_gradients(
    context: ScoringContext,
    how: Scoring,
    norms: Norms,
    batches: Sequence[Batch],
    loss: Callable[[Batch], Tensor] | None = None,
) -> Scores:
    """Return `norms` of every candidate's θ and the gradients summed over the batches (and the processes)."""
    for candidate in context.candidates:
        for tensor in _tensors(candidate, how):
            tensor.grad = None
    for batch in batches:
        (loss or context.loss_alone)(batch).backward()
    scores = {}
    for candidate in context.candidates:
        tensors = _tensors(candidate, how)
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        mean_over_processes(gradients)
        scores[candidate.name] = norms(tensors, gradients)
    return scores


def _tensors(candidate: Candidate, how: Scoring) -> list[Tensor]:
    """Return θ of a site: the trained tensors of its factors, or W0."""
    return [_weight(candidate)] if how.of == "frozen" else list(candidate.parameters())


def _weight(candidate: Candidate) -> Tensor:
    if candidate.weight is None:
        raise UserError(f"{candidate.name} is a shortcut, which has no frozen weight: score the adapter instead")
    return candidate.weight()


def widest(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, or in float32 on a device that has no more (MPS)."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the processes of a distributed run."""
    if several_processes():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= torch.distributed.get_world_size()


def _floating(model: nn.Module) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    return [tensor for tensor in found if tensor.is_floating_point()]


def _of_ones(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    """Return the batch with an input of ones in the place of its tokens."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    ids = batch["input_ids"]
    ones = torch.ones(*ids.shape, embedding.weight.shape[1], dtype=embedding.weight.dtype, device=ids.device)
    return {**{key: value for key, value in batch.items() if key != "input_ids"}, "inputs_embeds": ones}


@contextlib.contextmanager
def _set_aside(context: ScoringContext) -> Iterator[None]:
    """Open all gates, switch dropout off, and put gates, modes, gradients and random generators back afterwards."""
    gates = [(candidate.gate, candidate.gate.clone()) for candidate in context.candidates]
    gradients = [(parameter, parameter.grad) for parameter in context.model.parameters()]
    flags = [(parameter, parameter.requires_grad) for parameter in context.model.parameters()]
    try:
        for gate, _ in gates:
            gate.fill_(1)
        for parameter, _ in gradients:
            parameter.grad = None
        with evaluation_mode(context.model), torch.random.fork_rng(), torch.enable_grad():
            for module in context.model.modules():
                # activations are recomputed in training mode only: what is in such a block stays in evaluation
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            torch.manual_seed(context.seed % 2**63)
            yield
    finally:
        for gate, value in gates:
            gate.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _drawn(context: ScoringContext, how: Scoring) -> Iterator[None]:
    """Let frozen weights have gradients where they are asked for, and draw B where the initial one is 0."""
    if how.of == "frozen":
        for candidate in context.candidates:
            weight = _weight(candidate)
            if not weight.is_floating_point() or not isinstance(weight, nn.Parameter):
                raise UserError(f"{candidate.name} is quantized or transposed: its frozen weight has no gradient here")
            weight.requires_grad_(True)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    if how.init == "random":
        generator = torch.Generator().manual_seed(context.seed % 2**63)
        for candidate in context.candidates:
            for parameter in candidate.parameters():
                if parameter.dim() == 2 and not bool(parameter.detach().any()):
                    drawn = uniform(tuple(parameter.shape), 1 / parameter.shape[1] ** 0.5, generator)  # type: ignore[arg-type]
                    kept.append((parameter, parameter.detach().clone()))
                    parameter.data.copy_(drawn)
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)


@contextlib.contextmanager
def _twice_differentiable(context: ScoringContext) -> Iterator[None]:
    """Compute attention eagerly and every site by plain products: fused functions have one derivative."""
    model: Any = context.model
    before = getattr(model.config, "_attn_implementation", None)
    # a hook on the frozen linear makes the site call it as it is, instead of fusing it
    linear = [candidate.layer.base_layer for candidate in context.candidates if candidate.weight is not None]
    handles = [module.register_forward_pre_hook(lambda module, args: None) for module in linear]  # type: ignore[union-attr]
    try:
        if before is not None:
            model.set_attn_implementation("eager")
        yield
    finally:
        for handle in handles:
            handle.remove()
        if before is not None:
            model.set_attn_implementation(before)
