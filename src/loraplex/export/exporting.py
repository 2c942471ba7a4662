"""One export: refuse what has no exact form, write, reload, compare, and only then put it in place."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loraplex.data import DataOptions, Example, read_examples
from loraplex.errors import UserError
from loraplex.export.card import CardFacts, is_export, write_card
from loraplex.export.history import read_history
from loraplex.export.pairs import open_shortcuts, site_ranks, trained_parameters
from loraplex.export.static_gates import (
    Approximation,
    StaticGates,
    fix_gates,
    of_task,
    refuse_static,
    static_config,
    tasks_of,
)
from loraplex.export.subject import ExportCandidate
from loraplex.export.target import Target, WriteOptions
from loraplex.export.targets import TARGETS, refusal
from loraplex.export.verification import TOLERANCE, check, read_prompts
from loraplex.files import fill_atomically, recover
from loraplex.models.agreement import Agreement, compare, model_logits
from loraplex.models.loading import load_config, load_model, load_tokenizer
from loraplex.tuner.adapted_model import adapt, adapter_folder, base_name
from loraplex.tuner.adapter_folder import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportRequest:
    """What to export to what, and how strictly."""

    adapter: str
    """An adapter folder, a run folder or a hub id."""
    to: str
    """A name of `TARGETS`."""
    output: Path
    model: str | None = None
    """Base model instead of the one that the adapter names."""
    dtype: str = "auto"
    """Of what is written; "auto" is float32, for `merged` that of the base model."""
    tolerance: float | None = None
    """Largest difference of a logit as a share of the largest logit; by data type when absent."""
    data: DataOptions | None = None
    """Rows to compare on instead of the built-in texts."""
    static: StaticGates | None = None
    """Fix the gates of a routed adapter, which has no exact form elsewhere, at their means over these rows."""
    dequantize: bool = False
    """For `merged`: merge into the dequantized weights of a quantized base."""
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    folder: Path
    notes: list[str]
    agreements: list[Agreement]
    approximation: Approximation | None = None
    """What was given up before the exact export, where it was asked for."""


def export(order: ExportRequest, say: Callable[[str, str], None] = lambda topic, text: None) -> Exported:
    """Export as ordered and return what came out; `say` is told (topic, text) on the way.

    Raises:
        UserError: when the adapter has no exact form there, with the reason and the alternatives, or the reloaded
            result differs by more than the tolerance. Nothing is then put in place.
    """
    target = TARGETS[order.to]
    check_output(order.output, order.overwrite)
    folder = adapter_folder(order.adapter)
    base = order.model or base_name(order.adapter)
    subject = ExportCandidate(read_config(folder), {}, load_config(base), order.dequantize)
    # before anything slow, and again when the sites are known
    _refuse(target, subject, order)
    tokenizer = load_tokenizer(base)
    held_out = _held_out(order)
    rows = read_prompts(tokenizer, held_out)
    calibration = order.static.examples() if order.static else []
    dtype = _dtype(target, order, subject.base)
    model = _load(base, folder, order.dequantize)
    subject = replace(subject, ranks=site_ranks(model), shortcuts=open_shortcuts(model))
    _refuse(target, subject, order)
    if not any(subject.ranks.values()):
        raise UserError(
            f"the adapter in '{folder}' has no open rank: it changes nothing, so there is nothing to export"
        )
    trained = trained_parameters(model)
    approximation = fix_gates(model, tokenizer, calibration, rows, held_out or ()) if order.static else None
    given_up = approximation.sentences() if approximation else []
    for sentence in given_up:
        say("fixed", sentence)
    before = model_logits(model, rows)
    tolerance = TOLERANCE[dtype] if order.tolerance is None else order.tolerance
    agreements: list[Agreement] = []
    notes: list[str] = []
    held = [model]
    del model

    def fill(temporary: Path) -> None:
        # the target may use the model up; only one is in memory when the result is reloaded
        notes.extend(target.write(held.pop(), temporary, WriteOptions(base, dtype)))
        for note in notes:
            say("written", note)
        gc.collect()
        for reader, after in target.reload(temporary, base, rows).items():
            agreements.append(compare(reader, before, after, tolerance))
            say("verified", str(agreements[-1]))
        check(agreements)
        history = read_history(folder)
        write_card(temporary, CardFacts(target, subject, base, history, trained, notes, agreements, given_up))

    fill_atomically(order.output, fill)
    return Exported(order.output, notes, agreements, approximation)


def export_per_task(
    order: ExportRequest, say: Callable[[str, str], None] = lambda topic, text: None
) -> dict[str, Exported]:
    """Export once per task of the calibration rows, each into a folder of its name in `order.output`.

    Rows to compare on are those of the same task, where they have one.

    Raises:
        UserError: as `export` does, and when a calibration row has no task.
    """
    assert order.static is not None
    folders = {task: re.sub(r"[^\w.-]+", "-", task).strip(".") for task in tasks_of(order.static)}
    if "" in folders.values() or len(set(folders.values())) < len(folders):
        raise UserError(f"the tasks {', '.join(map(repr, folders))} do not give different folders: rename them")
    for name in folders.values():
        check_output(order.output / name, order.overwrite)
    done = {}
    for task, name in folders.items():
        say("task", task)
        one = replace(order, output=order.output / name, static=replace(order.static, task=task))
        done[task] = export(one, say)
    return done


def _held_out(order: ExportRequest) -> list[Example] | None:
    """Return the rows to compare on, None for the built-in texts.

    Raises:
        UserError: when gates would be fixed on rows that they are then compared on.
    """
    if order.data is None:
        return None
    if order.static is None:
        return read_examples(order.data, "test")
    both = set(order.data.sources("test")) & set(order.static.data.sources("test"))
    if both:
        raise UserError(f"--data and --static-gates both name '{min(both)}': compare on rows not calibrated on")
    return of_task(read_examples(order.data, "test"), order.static.task, "held-out")


def default_output(adapter: str, to: str) -> Path:
    """Return FOLDER-TARGET beside a local folder, in the working directory for a hub id."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        path = path.resolve()
        return path.with_name(f"{path.name}-{to}")
    return Path(f"{path.name}-{to}")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is an earlier export and `overwrite` is set.

    Raises:
        UserError: when `output` is a file, or a folder with something else in it.
    """
    recover(output.resolve())
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file: give a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"output '{output}' is not empty: --overwrite replaces an earlier export, or name another")
    if not is_export(output):
        raise UserError(f"output '{output}' is not an earlier export, so it is not replaced: name another --output")


def _refuse(target: Target, subject: ExportCandidate, order: ExportRequest) -> None:
    reason = None
    if order.static is not None:
        reason = refuse_static(subject)
        subject = replace(subject, config=subject.config if reason else static_config(subject.config))
    reason = reason or refusal(target, subject)
    if reason is not None:
        raise UserError(f"no export of '{order.adapter}' to {target.name}: {reason}")


def _dtype(target: Target, order: ExportRequest, base: Any) -> torch.dtype:
    if order.dtype != "auto":
        return DTYPES[order.dtype]
    if target.dtype is not None:
        return target.dtype
    found = getattr(base.get_text_config(), "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype == found), torch.float32)


def _load(base: str, folder: Path, dequantize: bool) -> PeftModel:
    model: Any = load_model(base, "float32")
    if dequantize and getattr(model.config, "quantization_config", None) is not None:
        model = model.dequantize()
        torch.nn.Module.to(model, dtype=torch.float32)
    return adapt(model, folder)
