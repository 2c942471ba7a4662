"""Which rows are trained on and which are held out."""

import dataclasses
from pathlib import Path

from loraplex.training.preparation import training_examples
from loraplex.training.reading import read_recipe


def test_a_row_that_weights_take_twice_is_not_on_both_sides(tiny_recipe: Path) -> None:
    text = tiny_recipe.read_text().replace("test: ", "task: all, test: ")
    second = tiny_recipe.with_name("second.jsonl")
    second.write_text('{"prompt": "the", "completion": "cat", "task": "few"}\n' * 3)
    tiny_recipe.write_text(text)
    recipe = read_recipe(tiny_recipe, ["--training.validation_rows", "12"])
    sources = (str(tiny_recipe.with_name("rows.jsonl")), str(second))
    data = dataclasses.replace(recipe.data, train=sources, task_weights={"few": 8.0})
    train, held_out = training_examples(dataclasses.replace(recipe, data=data))
    few = [example for example in [*train, *held_out] if example.task == "few"]
    assert len({example.source for example in few}) < len(few)
    assert not {example.source for example in train} & {example.source for example in held_out}
    assert len(held_out) == 12
