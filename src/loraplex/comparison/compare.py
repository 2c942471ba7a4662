"""A whole comparison: ranks, learning rates, runs, results, report. What `loraplex compare` does, as a function."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.allocation.plan import Plan
from loraplex.comparison.budget_matching import Counter, Solved, fixed, keeps_to, parse_budget, parse_match, solve
from loraplex.comparison.collecting import collect, collect_base, environment
from loraplex.comparison.comparison_recipe import ComparisonRecipe
from loraplex.comparison.describing import describe, sources
from loraplex.comparison.grouped import joined, parts
from loraplex.comparison.identity import Identifier
from loraplex.comparison.jobs import Job, Kind, make_job, why_again
from loraplex.comparison.results import Arm, Comparison, Run, Trial, write_results
from loraplex.comparison.sentences import size_sentence
from loraplex.comparison.statistics import expected_detectable
from loraplex.comparison.sweep import default_jobs, make_workers, run_jobs
from loraplex.comparison.workers import Workers
from loraplex.errors import UserError
from loraplex.training.preparation import adapter_config, resolve_from_data
from loraplex.training.recipe import Recipe
from loraplex.tuner.config import AdapterConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Say = Callable[[str, str], None]
COMPUTE = "compute"


@dataclass
class _Sweep:
    """A comparison in progress."""

    recipe: ComparisonRecipe
    say: Say
    progress: bool
    workers: Workers
    solved: dict[str, Solved] = field(default_factory=dict)
    budget: int | None = None
    rates: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Of the arms with one adapter per group: the training rows of the groups."""
    items: list[str] = field(default_factory=list)
    """The ids of the test rows, in their order."""
    identifier: Identifier = field(default_factory=Identifier)

    @property
    def output(self) -> Path:
        return self.recipe.output

    def job(self, kind: Kind, name: str, recipe: Recipe) -> Job:
        """Return the job of a recipe in the folder of this comparison."""
        return make_job(kind, name, recipe, self.output, self.identifier)

    def jobs(self, name: str, label: str, recipe: Recipe) -> list[Job]:
        """Return the jobs of one run of an arm: one, or one for each group of prompts."""
        if name not in self.sizes:
            return [self.job(Kind.TRAIN, label, recipe)]
        of_groups = enumerate(parts(recipe, self.sizes[name]), start=1)
        return [self.job(Kind.TRAIN, f"{label}-group{group}", part) for group, part in of_groups]

    def run(self, jobs: list[Job]) -> Run:
        """Return what became of one run of an arm."""
        runs = [collect(job, self.errors.get(job.name)) for job in jobs]
        return runs[0] if len(runs) == 1 else joined(runs, self.items)

    def carry_out(self, jobs: list[Job], what: str) -> None:
        """Run the jobs that are not finished, with one bar over all of their steps."""
        for job in jobs:
            # finished ones too: an earlier recipe may have left another file of that name
            job.write_recipe()
        waiting = [job for job in jobs if not job.finished]
        self.tell_reuse(jobs, waiting)
        with _bar(sum(job.steps for job in waiting), what, self.progress) as advance:
            self.errors |= run_jobs(waiting, _at_once(self.recipe), self.output / "logs", self.workers, advance)
        for job in waiting:
            if job.name in self.errors:
                self.say("failed", f"{job.name}: {self.errors[job.name]}")

    def tell_reuse(self, jobs: list[Job], waiting: list[Job]) -> None:
        """Say which jobs are there already, and why others, of which there is an earlier result, are not."""
        if reused := [job.name for job in jobs if job not in waiting]:
            self.say("reused", f"{len(reused)} of {len(jobs)}: {', '.join(reused)}")
        again: dict[str, list[str]] = {}
        for job in waiting:
            if (reason := why_again(job)) is not None:
                again.setdefault(reason, []).append(job.name)
        for reason, names in again.items():
            self.say("again", f"{', '.join(names)}: {reason}")


