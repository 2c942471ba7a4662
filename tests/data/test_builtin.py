"""Built-in tasks: disjoint by construction, seeded, and asked as a chat."""

import subprocess
import sys

import pytest

from loraplex.data import DataOptions, Message, read_examples
from loraplex.data.builtin import read_builtin, split_of
from loraplex.errors import UserError

TASKS = ["word_sequence_reversal", "family_relationships", "syllogism"]


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_question_whatever_the_seed(task: str) -> None:
    train = {example.prompt for seed in range(3) for example in read_builtin(task, "train", 100, seed)}
    test = {example.prompt for seed in range(3) for example in read_builtin(task, "test", 100, seed)}
    assert not train & test
    assert len(train) > 250
    assert len(test) > 250


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_makes_the_same_rows(task: str) -> None:
    first, again, other = (read_builtin(task, "train", 50, seed) for seed in (7, 7, 8))
    assert first == again
    # reasoning-gym's own neighbouring seeds share all items but one.
    assert len({example.prompt for example in first} & {example.prompt for example in other}) < 10


def test_rows_are_chats_with_distinct_questions() -> None:
    examples = read_examples(DataOptions(test="builtin:syllogism", max_test=60), "test")
    assert len({example.prompt for example in examples}) == len(examples) == 60
    for example in examples:
        (message,) = example.prompt
        assert isinstance(message, Message)
        assert message.role == "user"
        assert split_of(message.content) == "test"
        assert example.completion in ("Yes", "No")
        assert (example.task, example.choices) == ("syllogism", ())


def test_a_quarter_of_all_questions_is_for_tests() -> None:
    share = sum(split_of(str(number)) == "test" for number in range(4000)) / 4000
    assert 0.22 < share < 0.28


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no built-in task 'syllogysm'\. Did you mean 'syllogism'\?"):
        read_examples(DataOptions(train="builtin:syllogysm"), "train")


def test_a_small_task_says_how_many_rows_it_has() -> None:
    with pytest.raises(UserError, match=r"builtin:coin_flip has only \d+ distinct test questions, 5000 were asked"):
        read_builtin("coin_flip", "test", 5000, 0)


def test_reading_data_needs_no_torch() -> None:
    script = (
        "import sys; from loraplex.data import DataOptions, read_examples;"
        "read_examples(DataOptions(train='builtin:syllogism', max_train=5), 'train'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
