"""An estimate of the energy that a stretch of work takes, by codecarbon where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass
class Energy:
    """What was used; known after the work."""

    kwh: float | None = None
    """None where codecarbon is not installed."""


@contextmanager
def energy_estimated() -> Iterator[Energy]:
    """Estimate the energy of the work inside, from what codecarbon finds of processor, memory and accelerators."""
    found = Energy()
    if find_spec("codecarbon") is None:
        yield found
        return
    from codecarbon import OfflineEmissionsTracker

    # The country is for emissions, which nobody asks for; offline, because a training run calls no one.
    tracker = OfflineEmissionsTracker(
        country_iso_code="FRA", output_methods=[], log_level="critical", allow_multiple_runs=True
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
    found.kwh = float(tracker.final_emissions_data.energy_consumed)
