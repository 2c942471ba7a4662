"""One run from recipe to run folder: what `loraplex train` does, as a function."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.training.folder import RunFolder, write_json
from loraplex.training.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from loraplex.adapters.contracts import Settled
    from loraplex.allocation.plan import Plan
    from loraplex.analysis.routing import RoutingWatch
    from loraplex.training.measuring import Measured
    from loraplex.training.preparation import Rows
    from loraplex.training.trainer import WatchedTrainer


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    adapter: Path
    """Loads with `PeftModel.from_pretrained(base, adapter)`."""
    metrics: dict[str, Any]
    """What metrics.json holds."""


@dataclass
class _Run:
    """A run in progress."""

    recipe: Recipe
    folder: RunFolder
    say: Callable[[str, str], None]
    progress: bool
    callbacks: Sequence[TrainerCallback]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str, str], None] = lambda topic, text: None,
    progress: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    count_flops: bool = False,
) -> RunResult:
    """Train as the recipe says and return what came out; everything is in the folder `recipe.output`.

    `resume` goes on from the last whole checkpoint, to the bit-equal result of an uninterrupted run; `overwrite`
    replaces an earlier run. `say` is told (topic, text) as the run proceeds, `progress` shows bars, `callbacks` join
    those of the trainer, `count_flops` adds the operations per token to the metrics (it costs a step).

    Raises:
        UserError: for whatever the user can mend, before anything is lost.
        TrainingInterrupted: on Ctrl-C, after the state of training has been saved.
    """
    # Usage statistics are the user's to give.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from loraplex.models.loading import load_tokenizer
    from loraplex.training import preparation
    from loraplex.training.arguments import trainer_arguments
    from loraplex.training.base_model import describe_base
    from loraplex.training.flops import flops_per_token
    from loraplex.training.memory import start_peak

    recipe, settled = _settle(preparation.resolve(recipe), resume, overwrite, say)
    run = _Run(recipe, RunFolder(recipe.output), say, progress, callbacks)
    # Names and values first: they cost nothing, the model does.
    trainer_arguments(recipe, run.folder.checkpoints)
    with run.timed("data"):
        tokenizer = load_tokenizer(recipe.model.name)
        rows = preparation.read_rows(recipe, tokenizer)
    say("rows", _rows_line(rows))
    with run.timed("loading"):
        base = preparation.load_base(recipe)
    identity = describe_base(base, recipe.model.name)
    resident = start_peak()
    model = preparation.add_adapter(recipe, base)
    trainer = preparation.build_trainer(recipe, model, tokenizer, rows, run.folder.checkpoints)
    run.folder.open(recipe, resume=resume)
    if settled:
        write_json(run.folder.settled, [choice.evidence for choice in settled])
    parameters = _parameters(model)
    say("adapter", _parameters_line(model, parameters))
    before = _measure_before(run, model, tokenizer, rows)
    # An objective is gone after training, so is what its steps cost.
    operations = flops_per_token(trainer) if count_flops and _has_objective(model) else None
    memory = {"resident_before_bytes": start_peak(), "resident_after_loading_bytes": resident}
    trained = _fit(run, trainer, resume)
    memory["peak_bytes"] = trained.pop("peak_bytes")
    if count_flops and operations is None:
        operations = flops_per_token(trainer)
    reloaded, reload = _save(run, model, rows, identity)
    parameters["deployed"] = _deployed(run, model)
    if trained["allocation"]:
        _draw_ranks(run, _plan(model), trained["allocation"])
    after = _measure(run, "after", reloaded, tokenizer, rows)
    routing = _write_routing(run, reloaded, tokenizer, rows, trainer)
    metrics = {
        **trained,
        "accuracy": {"before": before.summary if before else None, "after": after.summary if after else None},
        "parameters": parameters,
        "rows": _row_counts(rows),
        "memory": memory,
        "flops_per_token": operations,
        **({"routing": routing} if routing else {}),
        "seconds": run.seconds,
        "reload": reload,
        "base_model": identity,
    }
    _write_reports(run, metrics)
    return RunResult(run.folder.path, run.folder.adapter, metrics)


def _settle(
    recipe: Recipe, resume: bool, overwrite: bool, say: Callable[[str, str], None]
) -> tuple[Recipe, list[Settled]]:
    """Check the folder, and return the recipe with what is left to the training rows decided, and how that went."""
    from loraplex.training import preparation

    folder = RunFolder(recipe.output)
    if not resume:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    recipe, settled = preparation.settle(recipe)
    for choice in settled:
        say("settled", choice.summary)
    # What is resumed has the recipe that the rows have settled.
    if resume:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    return recipe, settled


def _fit(run: _Run, trainer: WatchedTrainer, resume: bool) -> dict[str, Any]:
    """Train and return the losses and the speed; stop where numbers or the user say so."""
    from transformers import set_seed

    from loraplex.training.energy import energy_estimated
    from loraplex.training.memory import peak
    from loraplex.training.report import split_history
    from loraplex.training.trainer import Clock, DivergedError, Interruption, ProgressBar, TrainingInterrupted
    from loraplex.tuner.allocation_callback import decisions

    checkpoint = run.folder.last_checkpoint() if resume else None
    if checkpoint is not None and _is_last(checkpoint):
        # Everything was trained; only what came after is missing. Retrace the last stretch instead.
        checkpoint = run.folder.last_checkpoint(before_step=int(checkpoint.name.rpartition("-")[2]))
    if resume:
        run.say("resume", f"from {checkpoint}" if checkpoint else "no checkpoint was written yet, from the start")
    interruption, clock = Interruption(), Clock()
    for callback in (interruption, clock, *([ProgressBar()] if run.progress else []), *run.callbacks):
        trainer.add_callback(callback)
    set_seed(run.recipe.seed)
    watch = _watch_routing(trainer)
    try:
        with energy_estimated() as energy, run.timed("training"), interruption:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except DivergedError as error:
        kept = run.folder.last_checkpoint()
        where = f"the last good checkpoint is '{kept}'" if kept else "no checkpoint was due before"
        raise DivergedError(f"{error}; {where}; lower training.learning_rate or look at the data") from error
    watch.stop()
    # Accelerate leaves autocast around the forward pass; from here on the model computes what the saved one does.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    state = trainer.state
    if interruption.asked and state.global_step < state.max_steps:
        raise TrainingInterrupted(
            f"stopped after step {state.global_step} of {state.max_steps}, checkpoint saved; go on with --resume"
        )
    losses, validation = split_history(state.log_history)
    best = state.best_model_checkpoint if run.recipe.training.load_best else None
    step_seconds = sum(clock.seconds)
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "loss": losses,
        "validation": validation,
        "best_checkpoint": Path(best).name if best else None,
        "speed": {
            "steps": len(clock.seconds),
            "tokens": trainer.tokens,
            "tokens_per_second": round(trainer.tokens / step_seconds, 1),
            "seconds_per_step": round(step_seconds / len(clock.seconds), 4),
        },
        "allocation": decisions(state.log_history),
        "peak_bytes": peak(),
        "energy_kwh": energy.kwh,
    }


def _has_objective(model: PeftModel) -> bool:
    from loraplex.tuner.model import LoraplexTuner

    return isinstance(model.base_model, LoraplexTuner) and bool(model.base_model.objectives())


def _is_last(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"]) >= int(state["max_steps"])


def _save(run: _Run, model: PeftModel, rows: Rows, identity: dict[str, Any]) -> tuple[PeftModel, dict[str, Any]]:
    """Write plan and adapter and return the adapter as it was read back."""
    from torch.nn import Module

    from loraplex.training.preparation import load_base
    from loraplex.training.saving import save_checked

    if _is_ours(model):
        _plan(model).save(run.folder.plan)
    token_ids = [row["input_ids"] for row in rows.train.rows]

    def fresh_base() -> PreTrainedModel:
        # another fresh head than the run's: one that was not saved would show
        base = load_base(run.recipe, head_seed=run.recipe.seed + 1)
        Module.to(base, model.device)
        return base

    with run.timed("saving"):
        reloaded, reload = save_checked(model, run.folder.adapter, token_ids, identity, fresh_base)
    run.say("saved", f"{run.folder.adapter}, reloaded and compared on {reload.rows} rows: {reload}")
    return reloaded, asdict(reload)


def _measure_before(run: _Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Measured | None:
    if not run.recipe.evaluation.before or run.recipe.model.classifies:
        return None
    # The adapter is off, which is the base model bit for bit.
    with model.disable_adapter():
        return _measure(run, "before", model, tokenizer, rows)


def _measure(run: _Run, when: str, model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Measured | None:
    """Measure on the test rows, keep every item in a file, and say the accuracy."""
    if not rows.test:
        return None
    from loraplex.training.measuring import measure

    with run.timed(f"evaluation_{when}"):
        measured = measure(model, tokenizer, rows.test, run.recipe.evaluation, run.progress)
    measured.write(run.folder.evaluation / f"{when}.jsonl")
    run.say(when, str(measured))
    return measured


def _watch_routing(trainer: WatchedTrainer) -> RoutingWatch:
    """Let the trainer log the gates of a routed adapter; one that routes nothing has nothing to watch."""
    from loraplex.analysis.routing import RoutingWatch

    watch = RoutingWatch(trainer.accelerator.unwrap_model(trainer.model))
    trainer.routing = watch if watch.records else None
    return watch


def _write_routing(
    run: _Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, trainer: WatchedTrainer
) -> dict[str, float] | None:
    """Write how the finished adapter routes its rows and return the overview; None where it routes nothing."""
    from loraplex.training.routing import routed_rows, write_routing

    if trainer.routing is None:
        return None
    title = f"{run.recipe.adapter_name} on {run.recipe.model.name}"
    with run.timed("routing"):
        chosen = routed_rows(run.recipe, rows, tokenizer)
        return write_routing(run.folder, model, chosen, trainer.state.log_history, title)


def _write_reports(run: _Run, metrics: dict[str, Any]) -> None:
    from loraplex.training.report import draw_loss, environment

    write_json(run.folder.environment, environment())
    if metrics["loss"]:
        title = f"{run.recipe.adapter_name} on {run.recipe.model.name}"
        speed = metrics["speed"]
        subtitle = f"{metrics['steps']} steps, {speed['tokens_per_second']:.0f} tokens/s"
        learned = "row" if run.recipe.model.classifies else "token"
        draw_loss(run.folder.plot, metrics["loss"], metrics["validation"], title, subtitle, learned)
    # Last: a run with metrics is a finished run.
    write_json(run.folder.metrics, metrics)


def _draw_ranks(run: _Run, plan: Plan, decisions: Sequence[Mapping[str, Any]]) -> None:
    """Draw the ranks that an allocation has ended with, and say what it spent."""
    from loraplex.analysis.rank_map import draw_ranks

    last = decisions[-1]
    spent = "{spent:,} of {amount:,} {unit}".format(spent=last["spent"], **last["budget"])
    title = f"{run.recipe.adapter_name} on {run.recipe.model.name}: ranks decided at step {last['step']}"
    draw_ranks(run.folder.ranks_plot, plan.ranks, title, f"{spent}, {last['unspent']:,} unspent")
    remark = f"; {last['remark']}" if last["remark"] else ""
    adapted = f"{len(plan.adapted)} of {len(plan.ranks)} sites"
    run.say("ranks", f"{adapted}, {spent}, picture in {run.folder.ranks_plot}{remark}")


def _plan(model: PeftModel) -> Plan:
    """Return the ranks as they are now, closed ones not counted."""
    from loraplex.allocation.plan import Plan
    from loraplex.tuner.model import LoraplexTuner

    assert isinstance(model.base_model, LoraplexTuner)
    layers = model.base_model.adapter_layers(model.active_adapter)
    return Plan({layer.site: layer.adapter(model.active_adapter).factors.open_ranks for layer in layers})


def _is_ours(model: PeftModel) -> bool:
    from loraplex.tuner.model import LoraplexTuner

    return isinstance(model.base_model, LoraplexTuner)


def _parameters(model: PeftModel) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from loraplex.training.preparation import head_size

    trainable, total = model.get_nb_trainable_parameters()
    adapted = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    sites = len(_plan(model).adapted) if _is_ours(model) else adapted
    head = {"head": size} if (size := head_size(model)) else {}
    return {"sites": sites, "trainable": trainable, **head, "total": total, "share": trainable / total}


def _parameters_line(model: PeftModel, parameters: Mapping[str, Any]) -> str:
    from loraplex.tuner.counting import count_parameters

    head = f" ({parameters['head']:,} of them its head)" if "head" in parameters else ""
    line = "{sites} sites, {trainable:,} trainable parameters{of_head}, {share:.2%} of the model".format(
        **parameters, of_head=head
    )
    counted = count_parameters(model)
    return line if counted.budget is None else f"{line}; {counted}"


def _deployed(run: _Run, model: PeftModel) -> int:
    """Return how many of the trained parameters are left after an allocation, ours or PEFT's: closed ranks are not."""
    from safetensors import safe_open

    from loraplex.training.stock import allocates
    from loraplex.tuner.counting import count_parameters

    if not allocates(model):
        return count_parameters(model).open
    # PEFT's live modules keep the ranks that it masks, its file does not
    with safe_open(run.folder.adapter / "adapter_model.safetensors", "pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _row_counts(rows: Rows) -> dict[str, int]:
    return {
        "train": len(rows.train.rows),
        "truncated": rows.train.truncated,
        "dropped": rows.train.dropped,
        "validation": len(rows.validation.rows) if rows.validation else 0,
        "test": len(rows.test),
        "train_tokens": sum(len(row["input_ids"]) for row in rows.train.rows),
    }


def _rows_line(rows: Rows) -> str:
    counts = _row_counts(rows)
    words = {"truncated": "cut to length", "dropped": "dropped"}
    cut = [f"{counts[key]} {word}" for key, word in words.items() if counts[key]]
    losses = f" ({', '.join(cut)})" if cut else ""
    return f"{counts['train']:,} to train on{losses}, {counts['test']:,} to test on"
