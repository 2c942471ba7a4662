"""The `data:` options refuse what cannot be meant."""

from typing import Any

import pytest

from loraplex.data import DataOptions
from loraplex.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "alpacca"}, "data.format 'alpacca' is unknown. Did you mean 'alpaca'?"),
        ({"format": "xyz"}, "Known are auto, completion"),
        ({"max_train": 0}, "data.max_train is 0"),
        ({"max_test": -3}, "data.max_test is -3"),
        ({"format": "template"}, "data.prompt is not set"),
        ({"format": "alpaca", "prompt": "{a}", "completion": "b"}, "data.format is 'alpaca'"),
        ({"prompt": "{a}"}, "needs either data.choices or data.completion"),
        ({"prompt": "{a}", "completion": "b", "choices": ("c", "d")}, "and not both"),
        ({"choices": ("c", "d")}, "need data.prompt"),
        ({"prompt": "{a}", "choices": ("c",)}, "only one option, 'c'"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        DataOptions(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_source(split: Any) -> None:
    with pytest.raises(UserError, match=rf"data\.{split} is not set"):
        DataOptions().sources(split)
