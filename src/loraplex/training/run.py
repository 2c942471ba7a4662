"""One run from recipe to run folder: what `loraplex train` does, as a function."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.files import write_json
from loraplex.training.folder import RunFolder
from loraplex.training.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from loraplex.adapters.contracts import Resolved
    from loraplex.allocation.plan import Plan
    from loraplex.training.measuring import Measured
    from loraplex.training.preparation import Rows
    from loraplex.training.trainer import WatchedTrainer
    from loraplex.tuner.routing import RoutingWatch


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


@dataclass(frozen=True)
class _Loaded:
    """What a run trains, and on what."""

    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    model: PeftModel
    trainer: WatchedTrainer
    identity: dict[str, Any]
    """Of the base model."""
    resident: int
    """Bytes in use after the base model was loaded."""


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
    replaces an earlier run, which is deleted when this one has finished, and put back when this one fails before its
    first checkpoint. `say` is told (topic, text) as the run proceeds, `progress` shows bars, `callbacks` join
    those of the trainer, `count_flops` adds the operations per token to the metrics (it costs a step).

    Raises:
        UserError: for whatever the user can mend, before anything is lost.
        TrainingInterrupted: on Ctrl-C, after the state of training has been saved.
    """
    from loraplex.training import preparation

    recipe, decided = _resolve(preparation.resolve(recipe), resume, overwrite, say)
    run = _Run(recipe, RunFolder(recipe.output), say, progress, callbacks)
    loaded = _load(run)
    with run.folder.opened(recipe, resume=resume):
        if decided:
            write_json(run.folder.decided, [choice.evidence for choice in decided])
        metrics = _train_and_measure(run, loaded, resume, count_flops)
        _write_reports(run, metrics)
    return RunResult(run.folder.path, run.folder.adapter, metrics)


def _resolve(
    recipe: Recipe, resume: bool, overwrite: bool, say: Callable[[str, str], None]
) -> tuple[Recipe, list[Resolved]]:
    """Check the folder, and return the recipe with what is left to the training rows decided, and how that went."""
    from loraplex.training import preparation

    folder = RunFolder(recipe.output)
    folder.recover()
    if not resume:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    recipe, decided = preparation.resolve_from_data(recipe)
    for choice in decided:
        say("decided", choice.summary)
    # What is resumed has the recipe that the rows have decided.
    if resume:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    return recipe, decided


def _load(run: _Run) -> _Loaded:
    """Read the rows, load the model, add the adapter and build the trainer."""
    from loraplex.models.fingerprint import describe_base
    from loraplex.models.loading import load_tokenizer
    from loraplex.training import preparation
    from loraplex.training.arguments import trainer_arguments
    from loraplex.training.counts import rows_line
    from loraplex.training.memory import start_peak

    recipe, checkpoints = run.recipe, run.folder.checkpoints
    # Names and values first: they cost nothing, the model does.
    trainer_arguments(recipe, checkpoints)
    with run.timed("data"):
        tokenizer = load_tokenizer(recipe.model.name)
        rows = preparation.read_rows(recipe, tokenizer)
    run.say("rows", rows_line(rows))
    with run.timed("loading"):
        base = preparation.load_base(recipe)
    identity = describe_base(base, recipe.model.name)
    resident = start_peak()
    model = preparation.add_adapter(recipe, base)
    trainer = preparation.build_trainer(recipe, model, tokenizer, rows, checkpoints)
    return _Loaded(tokenizer, rows, model, trainer, identity, resident)


