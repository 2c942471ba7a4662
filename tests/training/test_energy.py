"""The energy estimate: a number where codecarbon is installed, and None, at no cost, where it is not."""

import builtins
import importlib.util
from typing import Any

import pytest

from loraplex.training import energy
from loraplex.training.energy import energy_estimated


def test_without_codecarbon_nothing_is_estimated_or_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_spec", lambda name: None)
    original = builtins.__import__

    def guarded(name: str, *rest: Any, **others: Any) -> Any:
        assert not name.startswith("codecarbon")
        return original(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", guarded)
    with energy_estimated() as found:
        sum(range(1000))
    assert found.kwh is None


@pytest.mark.skipif(importlib.util.find_spec("codecarbon") is None, reason="codecarbon is not installed")
def test_with_codecarbon_work_takes_energy() -> None:
    with energy_estimated() as found:
        sum(index * index for index in range(3_000_000))
    assert found.kwh is not None
    assert 0 < found.kwh < 0.01


def test_an_error_inside_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), energy_estimated():
        _ = 1 / 0
