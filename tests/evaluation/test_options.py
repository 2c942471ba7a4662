"""Option scoring against a naive loop over items, whatever side the tokenizer pads on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.data import Example
from loraplex.errors import UserError
from loraplex.evaluation.options import score_options
from loraplex.evaluation.results import write_records

EXAMPLES = [
    Example("the cat", " sat on the mat", (" sat on the mat", " ran"), 0, task="cats", source="f:1"),
    Example("the dog ran over", " the hill", (" rain", " the hill", " cat sat"), 1, task="dogs", source="f:2"),
    Example("while", " the rain fell", (" it", " the rain fell"), 1, task="cats", source="f:3"),
    Example("", " mat", (" cat", " mat"), 1, task="dogs", source="f:4"),
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    torch.manual_seed(0)
    # Sharper than a fresh model, so that options differ by more than rounding.
    model.lm_head.weight.data.normal_(0, 0.5)
    return model


def naive(model: Any, tokenizer: Any, example: Example) -> list[float]:
    assert isinstance(example.prompt, str)
    prompt = tokenizer(example.prompt)["input_ids"] or [tokenizer.eos_token_id]
    values = []
    for option in example.choices:
        total, ids = 0.0, list(prompt)
        for token in tokenizer(option)["input_ids"]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            total += float(logits[token] - logits.logsumexp(0))
            ids.append(token)
        values.append(total)
    return values


@pytest.mark.parametrize("side", ["left", "right"])
def test_options_are_scored_as_by_a_loop(model: Any, tokenizer: Any, side: str) -> None:
    tokenizer.padding_side = side
    scores = score_options(model, tokenizer, EXAMPLES, batch_size=3)
    for item, example in zip(scores.items, EXAMPLES, strict=True):
        expected = naive(model, tokenizer, example)
        assert item.log_probs == pytest.approx(expected, abs=1e-10)
        lengths = [len(option) - 1 for option in example.choices]
        per_character = [value / length for value, length in zip(expected, lengths, strict=True)]
        assert item.per_character == pytest.approx(per_character, abs=1e-10)
        assert item.chosen("sum") == expected.index(max(expected))
        assert item.chosen("characters") == per_character.index(max(per_character))
        assert (item.source, item.task, item.answer) == (example.source, example.task, example.answer)


def test_a_padding_token_that_is_the_end_token_changes_nothing(model: Any, tokenizer: Any) -> None:
    expected = score_options(model, tokenizer, EXAMPLES)
    tokenizer.pad_token = tokenizer.eos_token
    assert score_options(model, tokenizer, EXAMPLES) == expected


def test_both_ways_to_normalize_come_from_one_run(model: Any, tokenizer: Any) -> None:
    scores = score_options(model, tokenizer, EXAMPLES, normalize="characters")
    for way in ("sum", "characters"):
        right = [item.is_correct(way) for item in scores.items]
        assert scores.accuracies(way).overall.value == sum(right) / len(right)
        assert scores.accuracies(way).per_task["cats"].value == (right[0] + right[2]) / 2
    assert scores.accuracies() == scores.accuracies("characters")


def test_the_ways_can_disagree() -> None:
    from loraplex.evaluation.options import OptionItem

    item = OptionItem("f:1", "", (" ab", " abcdefgh"), 1, (-4.0, -8.0))
    assert item.per_character == (-2.0, -1.0)
    assert (item.chosen("sum"), item.chosen("characters")) == (0, 1)
    assert (item.is_correct("sum"), item.is_correct("characters")) == (False, True)


def test_records_are_json_lines(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    scores = score_options(model, tokenizer, EXAMPLES)
    write_records(tmp_path / "items.jsonl", scores.records())
    records = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [record["source"] for record in records] == ["f:1", "f:2", "f:3", "f:4"]
    for record, item in zip(records, scores.items, strict=True):
        assert record["log_probs"] == list(item.log_probs)
        assert record["correct"] == (record["chosen"] == record["answer"])
        assert all(math.isfinite(value) for value in record["per_character"])


def test_an_example_without_options_names_its_place(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^f:9: option scoring needs choices and an answer"):
        score_options(model, tokenizer, [*EXAMPLES, Example("a", "b", source="f:9")])


def test_an_unknown_way_names_the_nearest(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"normalize 'character' is unknown.*Did you mean 'characters'\?"):
        score_options(model, tokenizer, EXAMPLES, normalize="character")  # type: ignore[arg-type]
