"""The recipe: what to train, on what, how and where to, as frozen dataclasses. One doc line per field.

The `adapter` section is an `AdapterConfig`, whose own fields are its keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from loraplex.data import DataOptions
from loraplex.errors import UserError

if TYPE_CHECKING:
    from loraplex.tuner.config import AdapterConfig
else:
    # pydantic looks at the types; this one costs torch, which no help page needs, and is checked where it is made
    AdapterConfig = Any

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What a section given as a plain value means: `model: gpt2` is `model: {name: gpt2}`. The others have no such form.
SHORT_FORMS = {"data": "train", "model": "name", "adapter": "adapter"}


@dataclass(frozen=True)
class ModelOptions:
    """The frozen base model."""

    name: str = "embedded"
    """A hub id, a folder, "embedded" (SmolLM2-135M-Instruct) or "minilm" (the encoder all-MiniLM-L6-v2), both from the
    package index."""
    dtype: Literal["bfloat16", "float32", "auto"] | None = None
    """Of the frozen weights; "auto" is what the checkpoint says. Unset, bfloat16, or float32 under a classification
    head. Adapters are float32."""
    head: Literal["language", "classification"] = "language"
    """"classification" puts a fresh head for the classes in `data.choices` on the model, trained with the adapter."""

    def __post_init__(self) -> None:
        """Settle the data type."""
        if self.dtype is None:
            object.__setattr__(self, "dtype", "float32" if self.classifies else "bfloat16")

    @property
    def classifies(self) -> bool:
        """Whether the model has a classification head, which says nothing before it is trained."""
        return self.head == "classification"


@dataclass(frozen=True)
class TrainingOptions:
    """How long, how fast and how carefully to train."""

    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    epochs: Positive = 1.0
    """Passes over the training rows, unless `max_steps` is given."""
    max_steps: Count | None = None
    """Optimizer steps; overrules `epochs`."""
    batch_size: Count = 8
    """Rows per forward pass and device."""
    gradient_accumulation: Count = 1
    """Forward passes per optimizer step."""
    schedule: str = "linear"
    """Learning rate after the warm-up: linear, cosine, constant_with_warmup, or another name of transformers."""
    warmup: NotNegative = 0.05
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    optimizer: str = "adamw_torch"
    """A name of transformers' optimizers."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay on the adapter."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    max_length: Count | None = 512
    """Tokens per training row; longer rows lose their end, rows that lose their whole completion are dropped and
    counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are learned; a classification head learns a class per row."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    autocast: bool = False
    """Run the forward pass under bfloat16 autocast; of use where `model.dtype` is float32."""
    validation_rows: Annotated[int, Field(ge=0)] = 0
    """Training rows held out for `eval_every` and `load_best`; never test items."""
    eval_every: Count | None = None
    """Steps between validation losses."""
    load_best: bool = False
    """End with the checkpoint of the lowest validation loss instead of the last one."""
    save_every: Count | None = None
    """Steps between checkpoints; unset, only the end of training (or Ctrl-C) writes one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Older checkpoints are deleted. At least 2, so that a crash while writing one leaves the other."""
    logging_every: Count = 1
    """Steps between entries of the loss history."""
    trainer_args: dict[str, Any] = field(default_factory=dict)
    """Any other argument of TRL's SFTConfig (of TrainingArguments under a classification head), by its own name."""

    def __post_init__(self) -> None:
        """Check what one field asks of another."""
        if (self.eval_every or self.load_best) and not self.validation_rows:
            asking = "eval_every" if self.eval_every else "load_best"
            raise UserError(f"training.{asking} needs rows to validate on: set training.validation_rows above 0")
        if self.load_best and not self.eval_every:
            raise UserError("training.load_best needs training.eval_every: nothing is validated without")


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured on the test rows, before and after training."""

    kind: Literal["auto", "choices", "mixed", "generation", "labels", "none"] = "auto"
    """Option log-likelihood, the same with the loss of the answer for rows without options ("mixed"), exact match of a
    greedy answer, or its first label (LLM-Adapters); "auto": by the rows. A classification head gives its class."""
    normalize: Literal["sum", "characters"] = "sum"
    """Which option log-likelihood decides: summed, or divided by the option's characters."""
    rows: Literal["test", "validation"] = "test"
    """Which rows: the test rows, or the training rows held out as `training.validation_rows`."""
    before: bool = True
    """Measure the base model too, unless its head is fresh."""
    batch_size: Count = 16
    """Test rows per forward pass."""
    max_new_tokens: Count | None = None
    """Tokens to generate per test row at most; unset, a little more than the longest right answer."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run."""

    output: str
    """The run folder."""
    data: DataOptions = field(default_factory=DataOptions)
    """What to train and test on."""
    model: ModelOptions = ModelOptions()
    """The frozen base model."""
    adapter: AdapterConfig | None = None
    """Fields of loraplex.AdapterConfig by name; `adapter: dora` is short for `adapter: {adapter: dora}`. Without
    target_modules all linear layers are adapted; without a seed the adapter has the recipe's."""
    peft: dict[str, Any] = field(default_factory=dict)
    """A configuration of stock PEFT instead of `adapter`, by its own names: {peft_type: LORA, r: 8}."""
    training: TrainingOptions = TrainingOptions()
    """How long, how fast and how carefully to train."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """What is measured on the test rows."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of adapter initialization, row order and dropout."""

    @property
    def adapter_name(self) -> str:
        """What is trained, in a few words."""
        if self.peft:
            return f"PEFT {str(self.peft.get('peft_type', '')).upper()}"
        return "no adapter" if self.adapter is None else self.adapter.adapter.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of a classification head."""
        return tuple(choice.strip() for choice in self.data.choices) if self.model.classifies else ()

    def __post_init__(self) -> None:
        """Refuse two adapters, and what a head cannot do."""
        if self.adapter and self.peft:
            raise UserError("the recipe has both an adapter and a peft section: give one of them")
        if not self.model.classifies:
            if self.data.second is not None:
                raise UserError("data.second is for model.head classification; write both texts into data.prompt")
            return
        head = "model.head is classification"
        if not self.data.choices:
            raise UserError(f"{head}: name the classes in data.choices and the text in data.prompt")
        if len(set(self.classes)) < len(self.classes):
            raise UserError(f"{head}, but data.choices names a class twice: {', '.join(self.classes)}")
        if self.evaluation.kind in ("mixed", "generation", "labels"):
            raise UserError(f"{head}, which does not allow evaluation.kind {self.evaluation.kind}: leave it out")
        if self.training.loss_on != "completion":
            raise UserError(f"{head}, which learns classes, not tokens: leave training.loss_on out")
        if self.data.chat:
            raise UserError(f"{head}, which reads texts, not chats: leave data.chat out")
