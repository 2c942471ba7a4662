"""In a fork: do what a Python of its own would do with a command line. Imports the standard library alone."""

import json
import os
import runpy
import sys
import types
from pathlib import Path

ROOT = str(Path(__file__).parents[1])
# Read by Python, torch and its libraries, the hub client, transformers and tokenizers when they start.
READ_AT_IMPORTS = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "CUDA_", "HF_HUB_OFFLINE", "TRANSFORMERS_")


def run(arguments: list[str]) -> int:
    """Run ["-c", CODE, ...], ["-m", MODULE, ...] or [SCRIPT, ...] in the folder and environment that are asked for.

    Raises:
        ValueError: when the environment differs in what was read at the imports.
    """
    asked = json.loads(arguments[0])
    _take(asked["environment"])
    os.chdir(asked["cwd"])
    first, *rest = asked["arguments"]
    # the server has the checkout on its path for the sake of this file
    sys.path[:] = [place for place in sys.path if place != ROOT]
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
    return 0


def _take(environment: dict[str, str]) -> None:
    for key in {*environment, *os.environ} - {"PYTHONPATH"}:
        if environment.get(key) != os.environ.get(key):
            if key.startswith(READ_AT_IMPORTS):
                raise ValueError(f"{key} has been read when the server started: start a fresh process")
            os.environ.pop(key, None)
            if key in environment:
                os.environ[key] = environment[key]