def compare(recipe: ComparisonRecipe, *, say: Say = lambda topic, text: None, progress: bool = False) -> Comparison:
    """Carry out a comparison and return it; everything is in the folder `recipe.output`, the report included.

    What is there already from an earlier, interrupted or smaller comparison is kept, and reused where recipe, data,
    base model, packages and code are the same: see `identity.py`. A run that fails is reported, in the results too, and
    ends none of the others.

    Raises:
        UserError: for whatever the user can mend, before anything is trained.
        KeyboardInterrupt: on Ctrl-C; the same call goes on from there.
    """
    from filelock import FileLock, Timeout

    recipe.output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(recipe.output / ".lock", timeout=0), make_workers(_at_once(recipe)) as workers:
            return _compare(_Sweep(recipe, say, progress, workers))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what has finished is kept, the same command goes on from there") from None
    except Timeout:
        raise UserError(
            f"another comparison is writing to '{recipe.output}': wait for it, or choose another output"
        ) from None


def _compare(sweep: _Sweep) -> Comparison:
    from loraplex.comparison.page import write_report

    items = _check_rows(sweep)
    recipe = sweep.recipe = _resolved(sweep)
    _solve(sweep)
    contrasts = len(recipe.arms) - 1
    if contrasts and items:
        sweep.say("beforehand", _size(items, len(recipe.options.seeds), contrasts))
    if recipe.options.match == COMPUTE:
        _match_compute(sweep, dict.fromkeys(recipe.arms, ""))
    elif recipe.compute_of:
        _match_compute(sweep, recipe.compute_of)
    trials = _choose_rates(sweep)
    base = _base_job(sweep)
    runs = {name: [_run_jobs(sweep, name, seed) for seed in recipe.options.seeds] for name in recipe.arms}
    # Seed by seed: an interrupted comparison has compared something.
    ordered = [job for of_seed in zip(*runs.values(), strict=True) for jobs in of_seed for job in jobs]
    # a fresh classification head says nothing before it is trained
    untrained = [base] if items and not base.recipe.model.classifies else []
    sweep.carry_out([*untrained, *ordered], "runs")
    arms = [_arm(sweep, name, runs[name], trials[name]) for name in recipe.arms]
    comparison = _comparison(sweep, arms, collect_base(base, sweep.errors.get(base.name)), environment(ordered))
    write_results(comparison, sweep.output)
    write_report([comparison], sweep.output)
    return comparison


def _at_once(recipe: ComparisonRecipe) -> int:
    """Return how many jobs run at the same time."""
    return recipe.options.jobs or default_jobs()


def _size(items: int, seeds: int, contrasts: int) -> str:
    """Return what a comparison of this size could show, before anything has run."""
    if seeds == 1:
        return size_sentence(items, [seeds], contrasts, [])
    found = expected_detectable(items, seeds, contrasts)
    assumed = " This assumes that accuracies differ by 2 points between seeds and that 15 % of the items decide."
    return size_sentence(items, [seeds], contrasts, [found]) + assumed


def _arm(sweep: _Sweep, name: str, jobs: list[list[Job]], trials: list[Trial]) -> Arm:
    """Return an arm with its runs."""
    solved = sweep.solved[name]
    runs = [sweep.run(of_seed) for of_seed in jobs]
    return Arm(
        name=name,
        summary=_summary(sweep, name),
        learning_rate=sweep.rates[name],
        trainable=solved.trainable,
        within_budget=kept_to_budget(solved, runs, sweep.budget),
        runs=runs,
        trials=trials,
        candidates=solved.candidates,
    )


def kept_to_budget(solved: Solved, runs: Sequence[Run], budget: int | None) -> bool:
    """Tell whether an arm kept to the budget: with an allocation by what its runs have left, as soon as any has."""
    left = [run.deployed for run in runs if run.deployed is not None]
    if solved.candidates is None or not left:
        return solved.within_budget
    return all(keeps_to(found, budget) for found in left)


def _check_rows(sweep: _Sweep) -> int:
    """Read all data once, before anything else, and return the number of test items."""
    from loraplex.models.loading import load_tokenizer
    from loraplex.training.measuring import items_of_accuracy
    from loraplex.training.preparation import read_rows

    first = sweep.recipe.arms[sweep.recipe.reference]
    rows = read_rows(first, load_tokenizer(first.model.name))
    sweep.say("rows", f"{len(rows.train.rows):,} to train on, {len(rows.test):,} to test on")
    sweep.items = [row.source for row in rows.test]
    return items_of_accuracy(rows.test, first.evaluation)


