"""A training forward under an objective: the batch as the objective sees it, and its loss as the trainer reads it.

TRL's trainers get the fields of their fused head, everybody else an output with the loss alone. What an objective
cannot work under is refused here, in the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.batch_loss import second_pass, trl
from loraplex.batch_loss.labeled import IGNORED, Head, Labeled, first_look, frozen_head, labeled
from loraplex.batch_loss.verdicts import Verdicts
from loraplex.compat.torch import random_states
from loraplex.compat.transformers import ForCausalLMLoss
from loraplex.errors import UserError
from loraplex.kernels.distilled_head import Distilled, Weights, distilled_log_probs
from loraplex.kernels.packed_attention import KeyMemory
from loraplex.objectives.contracts import Batch, Objective, SecondPass, refuse_compiling

_CHECKED: Verdicts[Head] = Verdicts()
"""Heads whose logits have been compared with the model's own."""
_REMEDY = "or set the adapter's objective to plain"


def compute_output(
    model: nn.Module, objective: Objective, args: tuple[Any, ...], kwargs: dict[str, Any], padding_free: bool | str
) -> Any:
    """Return the output of a training forward: the loss is the objective's.

    Raises:
        UserError: when the caller asks for something that the objective's loss is not, or the model is not one whose
            logits are a frozen linear map of its last hidden state; and whatever the objective raises.
    """
    refuse_compiling()
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or kwargs.get("shift_labels") is not None:
        raise UserError(
            "an objective needs the labels in every training forward, and this trainer keeps them to compute a loss of "
            "its own (label_smoothing_factor, compute_loss_func, DPO, GRPO, KTO, context parallelism): use the loss of "
            f"Trainer or SFTTrainer, {_REMEDY}"
        )
    if labels.ndim != 2 or args:
        raise UserError(
            "an objective needs a causal language model, called with keyword arguments and one label per token, not "
            f"labels of shape {tuple(labels.shape)} with {len(args)} positional arguments: {_REMEDY[3:]}"
        )
    _refuse_other_outputs(model, kwargs)
    fused = trl.enabled(kwargs)
    backbone, head = _backbone_and_head(model, kwargs)
    inputs = {key: value for key, value in kwargs.items() if key not in trl.OF_THE_HEAD}
    reuse = second_pass.can_look_back(model)
    batch = TrainingBatch(labeled(model, (), inputs, labels, padding_free, always=reuse), labels, backbone, head, reuse)
    objective.agree(batch.labeled.targets.device)
    outcome = objective.loss(batch)
    items = kwargs.get("num_items_in_batch")
    if fused:
        return trl.output(batch.labeled.mask, outcome.log_probs, outcome.entropy, outcome.top, items)
    total = len(outcome.log_probs) or 1 if items is None else items
    return trl.sums(model, -outcome.log_probs.sum() / total, outcome.entropy, outcome.top)


