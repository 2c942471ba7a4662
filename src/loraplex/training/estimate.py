"""What a recipe will need before anything is trained: sites and parameters exactly, memory and time as estimates.

    memory = weights + adapter · (1 + 1 + optimizer state) + blocks · kept(block) + kept(rest) + logits + passing
    time   = steps · passes · (blocks · time(block) · tokens / tokens of the probe + time(head))

An objective may ask for more passes, and for the activations of more than one.
The whole model is built without its weights; a probe of one and two blocks (`probe.py`) measures what one block keeps
and takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from loraplex.allocation.sites import kind_of
from loraplex.batch_loss.packing import unsupported
from loraplex.data import ClassRows, Tokenized
from loraplex.errors import UserError
from loraplex.models.loading import resolve_model
from loraplex.training.preparation import Rows, adapter_config, random_base
from loraplex.training.probe import BlockCost, measure_block
from loraplex.training.recipe import Recipe
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.counting import count_parameters
from loraplex.tuner.layer import AdapterLayer, SiteLayer

_Layer = TypeVar("_Layer", bound=AdapterLayer)

# Numbers of state per trained number; other optimizers are taken for the first.
OPTIMIZER_STATE = {"adamw": 2.0, "sgd": 0.0, "adafactor": 0.02, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0}
# Forward pass and gradient with respect to the input, two operations per multiply-add.
FROZEN_FLOPS = 4
# Logits that exist at once, in float32, and their gradient.
LOGITS_AT_ONCE = 1 << 24
LOGITS_BYTES = 8
# What comes and goes in the backward pass and the gaps an allocator leaves, as a share of what is kept; and the scratch
# of the CPU libraries. Fitted to peaks measured with a 135M model: LoRA with and without padding, DoRA, batches of 2.
PASSING_SHARE = 0.31
CPU_SCRATCH = 240_000_000
# Forward passes to look at for their tokens.
MOST_PASSES = 100_000


@dataclass(frozen=True)
class Batches:
    """The batches of a run as far as rows and recipe determine them."""

    steps: int
    """Optimizer steps."""
    per_step: int
    """Forward passes per optimizer step."""
    rows: int
    """Rows per forward pass."""
    padded: bool
    """Whether padding goes through the model."""
    mean_tokens: float
    """Tokens per forward pass on average, with padding where it goes through the model."""
    largest: tuple[int, ...]
    """Lengths of the rows of the largest forward pass."""

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest forward pass."""
        return _tokens(self.largest, self.padded)


@dataclass(frozen=True)
class Kind:
    """The sites of one kind of module, or of one kind of residual edge."""

    name: str
    sites: int
    ranks: tuple[int, int]
    """Smallest and largest."""
    parameters: int
    """Trainable."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass of the largest batch."""
    head: int
    """Logits of the language-model head."""
    passing: int
    """What comes and goes in the backward pass, and the scratch of libraries."""

    @property
    def above_weights(self) -> int:
        """What comes on top of the loaded model."""
        return self.adapter + self.gradients + self.optimizer + self.activations + self.head + self.passing

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.above_weights


@dataclass(frozen=True)
class Estimate:
    """What `loraplex plan` shows."""

    kinds: list[Kind]
    ranks: dict[str, int]
    trainable: int
    """With an allocation that moves ranks, of all candidates."""
    kept: int | None
    """Parameters that the allocation leaves, where all sites are chosen alike; None where no rank moves."""
    kept_at_most: int | None
    """The same where the dearest sites are chosen: equal for a budget of parameters."""
    budget: str | None
    """That budget in its own unit."""
    total: int
    """Parameters of the model with its adapter."""
    batches: Batches
    memory: Memory
    seconds: float
    """Of all steps, without loading and evaluation."""


def estimate(recipe: Recipe, rows: Rows) -> Estimate:
    """Return the estimate for a recipe with its rows; the base model's weights are not read.

    Raises:
        UserError: for whatever makes the recipe's adapter impossible on this model.
    """
    adapter = adapter_config(recipe)
    if not isinstance(adapter, AdapterConfig):
        raise UserError("plan estimates loraplex's own adapters, this recipe has a peft section: leave it out")
    config, dtype = model_config(recipe)
    model = build_without_weights(recipe, config, dtype)
    kinds = list(_kinds(model))
    padded = adapter.padding_free is False or unsupported(model.get_base_model()) is not None
    batches = plan_batches(recipe, [len(row["input_ids"]) for row in rows.train.rows], padded)
    names = list(dict.fromkeys(kind_of(layer.site) for layer in _layers(model, SiteLayer)))
    block = measure_block(recipe, config, dtype, names, batches.largest)
    counted = count_parameters(model)
    budget = counted.budget
    learned = _learned(rows.train)
    return Estimate(
        kinds=kinds,
        ranks={layer.site: _rank(layer) for layer in _layers(model, AdapterLayer)},
        trainable=counted.trainable,
        kept=None if budget is None else counted.kept,
        kept_at_most=None if budget is None else counted.most,
        budget=None if budget is None else str(budget),
        total=counted.total,
        batches=batches,
        memory=_memory(recipe, model, config, batches, block),
        seconds=_seconds(recipe, model, config, batches, block, learned),
    )