def _resolved(sweep: _Sweep) -> ComparisonRecipe:
    """Return the recipe with those options decided that its arms leave to the training rows."""
    arms = {}
    for name, arm in sweep.recipe.arms.items():
        arms[name], decided = resolve_from_data(arm)
        for choice in decided:
            sweep.say("decided", f"{name}: {choice.summary}")
    for name, number in sweep.recipe.groups.items():
        sweep.sizes[name] = _group_sizes(sweep, name, number)
    return replace(sweep.recipe, arms=arms)


def _group_sizes(sweep: _Sweep, name: str, number: int | str) -> list[int]:
    from loraplex.training.grouping import find_groups, group_sizes
    from loraplex.training.preparation import training_examples

    arm = sweep.recipe.arms[name]
    rows = training_examples(arm)[0]
    found = find_groups(rows, number if isinstance(number, int) else None, arm.data.seed)
    if number == "auto":
        sweep.say("decided", f"{name}: one_per_group: {found.number}; {found.reason}")
    sizes = group_sizes(found, rows)
    sweep.say("groups", f"{name}: {' + '.join(str(size) for size in sizes)} rows")
    return sizes


def _solve(sweep: _Sweep) -> None:
    """Give every arm its ranks and write the plans of those whose sites differ."""
    recipe, options = sweep.recipe, sweep.recipe.options
    reference = recipe.arms[recipe.reference]
    counter = Counter(reference)
    if options.budget is not None:
        sweep.budget = parse_budget(options.budget, counter.total(reference))
    elif options.match not in (None, COMPUTE):
        sweep.budget = counter.trainable(parse_match(str(options.match), reference))
    for name, arm in recipe.arms.items():
        adapters = len(sweep.sizes.get(name, [""]))
        budget = None if sweep.budget is None else sweep.budget // adapters
        if budget is None or name in recipe.own_rank:
            solved = fixed(arm, budget, counter)
        else:
            solved = solve(arm, budget, counter)
        candidates = None if solved.candidates is None else adapters * solved.candidates
        solved = replace(solved, trainable=adapters * solved.trainable, candidates=candidates)
        sweep.solved[name] = solved
        sweep.rates[name] = solved.recipe.training.learning_rate
        note = f" of {solved.candidates:,} in candidates" if solved.candidates is not None else ""
        note += "" if solved.within_budget else f", off the budget of {sweep.budget:,}"
        sweep.say("arm", f"{name}: {_summary(sweep, name)}, {solved.trainable:,} parameters{note}")
        _write_plan(sweep, name, solved, counter)


def _write_plan(sweep: _Sweep, name: str, solved: Solved, counter: Counter) -> None:
    config = adapter_config(solved.recipe)
    if isinstance(config, AdapterConfig) and config.rank_pattern:
        folder = sweep.output / "plans"
        folder.mkdir(exist_ok=True)
        Plan({site: config.rank_of(site) for site in counter.sites(solved.recipe)}).save(folder / f"{name}.json")


def _count_flops(sweep: _Sweep, names: Iterable[str]) -> dict[str, float]:
    """Return the operations per trained token of every arm whose count succeeded."""
    jobs = {name: sweep.job(Kind.FLOPS, f"{name}-flops", _quiet(sweep, name)) for name in names}
    sweep.carry_out(list(jobs.values()), "operations")
    return {name: job.metrics()["flops_per_token"] for name, job in jobs.items() if job.finished}


def _quiet(sweep: _Sweep, name: str) -> Recipe:
    """Return an arm's recipe without what does not change its operations: they are counted once for all of those."""
    recipe = sweep.solved[name].recipe
    return replace(recipe, training=replace(recipe.training, learning_rate=1e-4), seed=0)


def _match_compute(sweep: _Sweep, wanted: Mapping[str, str]) -> None:
    """Give the `wanted` arms more steps or fewer, until they have the operations of the arms named there.

    Where none is named, it is the arm with the most.
    """
    names = [name for name in sweep.solved if name in wanted or name in wanted.values()]
    if any(sweep.solved[name].recipe.training.max_steps is None for name in names):
        raise UserError("equal compute changes the number of steps: set training.max_steps")
    flops = _count_flops(sweep, names)
    missing = [name for name in names if name not in flops]
    if missing:
        raise UserError(
            f"equal compute needs the operations of {missing[0]}: {sweep.errors.get(missing[0] + '-flops')}"
        )
    all_steps = {name: sweep.solved[name].recipe.training.max_steps or 0 for name in names}
    dearest = max(names, key=lambda name: flops[name])
    for name, other in wanted.items():
        # without another arm, the own steps as dear as those of the dearest
        other_steps = all_steps[other] if other else all_steps[name]
        solved = sweep.solved[name]
        training = solved.recipe.training
        steps = round(other_steps * flops[other or dearest] / flops[name])
        sweep.solved[name] = replace(solved, recipe=replace(solved.recipe, training=replace(training, max_steps=steps)))
        sweep.say("steps", f"{name}: {steps}")