def _train_and_measure(run: _Run, loaded: _Loaded, resume: bool, count_flops: bool) -> dict[str, Any]:
    """Train, save and measure, and return the metrics."""
    from loraplex.training.counts import deployed_parameters, open_ranks, parameter_counts, parameters_line, row_counts
    from loraplex.training.flops import flops_per_token
    from loraplex.training.memory import start_peak

    model, trainer = loaded.model, loaded.trainer
    parameters = parameter_counts(model)
    run.say("adapter", parameters_line(model, parameters))
    before = _measure_before(run, loaded)
    # An objective is gone after training, so is what its steps cost.
    operations = flops_per_token(trainer) if count_flops and _has_objective(model) else None
    memory = {"resident_before_bytes": start_peak(), "resident_after_loading_bytes": loaded.resident}
    trained = _fit(run, trainer, resume)
    memory["peak_bytes"] = trained.pop("peak_bytes")
    if count_flops and operations is None:
        operations = flops_per_token(trainer)
    plan = open_ranks(model)
    if plan is not None:
        plan.save(run.folder.plan)
    reloaded, reload = _save(run, loaded)
    parameters["deployed"] = deployed_parameters(model, run.folder.adapter)
    if trained["allocation"]:
        assert plan is not None
        _draw_ranks(run, plan, trained["allocation"])
    after = _measure(run, "after", reloaded, loaded)
    routing = _write_routing(run, reloaded, loaded)
    return {
        **trained,
        "accuracy": {"before": before.summary if before else None, "after": after.summary if after else None},
        "parameters": parameters,
        "rows": row_counts(loaded.rows),
        "memory": memory,
        "flops_per_token": operations,
        **({"routing": routing} if routing else {}),
        "seconds": run.seconds,
        "reload": reload,
        "base_model": loaded.identity,
    }


def _fit(run: _Run, trainer: WatchedTrainer, resume: bool) -> dict[str, Any]:
    """Train and return the losses and the speed; stop where numbers or the user say so."""
    from transformers import set_seed

    from loraplex.training.energy import energy_estimated
    from loraplex.training.memory import peak
    from loraplex.training.report import split_history
    from loraplex.training.trainer import Clock, DivergedError, Interruption, ProgressBar, TrainingInterrupted
    from loraplex.training_hooks.allocation_in_trainer import decisions

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


def _save(run: _Run, loaded: _Loaded) -> tuple[PeftModel, dict[str, Any]]:
    """Write the adapter and return it as it was read back."""
    from torch.nn import Module

    from loraplex.training.preparation import load_base
    from loraplex.training.saving import save_checked

    token_ids = [row["input_ids"] for row in loaded.rows.train.rows]

    def fresh_base() -> PreTrainedModel:
        # another fresh head than the run's: one that was not saved would show
        base = load_base(run.recipe, head_seed=run.recipe.seed + 1)
        Module.to(base, loaded.model.device)
        return base

    with run.timed("saving"):
        reloaded, reload = save_checked(loaded.model, run.folder.adapter, token_ids, loaded.identity, fresh_base)
    run.say("saved", f"{run.folder.adapter}, reloaded and compared on {reload.rows} rows: {reload}")
    return reloaded, asdict(reload)


def _measure_before(run: _Run, loaded: _Loaded) -> Measured | None:
    if not run.recipe.evaluation.before or run.recipe.model.classifies:
        return None
    # The adapter is off, which is the base model bit for bit.
    with loaded.model.disable_adapter():
        return _measure(run, "before", loaded.model, loaded)


def _measure(run: _Run, when: str, model: PeftModel, loaded: _Loaded) -> Measured | None:
    """Measure a model on the test rows, keep every item in a file, and say the accuracy."""
    if not loaded.rows.test:
        return None
    from loraplex.training.measuring import measure

    with run.timed(f"evaluation_{when}"):
        measured = measure(model, loaded.tokenizer, loaded.rows.test, run.recipe.evaluation, run.progress)
    measured.write(run.folder.evaluation / f"{when}.jsonl")
    run.say(when, str(measured))
    return measured


def _watch_routing(trainer: WatchedTrainer) -> RoutingWatch:
    """Let the trainer log the gates of a routed adapter; one that routes nothing has nothing to watch."""
    from loraplex.tuner.routing import RoutingWatch

    watch = RoutingWatch(trainer.accelerator.unwrap_model(trainer.model))
    trainer.routing = watch if watch.records else None
    return watch


def _write_routing(run: _Run, model: PeftModel, loaded: _Loaded) -> dict[str, float] | None:
    """Write how the finished adapter routes its rows and return the overview; None where it routes nothing."""
    from loraplex.training.routing_report import routed_rows, write_routing

    if loaded.trainer.routing is None:
        return None
    title = f"{run.recipe.adapter_name} on {run.recipe.model.name}"
    with run.timed("routing"):
        chosen = routed_rows(run.recipe, loaded.rows, loaded.tokenizer)
        return write_routing(run.folder, model, chosen, loaded.trainer.state.log_history, title)


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
