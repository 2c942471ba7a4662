"""The bridge to EleutherAI's lm-evaluation-harness, an optional package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from loraplex.errors import UserError, nearest
from loraplex.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    task_folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the harness's metrics for each of `tasks`, under its own names; a standard error is `<metric>_stderr`.

    `limit` is the number of items of each task; `task_folder` holds further task files (YAML).

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data cannot be fetched.
    """
    require("--lm-eval", "eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    for task in tasks:
        if task not in manager.all_tasks:
            hint = nearest(task, manager.all_tasks) or " 'lm_eval ls tasks' lists them all."
            raise UserError(f"lm-eval has no task '{task}'.{hint}")
    try:
        evaluated = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
        )
    # No network, or a data set that is gone: the task names are good by now.
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lm-eval cannot fetch the data of {', '.join(tasks)}: {reason}") from error
    results: dict[str, dict[str, Any]] = evaluated["results"]
    return results
