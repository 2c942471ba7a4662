"""Built-in tasks: the procedural data sets of reasoning-gym, seeded, asked as a user's chat message.

Whether a question belongs to the test or to the training rows is a property of its text: a quarter of all possible
questions, chosen by a hash, is for tests only. So the two are disjoint whatever the seeds and sizes are, and an adapter
can be evaluated later without knowing how it was trained.
"""

from __future__ import annotations

import hashlib
from typing import Any

from loraplex.data.examples import Example, Message
from loraplex.data.options import Split
from loraplex.errors import UserError, nearest
from loraplex.extras import require

BUILTIN = "builtin:"
DEFAULT_ROWS = {"train": 1000, "test": 200}
# Draws after which a task is taken to have no more distinct questions; a test row needs 4 on average.
_MOST_DRAWS_PER_ROW = 16
_MOST_DRAWS_AT_LEAST = 100


def read_builtin(name: str, split: Split, count: int | None, seed: int) -> list[Example]:
    """Return `count` examples of the task `name` with distinct questions, the same ones for the same arguments.

    Raises:
        UserError: there is no such task, or it has fewer distinct questions.
    """
    wanted = DEFAULT_ROWS[split] if count is None else count
    # Some generators prepare all items when they are made, so an endless one is out.
    draws = wanted * _MOST_DRAWS_PER_ROW + _MOST_DRAWS_AT_LEAST
    dataset = _create(name, seed, draws)
    found: dict[str, Example] = {}
    for index in range(draws):
        item = dataset[index]
        question = item["question"].strip()
        if question not in found and split_of(question) == split:
            prompt = (Message("user", question),)
            source = f"{BUILTIN}{name}#{index}"
            found[question] = Example(prompt, _answer(item, source), task=name, source=source)
            if len(found) == wanted:
                return list(found.values())
    raise UserError(
        f"{BUILTIN}{name} has only {len(found)} distinct {split} questions, {wanted} were asked for; "
        f"set data.max_{split} to {len(found)} or less"
    )


def split_of(question: str) -> Split:
    """Return the split that `question` belongs to: "test" for a quarter of all questions, by the hash of the text."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 64 else "train"


def _create(name: str, seed: int, size: int) -> Any:
    require(f"{BUILTIN}{name}", "tasks")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    # `composite` mixes other tasks and cannot be made from its name alone.
    known = sorted(DATASETS.keys() - {"composite"})
    if name not in known:
        hint = nearest(name, known) or " The names are those of reasoning-gym, such as word_sequence_reversal."
        raise UserError(f"there is no built-in task '{name}'.{hint}")
    # reasoning-gym seeds item i with seed + i: neighbouring seeds would share almost all items.
    spread = int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:4])
    return reasoning_gym.create_dataset(name, size=size, seed=spread)


def _answer(item: dict[str, Any], source: str) -> str:
    answer = item["answer"]
    if answer is None:
        raise UserError(f"{source}: this task has no single right answer, so it cannot be learnt from examples")
    return str(answer)
