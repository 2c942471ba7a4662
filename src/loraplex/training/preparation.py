"""The pieces of a run, each usable alone: adapter config, rows, adapted model, trainer. `run.py` puts them together."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from loraplex.adapters.contracts import Settled, SettlesFromData
from loraplex.adapters.registry import Adapter, Deployed
from loraplex.data import ClassRows, Example, Tokenized, read_examples, tokenize_once, tokenize_texts
from loraplex.errors import UserError
from loraplex.methods import REGISTRY
from loraplex.models.classifier import HEADS, classifier_from_config, load_classifier
from loraplex.models.loading import load_model
from loraplex.training.arguments import trainer_arguments
from loraplex.training.grouping import of_one_group
from loraplex.training.reading import adapter_names
from loraplex.training.recipe import Recipe
from loraplex.training.stock import Allocating, allocates, stock_config
from loraplex.training.trainer import ClassifierTrainer, FiniteWatch, RunTrainer, Sealing, WatchedTrainer
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.labeled import IGNORED


@dataclass(frozen=True)
class Rows:
    """The rows of a run, tokenized for training, as text for evaluation."""

    train: Tokenized | ClassRows
    validation: Tokenized | ClassRows | None
    test: list[Example]


def adapter_config(recipe: Recipe) -> PeftConfig:
    """Return the config of the recipe's adapter section; all linear layers and the recipe's seed where it is silent.

    A recipe with a `peft` section gets that config of stock PEFT.

    Raises:
        UserError: for values and combinations that loraplex or PEFT refuses.
    """
    task_type = "SEQ_CLS" if recipe.model.classifies else "CAUSAL_LM"
    if recipe.peft:
        return stock_config(recipe.peft, recipe.training.max_steps, task_type)
    config = AdapterConfig(**_adapter_section(recipe), task_type=task_type)
    # one that is attached while training, and so a language model's
    if recipe.model.classifies and REGISTRY.of_options(config.typed_objective).deployed is Deployed.OWN:
        raise UserError(
            f"objective {config.objective!r} computes the loss of tokens, model.head classification has the loss of "
            "classes: leave adapter.objective out"
        )
    return config


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with every field of the adapter section spelled out."""
    names = adapter_names()
    config = adapter_config(recipe)
    if not isinstance(config, AdapterConfig):
        return recipe
    written: dict[str, Any] = {}
    for entry in fields(AdapterConfig):
        if entry.name in names:
            value = getattr(config, entry.name)
            written[entry.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    # Still the recipe's own seed, so that --seed changes it in the resolved recipe too.
    written["seed"] = recipe.adapter.get("seed")
    return replace(recipe, adapter=written)


def settle(recipe: Recipe) -> tuple[Recipe, list[Settled]]:
    """Return the recipe with the adapter options decided that are left to the training rows, and how that went.

    The rows are read only where an option is open; those held out for validation have no part in it. A plan that the
    recipe gives as a file is read once and stands in the recipe from then on.

    Raises:
        UserError: for data that are missing, broken, or too few to decide by.
    """
    config = adapter_config(recipe)
    if not isinstance(config, AdapterConfig):
        return recipe, []
    if config.typed_allocation.given is not None:
        recipe = replace(recipe, adapter={**recipe.adapter, "allocation": config.allocation})
    adapter, decided = config.typed_adapter, []
    parts = {"factors": adapter.factors, "combine": adapter.combine}

    @functools.cache
    def texts() -> list[str]:
        return [example.asked for example in training_examples(recipe)[0]]

    for name, options in parts.items():
        if isinstance(options, SettlesFromData) and (found := options.settle(texts, recipe.data.seed)) is not None:
            parts[name] = found.options
            decided.append(found)
    if not decided:
        return recipe, []
    return replace(recipe, adapter={**recipe.adapter, "adapter": Adapter(**parts).describe()}), decided


def _adapter_section(recipe: Recipe) -> dict[str, Any]:
    given = {name: value for name, value in recipe.adapter.items() if value is not None}
    return {"target_modules": "all-linear", "seed": recipe.seed, **given}


def read_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Return training, validation and test rows as the recipe says.

    Raises:
        UserError: for data that is missing, broken, empty or cut away entirely.
    """
    examples, held_out = _divided(recipe)
    test = _rows_to_measure(recipe, held_out)
    if recipe.data.group is not None:
        examples, held_out, test = of_one_group(recipe.data, examples, held_out, test)
    if recipe.evaluation.rows == "validation" and not held_out:
        raise UserError("evaluation.rows is 'validation', but no row is held out: set training.validation_rows above 0")
    return Rows(
        train=_tokenized(recipe, examples, tokenizer),
        validation=_tokenized(recipe, held_out, tokenizer) if held_out else None,
        test=test,
    )


def _tokenized(recipe: Recipe, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Tokenized | ClassRows:
    options = recipe.training
    if recipe.model.classifies:
        return tokenize_texts(examples, tokenizer, recipe.classes, options.max_length)
    return tokenize_once(examples, tokenizer, options.max_length, options.loss_on)


def training_examples(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Return the rows to train on and those held out for validation.

    Raises:
        UserError: for data that are missing, broken or empty, or when none would be left to train on.
    """
    examples, held_out = _divided(recipe)
    if recipe.data.group is not None:
        examples, held_out, _ = of_one_group(recipe.data, examples, held_out, [])
    return examples, held_out


def _divided(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    options = recipe.training
    examples = read_examples(recipe.data, "train")
    held_out: list[Example] = []
    if options.validation_rows:
        if options.validation_rows >= len(examples):
            raise UserError(
                f"training.validation_rows is {options.validation_rows} of {len(examples)} training rows: "
                "none would be left to train on"
            )
        chosen = set(random.Random(recipe.data.seed).sample(range(len(examples)), options.validation_rows))
        held_out = [example for index, example in enumerate(examples) if index in chosen]
        # Weights may have taken a row more than once.
        sources = {example.source for example in held_out}
        examples = [example for example in examples if example.source not in sources]
    return examples, held_out


def _rows_to_measure(recipe: Recipe, held_out: list[Example]) -> list[Example]:
    if recipe.evaluation.kind == "none":
        return []
    if recipe.evaluation.rows == "validation":
        return held_out
    return read_examples(recipe.data, "test") if recipe.data.has_test else []


def load_base(recipe: Recipe, head_seed: int | None = None) -> PreTrainedModel:
    """Return the recipe's base model; a fresh classification head is drawn by `head_seed`, else by the recipe's seed.

    Raises:
        UserError: when there is no such model, or it cannot be read.
    """
    options = recipe.model
    assert options.dtype is not None
    if not options.classifies:
        return load_model(options.name, options.dtype)
    return load_classifier(options.name, recipe.classes, options.dtype, recipe.seed if head_seed is None else head_seed)


def random_base(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of the recipe's kind with random weights."""
    if recipe.model.classifies:
        return classifier_from_config(config, recipe.classes, dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def add_adapter(recipe: Recipe, base: PreTrainedModel) -> PeftModel:
    """Return `base` with a fresh adapter; the same for the same seed, whatever was drawn before.

    Raises:
        UserError: for a stock adapter that leaves a fresh classification head untrained.
    """
    set_seed(recipe.seed)
    model = get_peft_model(base, adapter_config(recipe))
    assert isinstance(model, PeftModel)
    if recipe.model.classifies and not head_size(model):
        raise UserError(f"{recipe.adapter_name} does not train a classification head: choose another adapter")
    return model


def head_size(model: PeftModel) -> int:
    """Return how many trained parameters belong to a classification head; the same for every adapter."""
    parts = [f".{head}.modules_to_save." for head in HEADS]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return sum(parameter.numel() for name, parameter in trained if any(part in name for part in parts))


def build_trainer(
    recipe: Recipe, model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, checkpoints: Path
) -> WatchedTrainer:
    """Return the trainer of a recipe over a model with an adapter; checkpoints go to the folder `checkpoints`."""
    common: dict[str, Any] = {
        "model": model,
        "args": trainer_arguments(recipe, checkpoints),
        "train_dataset": _dataset(rows.train),
        "eval_dataset": _dataset(rows.validation) if rows.validation else None,
        "processing_class": tokenizer,
        "callbacks": [FiniteWatch(), Sealing(), *([Allocating()] if allocates(model) else [])],
    }
    if recipe.model.classifies:
        return ClassifierTrainer(**common, data_collator=DataCollatorWithPadding(tokenizer))
    return RunTrainer(**common)


def _dataset(tokenized: Tokenized | ClassRows) -> Dataset:
    """Return the rows with labels, as SFTTrainer takes them without touching them again."""
    if isinstance(tokenized, ClassRows):
        return Dataset.from_list([dict(row) for row in tokenized.rows])
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in tokenized.rows:
        columns["input_ids"].append(row["input_ids"])
        labels = zip(row["input_ids"], row["completion_mask"], strict=True)
        columns["labels"].append([token if learned else IGNORED for token, learned in labels])
    return Dataset.from_dict(columns)
