"""One group of prompts: every row is in one group, the one of its topic, whether it trains, validates or tests."""

import json
from pathlib import Path

import pytest
from tests.data.topics import prompts

from loraplex.errors import UserError
from loraplex.models.loading import load_tokenizer
from loraplex.training.grouping import find_groups, group_sizes
from loraplex.training.preparation import read_rows, training_examples
from loraplex.training.reading import recipe_from_mapping
from loraplex.training.recipe import Recipe


def write(path: Path, seed: int, each: int) -> dict[str, int]:
    """Write rows on three topics and return the topic of each prompt."""
    texts, topics = prompts(3, each=each, seed=seed)
    rows = [{"question": text, "choices": ["cat", "dog"], "answer": 0} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(zip(texts, topics, strict=True))


def recipe(folder: Path, **data: object) -> Recipe:
    sources = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    mapping = {"output": "run", "data": {**sources, **data}, "training": {"validation_rows": 15}}
    return recipe_from_mapping(mapping)


def test_the_groups_divide_all_rows_by_topic(tmp_path: Path, tiny_model: Path) -> None:
    topics = {**write(tmp_path / "train.jsonl", 0, 40), **write(tmp_path / "test.jsonl", 1, 10)}
    tokenizer = load_tokenizer(str(tiny_model))
    whole = recipe(tmp_path)
    train, validation = training_examples(whole)
    found = [recipe(tmp_path, group=f"{group}/3") for group in (1, 2, 3)]
    kept = [training_examples(one) for one in found]
    tests = [read_rows(one, tokenizer).test for one in found]
    assert sorted(row.source for rows, _ in kept for row in rows) == sorted(row.source for row in train)
    assert sorted(row.source for _, rows in kept for row in rows) == sorted(row.source for row in validation)
    assert sorted(row.source for rows in tests for row in rows) == sorted(
        row.source for row in read_rows(whole, tokenizer).test
    )
    for (rows, held_out), test in zip(kept, tests, strict=True):
        everything = [*rows, *held_out, *test]
        assert len({next(topics[text] for text in topics if text in row.asked) for row in everything}) == 1
        assert len(rows) > 30
    assert group_sizes(find_groups(train, 3, seed=0), train) == [len(rows) for rows, _ in kept]
    suggested = find_groups(train, None, seed=0)
    assert suggested.number == 3
    assert group_sizes(suggested, train) == [len(rows) for rows, _ in kept]


@pytest.mark.parametrize("text", ["4/3", "0/3", "1", "1/1", "a/3", "2 of 3"])
def test_a_group_that_makes_no_sense_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"data.group is '{text}'; write the group and the number of groups"):
        recipe(tmp_path, group=text)
