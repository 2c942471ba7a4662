"""The data sections of the recipes that train on many tasks, read by themselves, and the published values."""

import collections
from pathlib import Path

import pytest

from loraplex import AdapterConfig, ALoRA, HeteroLoRA, HydraLoRA
from loraplex.data import Example, read_examples
from loraplex.data.sources import benchmark_root
from loraplex.training.preparation import adapter_config
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
needs_data = pytest.mark.skipif(benchmark_root() is None, reason="the benchmark sets are absent: set LORAPLEX_DATA")


def recipe(name: str) -> Recipe:
    return read_recipe(RECIPES / f"{name}.yaml")


def by_task(examples: list[Example]) -> dict[str, int]:
    return dict(collections.Counter(example.task for example in examples))


@needs_data
def test_eleven_tasks_are_trained_and_tested_on() -> None:
    data = recipe("hydra-multitask").data
    train, test = read_examples(data, "train"), read_examples(data, "test")
    assert len(train) == 1600
    assert set(by_task(test).values()) == {50}
    assert len(by_task(test)) == len(by_task(train)) == 11
    assert {example.task for example in test if not example.choices} == {"gsm8k"}
    # option texts, not labels
    science = next(example for example in test if example.task == "ARC-Easy")
    assert not any("answer1" in choice for choice in science.choices)


@needs_data
def test_big_bench_hard_is_split_by_item() -> None:
    data = recipe("hydra-bbh").data
    train, test = read_examples(data, "train"), read_examples(data, "test")
    assert len(train) == 1600
    assert len(by_task(train)) == len(by_task(test)) == 27
    assert set(by_task(test).values()) == {10}
    assert not {example.prompt for example in train} & {example.prompt for example in test}


def test_the_published_values_of_hydralora() -> None:
    read = recipe("hydra-llama2-7b")
    training = read.training
    assert read.model.name == "meta-llama/Llama-2-7b-hf"
    assert read.adapter == AdapterConfig(
        adapter=HydraLoRA(heads=4),
        r=4,
        lora_alpha=32,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        lora_dropout=0.05,
    )
    assert (training.learning_rate, training.schedule, training.warmup, training.weight_decay) == (
        2e-4,
        "cosine",
        0.03,
        0,
    )
    assert (training.epochs, training.batch_size, training.gradient_accumulation, training.max_length) == (
        1,
        1,
        8,
        1024,
    )
    assert (read.model.dtype, read.seed) == ("bfloat16", 41)


def test_the_published_values_of_heterolora() -> None:
    opt, llama = recipe("hetero-opt-350m"), recipe("hetero-llama2-7b")
    assert (opt.model.name, llama.model.name) == ("facebook/opt-350m", "meta-llama/Llama-2-7b-hf")
    for read, share, every in ((opt, 0.25, 0.2), (llama, 0.33, 0.25)):
        assert read.adapter.target_modules == {"q_proj", "v_proj"}
        allocation = adapter_config(read).allocation
        assert allocation == HeteroLoRA(share=share, interval=every)
        assert (allocation.proxy, allocation.unit, allocation.batches) == ("grad_norm", "modules", 32)
    assert [(read.adapter.r, read.adapter.lora_alpha) for read in (opt, llama)] == [(8, 16), (64, 16)]
    for read, rate in ((opt, 2e-4), (llama, 2e-5)):
        training = read.training
        assert (training.learning_rate, training.schedule, training.weight_decay) == (rate, "cosine", 0.01)
        assert (training.epochs, training.batch_size) == (20, 8)


def test_the_published_values_of_alora() -> None:
    read = recipe("alora-llama2-7b")
    allocation = adapter_config(read).allocation
    assert allocation == ALoRA(rounds=8, ranks_per_round=7, warmup_epochs=1.0, interval_epochs=0.25, batches=2)
    assert allocation.batches * read.training.batch_size == 32
    assert (read.adapter.r, len(read.adapter.target_modules)) == (8, 7)
    training = read.training
    assert (training.learning_rate, training.schedule, training.warmup) == (1e-4, "linear", 0.06)
    assert (training.epochs, training.max_length, training.eval_every) == (10, 2048, 200)
