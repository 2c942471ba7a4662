"""One job in a process of its own: python -m loraplex.comparison.worker KIND RECIPE FOLDER.

A process of its own keeps its memory's peak and its crashes to itself. It tells its progress on standard output, one
line per optimizer step, and ends when the process that started it is gone: its standard input closes then.
Everything heavy is imported here, once, before a fork server forks: see `fork_server.py`.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraplex.comparison.jobs import Kind
from loraplex.errors import UserError
from loraplex.models.loading import load_tokenizer
from loraplex.training import preparation
from loraplex.training.flops import flops_per_token
from loraplex.training.folder import RunFolder, write_json
from loraplex.training.measuring import measure
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe
from loraplex.training.run import train

# Starts a line of progress; whatever else is printed is for the log.
STEP = "@step"
INTERRUPTED = 130


class Announcing(TrainerCallback):
    """Writes a line of progress to standard output after every optimizer step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the number of optimizer steps that are done."""
        sys.stdout.write(f"{STEP} {state.global_step}\n")
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Do the job and return the exit status: 0, 1 for what the user can mend, 130 when interrupted."""
    kind, file, folder = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    recipe = replace(read_recipe(file), output=folder)
    try:
        DO[Kind(kind)](recipe)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _train(recipe: Recipe) -> None:
    started = RunFolder(recipe.output).recipe.is_file()
    train(recipe, resume=started, callbacks=[Announcing()], count_flops=True)


def _measure_base(recipe: Recipe) -> None:
    folder = RunFolder(recipe.output)
    tokenizer = load_tokenizer(recipe.model.name)
    rows = preparation.read_rows(recipe, tokenizer)
    model = preparation.load_base(recipe)
    measured = measure(model, tokenizer, rows.test, recipe.evaluation)
    measured.write(folder.evaluation / "after.jsonl")
    write_json(folder.metrics, {"accuracy": {"after": measured.summary}})


def _count_flops(recipe: Recipe) -> None:
    folder = RunFolder(recipe.output)
    folder.path.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(recipe.model.name)
    rows = preparation.read_rows(recipe, tokenizer)
    model = preparation.add_adapter(recipe, preparation.load_base(recipe))
    trainer = preparation.build_trainer(recipe, model, tokenizer, rows, folder.checkpoints)
    write_json(folder.metrics, {"flops_per_token": flops_per_token(trainer)})


DO = {Kind.TRAIN: _train, Kind.BASE: _measure_base, Kind.FLOPS: _count_flops}


def _end_with_parent() -> None:
    # Nothing is ever written to it: reading ends when the other side is closed, by whatever end the parent came to.
    # Not through sys.stdin: a buffer that is being read cannot be closed at exit.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
