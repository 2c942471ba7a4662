"""The order of the imports does not matter, and loraplex alone imports nothing heavy. Each in its own interpreter."""

import os
import subprocess
import sys

import pytest

USE = """
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model
from torch import nn
model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), loraplex.AdapterConfig(r=2, target_modules=["0"]))
assert type(model.base_model).__name__ == "LoraplexTuner"
assert PEFT_TYPE_TO_CONFIG_MAPPING["LORAPLEX"] is loraplex.AdapterConfig
"""


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "error:::loraplex"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import peft, loraplex",
        "import loraplex, transformers, peft.tuners.lora",
        "from loraplex.tuner.layer import SiteLayer\nimport loraplex",
        "import loraplex\nfor name in loraplex.__all__: getattr(loraplex, name)",
    ],
    ids=["peft-first", "loraplex-first", "submodule-first", "never-peft"],
)
def test_order_of_imports(first):
    python(first + USE)


def test_alone_it_imports_no_heavy_package():
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "numpy", "pydantic", "rich", "altair", "vl_convert"}
    printed = python(f"import loraplex, sys; print(sorted({heavy!r} & set(sys.modules)))")
    assert printed.strip() == "[]"
