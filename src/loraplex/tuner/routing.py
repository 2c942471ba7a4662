"""How much every head of a routed adapter is used: by site, by task, and over the steps of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loraplex.adapters.gates import GateRecord, GateSummary
from loraplex.tuner.layer import SiteLayer

ROWS_PER_TASK = 32
SNAPSHOTS = 40
"""How often, at most, the load of every single site is kept in the course of a training run."""

By = dict[str, GateSummary]
"""Summaries by site, in the order of the model's modules."""


def gate_records(model: PeftModel) -> dict[str, GateRecord]:
    """Return the records of the active adapter's gates by site; empty where it routes nothing."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, SiteLayer) and model.active_adapter in layer.loraplex_adapters:
            record = layer.adapter(model.active_adapter).combine.gates
            if record is not None:
                found[layer.site] = record
    return found


@contextmanager
def recording(model: PeftModel) -> Iterator[dict[str, GateRecord]]:
    """Record the gates of the active adapter, from nothing, as long as the block lasts."""
    records = gate_records(model)
    before = {site: record.on for site, record in records.items()}
    for record in records.values():
        record.clear()
        record.on = True
    try:
        yield records
    finally:
        for site, record in records.items():
            record.clear()
            record.on = before[site]


@torch.inference_mode()
def measure_routing(model: PeftModel, rows: Sequence[Sequence[int]]) -> By:
    """Return the gates of the active adapter over all tokens of the `rows`, one forward pass each."""
    device = next(model.parameters()).device
    backbone: nn.Module = model.get_base_model()
    with recording(model) as records:
        for row in rows if records else ():
            backbone(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
        return read(records)


def read(records: Mapping[str, GateRecord]) -> By:
    """Return what the records hold, sites that nothing was recorded of left out."""
    summaries = {site: record.read() for site, record in records.items()}
    return {site: summary for site, summary in summaries.items() if summary is not None}


def by_task(
    model: PeftModel, rows: Sequence[Sequence[int]], tasks: Sequence[str], most: int = ROWS_PER_TASK
) -> dict[str, By]:
    """Return the gates over the first `most` rows of every task; `tasks` names that of each row."""
    found = {}
    for task in dict.fromkeys(tasks):
        chosen = [row for row, other in zip(rows, tasks, strict=True) if other == task]
        if summaries := measure_routing(model, chosen[:most]):
            found[task] = summaries
    return found


def overview(summaries: By) -> dict[str, float]:
    """Return the mean over the sites of the entropy and of the share of dead heads."""
    count = len(summaries)
    return {
        "router_entropy": sum(summary.entropy for summary in summaries.values()) / count,
        "dead_heads": sum(summary.dead for summary in summaries.values()) / count,
    }


def plain(summaries: By) -> dict[str, Any]:
    """Return the summaries as plain values, by site."""
    return {site: {**asdict(summary), "dead": summary.dead} for site, summary in summaries.items()}


class RoutingWatch:
    """Records gates during training; what it says goes into the trainer's log, and from there into checkpoints."""

    def __init__(self, model: PeftModel) -> None:
        self.records = gate_records(model)
        for record in self.records.values():
            record.on = True

    def forget(self) -> None:
        """Leave out what was recorded since the last look (of validation, for example)."""
        for record in self.records.values():
            record.clear()

    def look(self, step: int, steps: int) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Return the overview since the last look, and now and then the summaries of every site.

        The gates are fetched from the device here and nowhere else.
        """
        summaries = read(self.records)
        self.forget()
        if not summaries:
            return {}, None
        due = step == 1 or step % max(1, -(-steps // SNAPSHOTS)) == 0
        return overview(summaries), plain(summaries) if due else None

    def stop(self) -> None:
        """Record no longer."""
        for record in self.records.values():
            record.on = False
            record.clear()


def history(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the course of the routing out of a trainer's log: the overview of every entry, snapshots of the sites."""
    entries = [entry for entry in log if "loss" in entry and "router_entropy" in entry]
    return {
        "over_training": [
            {"step": e["step"], "entropy": e["router_entropy"], "dead_heads": e["dead_heads"]} for e in entries
        ],
        "snapshots": [{"step": e["step"], "sites": e["routing"]} for e in entries if "routing" in e],
    }