def _refuse_other_outputs(model: nn.Module, kwargs: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    routers = kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False)
    asked = {"output_router_logits": routers, "return_dict=False": kwargs.get("return_dict") is False}
    asked |= {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
    for name, given in asked.items():
        if given:
            raise UserError(f"an objective computes no output for {name}: leave it out, {_REMEDY}")
    loss = getattr(model, "loss_function", ForCausalLMLoss)
    if loss is not ForCausalLMLoss and not trl.enabled(kwargs):
        raise UserError(
            f"the model has a loss function of its own, {getattr(loss, '__name__', loss)}, which the objective's loss "
            f"would replace: give it back its own, {_REMEDY}"
        )


def _backbone_and_head(model: nn.Module, kwargs: dict[str, Any]) -> tuple[nn.Module, Head]:
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"an objective needs a model of transformers, not a {type(model).__name__}: {_REMEDY[3:]}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"an objective needs a decoder alone, {type(model).__name__} has an encoder: {_REMEDY[3:]}")
    linear = frozen_head(model)
    if linear is None:
        raise UserError(
            f"an objective needs a language-model head that is linear, frozen and without hooks, which "
            f"{type(model).__name__}'s is not: leave it out of modules_to_save and the targets, {_REMEDY}"
        )
    if trl.enabled(kwargs):
        settings = trl.settings_of(model)
        if settings is None:
            raise UserError(
                "this trainer asks the model's head for more than the log-probabilities of the labels (DPO, GRPO, KTO, "
                f"a temperature): use SFTTrainer, {_REMEDY}"
            )
        head = Head(linear, settings["logit_scale"], settings["final_logit_softcapping"])
        return getattr(model, settings["backbone_attr"]), head
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise UserError(f"an objective needs input_ids, and this batch has none (inputs_embeds?): give them, {_REMEDY}")
    return model.base_model, _checked_head(model, linear, ids)


def _checked_head(model: PreTrainedModel, linear: nn.Linear, ids: Tensor) -> Head:
    """Return the head with the scale and cap of the model's config, once its logits have been seen to be the model's.

    Raises:
        UserError: when they are not, or the model does not run its backbone as a whole.
    """

    def look() -> Head:
        head = Head(linear, *_scale_and_cap(model.config.get_text_config()))
        logits, hidden = first_look(model, ids)
        if hidden is None:
            raise UserError(
                f"{type(model).__name__} does not run its {type(model.base_model).__name__} as a whole, so an "
                f"objective cannot run it twice: {_REMEDY[3:]}"
            )
        if not head.gives(logits, hidden):
            raise UserError(
                f"the logits of {type(model).__name__} are not those of its head with the scale and cap in its config: "
                f"train with SFTTrainer, {_REMEDY}"
            )
        return head

    return _CHECKED.of(model, look)


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """Return what the models of transformers multiply their logits with, and the cap, by the names they give them."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is not None:
            inverse = name == "logits_scaling" and config.model_type != "hyperclovax"
            scale = 1 / value if inverse else value
            break
    return scale, getattr(config, "final_logit_softcapping", None)


@dataclass
class TrainingBatch(Batch):
    """A batch as an objective sees it; see `Batch`."""

    labeled: Labeled
    labels: Tensor
    backbone: nn.Module
    head: Head
    reuse: bool = False
    """Whether a second pass may look back at the first one."""
    memory: KeyMemory | None = None

    def __post_init__(self) -> None:
        """Lay the tokens in one row."""
        device = self.labeled.targets.device
        inputs, packed, mask = self.labeled.inputs, self.labeled.packed, self.labeled.mask
        learned = (self.labels != IGNORED).to(device)
        if packed is not None:
            lengths = inputs["cu_seq_lens_q"].diff().to(device)
            self.sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
            place = packed.place.to(device)
            self.real = torch.ones_like(self.sequence, dtype=torch.bool)
            self.rows = place[:, :-1][mask]
            within = torch.arange(place.shape[1], device=device) < lengths[:, None]
            self.is_target = learned[within]
        else:
            self.sequence = _sequences(inputs, self.labels.shape, device)
            attention = inputs.get("attention_mask")
            if attention is not None and attention.shape != self.labels.shape:
                raise UserError(
                    f"an objective needs an attention mask of shape {tuple(self.labels.shape)} like the labels, not "
                    f"{tuple(attention.shape)}: {_REMEDY[3:]}"
                )
            real = torch.ones_like(learned) if attention is None else attention.bool().to(device)
            self.real, self.is_target = real.flatten(), learned.flatten()
            self.rows = torch.nn.functional.pad(mask, (0, 1)).flatten().nonzero()[:, 0]
            if attention is None and any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "position_ids")):
                self.is_target = self.is_target | _masked_starts(self.sequence, self.is_target)
        self.sequences = int(self.sequence[-1]) + 1

    def hidden(self, *, keep: bool = False) -> Tensor:
        """Run the backbone once and return its last hidden states at `rows`, (n, d); see `Batch`."""
        if not (keep and self.reuse and self.labeled.packed is not None):
            return self.labeled.hidden(self.backbone)
        memory, device = KeyMemory(), self.sequence.device
        before = random_states(device)
        hidden = self.labeled.hidden(self.backbone, key_memory=memory)
        # two passes agree only where nothing was drawn, by whatever module or function
        drew = random_states(device) != before
        # a model may keep the memory from its attention, or attend twice in one module
        seen = memory.filled_once == second_pass.layers_of(self.backbone)
        self.memory = memory if seen and not drew else None
        return hidden

    def second_pass(self, sequences: Tensor, *, in_full: bool = False) -> SecondPass:
        """Return the second pass; see `Batch`."""
        chosen = sequences[self.sequence[self.rows]].nonzero()[:, 0]
        rows = self.rows[chosen]
        if in_full or self.memory is None or not len(rows):
            return SecondPass(len(self.sequence), rows, chosen, lambda: self.labeled.hidden(self.backbone)[chosen])
        return second_pass.looking_back(self.backbone, self.labeled.inputs, self.memory, self.sequence, rows, chosen)

    def log_probs(self, hidden: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(label), entropy and whether the label is on top, each (n,); see `Batch`."""
        return self.head.log_probs(hidden, self._targets(chosen))

    def distilled(self, teacher: Tensor, student: Tensor, weights: Weights, chosen: Tensor | None = None) -> Distilled:
        """Return the fields of `distilled_log_probs`, each (n,); see `Batch`."""
        weight, head = self.head.linear.weight, self.head
        teacher, student = (hidden.to(weight.device, weight.dtype) for hidden in (teacher, student))
        bias, targets = head.linear.bias, self._targets(chosen)
        return distilled_log_probs(teacher, student, weight, bias, targets, weights, head.scale, head.softcap)

    def _targets(self, chosen: Tensor | None) -> Tensor:
        return self.labeled.targets if chosen is None else self.labeled.targets[chosen]


def _masked_starts(sequence: Tensor, learned: Tensor) -> Tensor:
    """Return (N,) the first tokens of sequences whose second is learned.

    In a padding-free row, collators mask all first tokens, which nothing predicts: that makes no prompt.
    """
    same = sequence[1:] == sequence[:-1]
    starts = torch.nn.functional.pad(~same, (1, 0), value=True)
    return starts & torch.nn.functional.pad(same & learned[1:], (0, 1))


def _sequences(inputs: dict[str, Any], shape: torch.Size, device: torch.device) -> Tensor:
    """Return (N,) the number of every token's sequence: its row, or what a padding-free batch says of its one row."""
    rows, length = shape
    tokens = torch.arange(rows * length, device=device)
    if inputs.get("attention_mask") is None:
        borders, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
        if borders is not None:
            return torch.bucketize(tokens, borders[1:].to(device), right=True)
        if positions is not None and positions.shape == shape:
            start = torch.ones(shape, dtype=torch.bool, device=device)
            start[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).to(device)
            return start.flatten().cumsum(0) - 1
    return tokens // length
