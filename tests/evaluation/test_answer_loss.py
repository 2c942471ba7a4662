"""The loss of an answer against a naive loop, and rows of both kinds measured together without being mixed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.data import Example
from loraplex.errors import UserError
from loraplex.evaluation.answer_loss import Loss, score_answer_loss
from loraplex.evaluation.options import score_options
from loraplex.training.measuring import items_of_accuracy, measure
from loraplex.training.recipe import EvaluationOptions

WITH_OPTIONS = [
    Example("the cat", " sat", (" sat on the mat", " ran"), 0, task="cats", source="f:1"),
    Example("the dog", " ran", (" rain", " ran"), 1, task="dogs", source="f:2"),
    Example("while", " the rain", (" it", " the rain"), 1, task="dogs", source="f:3"),
]
WITHOUT = [
    Example("the cat", " sat on the mat", task="sums", source="f:4"),
    Example("the dog ran over", " the hill while rain fell", task="sums", source="f:5"),
    Example("rain", " fell", task="words", source="f:6"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(0, 0.5)
    return model


def naive(model: Any, tokenizer: Any, example: Example) -> float:
    prompt, answer = (tokenizer(text)["input_ids"] for text in (example.prompt, example.completion))
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_the_loss_is_the_models_own_on_the_answer(model: Any, tokenizer: Any) -> None:
    scores = score_answer_loss(model, tokenizer, WITHOUT, batch_size=2)
    expected = [naive(model, tokenizer, example) for example in WITHOUT]
    assert [item.loss for item in scores.items] == pytest.approx(expected, rel=1e-5)
    assert list(scores.per_task) == ["sums", "words"]
    assert scores.per_task["sums"].value == pytest.approx(sum(expected[:2]) / 2)
    assert scores.overall.items == 3


def test_a_mean_has_its_standard_error() -> None:
    loss = Loss.of([1.0, 2.0, 6.0])
    assert (loss.value, loss.items) == (3.0, 3)
    assert loss.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert Loss.of([2.0]) == Loss(2.0, 0.0, 1)


def test_accuracy_is_that_of_the_rows_with_options_alone(model: Any, tokenizer: Any) -> None:
    rows = [WITHOUT[0], *WITH_OPTIONS, *WITHOUT[1:]]
    measured = measure(model, tokenizer, rows, EvaluationOptions())
    alone = score_options(model, tokenizer, WITH_OPTIONS)
    summary = measured.summary
    assert summary["kind"] == "mixed"
    assert (summary["items"], summary["value"]) == (3, alone.accuracies().overall.value)
    assert summary["per_task"].keys() == {"cats", "dogs"}
    assert summary["macro"]["value"] == alone.accuracies().macro.value
    loss = summary["answer_loss"]
    assert (loss["items"], list(loss["per_task"])) == (3, ["sums", "words"])
    assert loss["value"] == score_answer_loss(model, tokenizer, WITHOUT).overall.value
    assert sorted(record["source"] for record in measured.records) == [f"f:{n}" for n in range(1, 7)]
    assert [record["source"] for record in measured.records if "correct" in record] == ["f:1", "f:2", "f:3"]
    assert items_of_accuracy(rows, EvaluationOptions()) == 3
    for words in ("mean of 2 tasks", "answer loss", "on 3 items without options"):
        assert words in str(measured)


def test_rows_of_one_kind_are_measured_as_before(model: Any, tokenizer: Any) -> None:
    assert measure(model, tokenizer, WITH_OPTIONS, EvaluationOptions()).summary["kind"] == "choices"
    assert "answer_loss" not in measure(model, tokenizer, WITH_OPTIONS, EvaluationOptions(kind="mixed")).summary
    assert measure(model, tokenizer, WITHOUT, EvaluationOptions(max_new_tokens=2)).summary["kind"] == "generation"
    assert items_of_accuracy(WITHOUT, EvaluationOptions()) == 3


def test_what_cannot_be_measured(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="is 'mixed', but none of the 3 rows has options: set it to generation"):
        measure(model, tokenizer, WITHOUT, EvaluationOptions(kind="mixed"))
    with pytest.raises(UserError, match="f:9: the right answer is empty"):
        score_answer_loss(model, tokenizer, [Example("the", "", source="f:9")])
    with pytest.raises(UserError, match="f:4: option scoring needs choices"):
        measure(model, tokenizer, [*WITH_OPTIONS, *WITHOUT], EvaluationOptions(kind="choices"))
