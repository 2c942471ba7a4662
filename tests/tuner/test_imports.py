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
        # asking for PEFT's spec, as transformers does too, must not use up the registration
        "import loraplex, transformers, importlib.util as u\nassert u.find_spec('peft')\nimport peft.tuners.lora",
        "from loraplex.tuner.layer import SiteLayer\nimport loraplex",
        "import loraplex\nfor name in loraplex.__all__: getattr(loraplex, name)",
    ],
    ids=["peft-first", "loraplex-first", "submodule-first", "never-peft"],
)
def test_order_of_imports(first):
    python(first + USE)


def test_alone_it_imports_no_heavy_package():
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "numpy", "pydantic", "rich", "matplotlib"}
    printed = python(f"import loraplex, sys; dir(loraplex); print(sorted({heavy!r} & set(sys.modules)))")
    assert printed.strip() == "[]"


def test_peft_looks_as_if_nobody_had_watched_its_import():
    """What inspects the package later finds PEFT's own loader."""
    python(
        "import loraplex, peft, sys, importlib.resources\n"
        "assert type(peft.__spec__.loader).__name__ == 'SourceFileLoader', peft.__spec__.loader\n"
        "assert peft.__loader__ is peft.__spec__.loader\n"
        "assert not any(type(finder).__module__.startswith('loraplex') for finder in sys.meta_path)\n"
        "assert (importlib.resources.files('peft') / 'config.py').is_file()"
    )