def model_config(recipe: Recipe) -> tuple[PretrainedConfig, torch.dtype]:
    """Return the configuration of the recipe's base model and the data type of its weights."""
    config = AutoConfig.from_pretrained(resolve_model(recipe.model.name))
    if recipe.model.dtype not in (None, "auto"):
        return config, getattr(torch, recipe.model.dtype)
    return config, config.dtype or torch.float32


def build_without_weights(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> PeftModel:
    """Return the recipe's model with its adapter on the meta device: shapes and types, no storage."""
    with torch.device("meta"):
        model = get_peft_model(random_base(recipe, config, dtype), adapter_config(recipe))
    assert isinstance(model, PeftModel)
    return model


def plan_batches(recipe: Recipe, lengths: Sequence[int], padded: bool) -> Batches:
    """Return the batches that rows of these lengths make, in the trainer's own order."""
    options = recipe.training
    size = min(options.batch_size, len(lengths))
    per_epoch = math.ceil(math.ceil(len(lengths) / options.batch_size) / options.gradient_accumulation)
    steps = options.max_steps or math.ceil(options.epochs * per_epoch)
    passes = itertools.islice(_passes(recipe, lengths), min(steps * options.gradient_accumulation, MOST_PASSES))
    batches = list(passes)
    mean = sum(_tokens(batch, padded) for batch in batches) / len(batches)
    largest = max(batches, key=lambda batch: _tokens(batch, padded))
    return Batches(steps, options.gradient_accumulation, size, padded, mean, tuple(largest))


def _passes(recipe: Recipe, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the lengths of the rows of every forward pass, epoch after epoch, as accelerate's seeded sampler has it."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(recipe.seed + epoch)
        order = [lengths[index] for index in torch.randperm(len(lengths), generator=generator).tolist()]
        size = recipe.training.batch_size
        yield from (order[start : start + size] for start in range(0, len(order), size))


def _tokens(lengths: Sequence[int], padded: bool) -> int:
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _memory(recipe: Recipe, model: PeftModel, config: PretrainedConfig, batches: Batches, block: BlockCost) -> Memory:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    everything = {id(p): p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())}
    state = next((size for name, size in OPTIMIZER_STATE.items() if recipe.training.optimizer.startswith(name)), 2.0)
    text = config.get_text_config()
    passes = adapter_config(recipe).objective.most_passes  # type: ignore[attr-defined]
    activations = int(passes * text.num_hidden_layers * block.kept)
    if recipe.training.gradient_checkpointing:
        # The input of every block, and one block in full while it is gone through again.
        width = max(parameter.element_size() for parameter in model.parameters() if not parameter.requires_grad)
        inputs = text.num_hidden_layers * batches.most_tokens * text.hidden_size * width
        activations = int(passes * inputs) + block.kept
    return Memory(
        weights=sum(everything.values()) - adapter,
        adapter=adapter,
        gradients=adapter,
        optimizer=int(adapter * state),
        activations=activations + block.kept_outside,
        passing=int(PASSING_SHARE * activations) + (0 if torch.cuda.is_available() else CPU_SCRATCH),
        head=LOGITS_BYTES * min(batches.most_tokens * _outputs(recipe, text), LOGITS_AT_ONCE),
    )


def _seconds(
    recipe: Recipe, model: PeftModel, config: PretrainedConfig, batches: Batches, block: BlockCost, learned: float
) -> float:
    """Return the time of all steps; `learned` is the mean number of labels per row."""
    text = config.get_text_config()
    blocks: int = text.num_hidden_layers
    per_token = block.seconds / batches.most_tokens
    layers = list(_layers(model, SiteLayer))
    flops_per_block = FROZEN_FLOPS * sum(x.in_features * x.out_features for x in layers) / blocks
    head: float = FROZEN_FLOPS * _outputs(recipe, text) * text.hidden_size * learned * batches.rows
    again = 4 / 3 if recipe.training.gradient_checkpointing else 1.0
    one_pass = blocks * per_token * batches.mean_tokens * again + head * per_token / flops_per_block
    passes: float = adapter_config(recipe).objective.passes  # type: ignore[attr-defined]
    return one_pass * passes * batches.per_step * batches.steps


def _learned(rows: Tokenized | ClassRows) -> float:
    """Return the mean number of labels per row."""
    if isinstance(rows, ClassRows):
        return 1.0
    return sum(sum(row["completion_mask"]) for row in rows.rows) / len(rows.rows)


def _outputs(recipe: Recipe, text: PretrainedConfig) -> int:
    """Return how many logits the head computes for a label."""
    return len(recipe.classes) or int(text.vocab_size)


def _kinds(model: PeftModel) -> Iterator[Kind]:
    """Yield one entry per kind of adapted module, and one for whatever else is trained."""
    groups: dict[str, list[AdapterLayer]] = {}
    for layer in _layers(model, AdapterLayer):
        groups.setdefault(kind_of(layer.site), []).append(layer)
    counted = 0
    for name, layers in groups.items():
        ranks = [_rank(layer) for layer in layers]
        parameters = sum(_trained(layer) for layer in layers)
        counted += parameters
        yield Kind(name, len(layers), (min(ranks), max(ranks)), parameters)
    if rest := _trained(model) - counted:
        yield Kind("trained besides", 0, (0, 0), rest)


def _layers(model: nn.Module, kind: type[_Layer]) -> Iterator[_Layer]:
    return (module for module in model.modules() if isinstance(module, kind))


def _rank(layer: AdapterLayer) -> int:
    return layer.adapter(next(iter(layer.loraplex_adapters))).factors.rank


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