def _choose_rates(sweep: _Sweep) -> dict[str, list[Trial]]:
    """Choose the learning rate of every arm on validation rows and return what was tried."""
    jobs: dict[str, list[list[Job]]] = {}
    seed = sweep.recipe.options.seeds[0]
    for name, rates in sweep.recipe.learning_rates.items():
        arm = sweep.solved[name].recipe
        evaluation = replace(arm.evaluation, rows="validation", before=False)
        jobs[name] = []
        for rate in rates:
            trial = replace(arm, seed=seed, evaluation=evaluation, training=replace(arm.training, learning_rate=rate))
            jobs[name].append(sweep.jobs(name, f"{name}-lr{rate:g}", trial))
    if everything := [job for trials in jobs.values() for trial in trials for job in trial]:
        sweep.carry_out(everything, "learning rates")
    found = {name: [_trial(sweep.run(trial), trial[0]) for trial in trials] for name, trials in jobs.items()}
    for name, trials in found.items():
        finished = [trial for trial in trials if trial.accuracy is not None]
        if finished:
            # The smaller of two equal ones: it leaves more room above.
            best = max(finished, key=lambda trial: (trial.accuracy, -trial.learning_rate))
            sweep.rates[name] = best.learning_rate
            at_the_edge = best.learning_rate in (
                min(t.learning_rate for t in trials),
                max(t.learning_rate for t in trials),
            )
            note = ", at the edge of those tried" if at_the_edge and len(trials) > 1 else ""
            sweep.say("rate", f"{name}: {best.learning_rate:g}{note}")
    return found


def _trial(run: Run, job: Job) -> Trial:
    return Trial(job.recipe.training.learning_rate, run.accuracy, run.standard_error, run.error)


def _base_job(sweep: _Sweep) -> Job:
    arm = sweep.recipe.arms[sweep.recipe.reference]
    bare = Recipe(output="", data=arm.data, model=arm.model, evaluation=arm.evaluation)
    return sweep.job(Kind.BASE, "base", bare)


def _run_jobs(sweep: _Sweep, name: str, seed: int) -> list[Job]:
    arm = sweep.solved[name].recipe
    recipe = replace(
        arm,
        seed=seed,
        training=replace(arm.training, learning_rate=sweep.rates[name]),
        evaluation=replace(arm.evaluation, before=False),
    )
    return sweep.jobs(name, f"{name}-s{seed}", recipe)


def _summary(sweep: _Sweep, name: str) -> str:
    reference = sweep.recipe.arms[sweep.recipe.reference]
    summary = describe(sweep.solved[name].recipe, reference.training)
    return f"{summary}, one for each of {len(sweep.sizes[name])} groups" if name in sweep.sizes else summary


def _comparison(sweep: _Sweep, arms: list[Arm], base: Run | None, versions: dict[str, Any]) -> Comparison:
    recipe, options = sweep.recipe, sweep.recipe.options
    first = recipe.arms[recipe.reference]
    asked = f"budget: {options.budget}" if options.budget is not None else f"match: {options.match or 'nothing'}"
    return Comparison(
        name=recipe.path.stem,
        description=recipe.description,
        command=f"loraplex compare {shlex.quote(str(recipe.path))}",
        model=first.model.name,
        rows=sources(first),
        budget=asked,
        budget_parameters=sweep.budget,
        reference=recipe.reference,
        seeds=list(options.seeds),
        arms=arms,
        base=base,
        environment=versions,
    )


@contextmanager
def _bar(total: int, what: str, shown: bool) -> Iterator[Callable[[Job, int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="step", disable=not shown, smoothing=0.05) as bar:

        def advance(job: Job, steps: int) -> None:
            bar.set_postfix_str(job.name, refresh=False)
            bar.update(steps)

        yield advance
