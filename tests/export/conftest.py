"""Adapters on the tiny model, and stock PEFT without the seconds that a process of its own takes to start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tuner.tiny_models import move
from transformers import AutoModelForCausalLM

from loraplex import AdapterConfig
from loraplex.models.agreement import model_logits

Make = Callable[..., Path]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """A function that saves an adapter of ours or of PEFT's, away from its initial point, and returns its folder."""

    def adapter(base: Path = tiny_model, stock: bool = False, change: Any = None, **fields: Any) -> Path:
        given = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
        config = LoraConfig(**given) if stock else AdapterConfig(**{"seed": 1, "lora_alpha": 6, **given})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        move(model, seed=2)
        if change is not None:
            change(model)
        folder = tmp_path / "adapter"
        model.save_pretrained(str(folder))
        return folder

    return adapter


@pytest.fixture
def stock_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stock PEFT's tuner compute the logits in this process; the tests of the command use one of its own."""

    def logits(base: str, adapter: str, rows: list[list[int]]) -> list[torch.Tensor]:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        assert type(model.peft_config["default"]) is LoraConfig
        return model_logits(model, rows)

    monkeypatch.setattr("loraplex.export.peft.stock_logits", logits)
