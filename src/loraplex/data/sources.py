"""Where rows come from: JSON files, plain and gzipped; benchmark sets; hub data sets. Every row knows its place."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from loraplex.data.examples import Row
from loraplex.data.options import DataOptions, Split
from loraplex.errors import UserError, nearest
from loraplex.extras import require

BENCHMARK = "benchmark:"
_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_rows(source: str, options: DataOptions, split: Split) -> list[Row]:
    """Read all rows of `source`, which is a benchmark set, a file, a folder or a hub id.

    Raises:
        UserError: there is no such source, it cannot be read, or it has no rows.
    """
    if (file := _file(source)) is not None:
        rows = list(read_json(file, source))
    elif Path(source).is_dir() or (_HUB_ID.fullmatch(source) and not source.endswith(_JSON_SUFFIXES)):
        rows = _read_hub(source, options.config, options.train_split if split == "train" else options.test_split)
    else:
        raise UserError(f"data file '{source}' does not exist.{_nearest_file(Path(source))}")
    if not rows:
        raise UserError(f"{source} has no rows; a data set needs at least one")
    return rows


def local_files(source: str) -> list[Path]:
    """Return the files on this machine that hold the rows of `source`, sorted; none for a hub id.

    Raises:
        UserError: it is a benchmark set that is not there.
    """
    if (file := _file(source)) is not None:
        return [file]
    return sorted(path for path in Path(source).rglob("*") if path.is_file()) if Path(source).is_dir() else []


def _file(source: str) -> Path | None:
    """Return the one file that `source` is; None for a folder, a hub id, and what does not exist."""
    if source.startswith(BENCHMARK):
        return benchmark_path(source.removeprefix(BENCHMARK))
    return Path(source) if Path(source).is_file() else None


def benchmark_root() -> Path | None:
    """Return the folder of the benchmark sets: `LORAPLEX_DATA`, or `../shared/data` beside a checkout, or None."""
    if named := os.environ.get("LORAPLEX_DATA"):
        return Path(named)
    checkout = Path(__file__).resolve().parents[3]
    for beside in (Path.cwd(), checkout):
        folder = beside.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None


def benchmark_path(name: str) -> Path:
    """Return the file of the benchmark set `name`, such as `glue/sst2/train.jsonl.gz`.

    Raises:
        UserError: the sets are not on this machine, or have no such file.
    """
    root = benchmark_root()
    if root is None:
        raise UserError(
            f"benchmark set '{name}' was asked for, but there are no benchmark sets here; "
            "set LORAPLEX_DATA to their folder"
        )
    path = root / name
    if not path.is_file():
        files = (str(file.relative_to(root)) for file in root.rglob("*.jsonl*"))
        raise UserError(f"benchmark set '{name}' is not in {root}.{nearest(name, files)}")
    return path


def read_json(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line, or of a `.json` file that is one list of objects.

    `name` is what messages call the file.

    Raises:
        UserError: a line is not a JSON object, with file and line; the file is not text or not gzip.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            if ".json" in path.suffixes and lines.read(1) == "[":
                lines.seek(0)
                yield from _read_list(lines.read(), name)
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line.strip(), f"{name}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason}); convert it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a complete gzip file ({error}); fetch it again") from error


def _read_list(text: str, name: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    for number, value in enumerate(values, start=1):
        yield Row(_fields(value, f"{name}, row {number}"), f"{name}, row {number}")


def _row(line: str, place: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno}): {_excerpt(line)}") from error
    return Row(_fields(value, place), place)


def _fields(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a row has to be a JSON object with named fields, not {_excerpt(json.dumps(value))}")
    return value


def _excerpt(line: str) -> str:
    stripped = line.strip()
    return stripped if len(stripped) <= 60 else stripped[:57] + "..."


def _read_hub(source: str, config: str | None, split: str) -> list[Row]:
    require(f"the data set '{source}'", "train")
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, name=config, split=split)
    # OSError: no network, offline mode, unknown id; ValueError: unknown configuration or split.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data set '{source}' (split '{split}') cannot be loaded: {reason}") from error
    return [Row(fields, f"{source}[{split}]:{number}") for number, fields in enumerate(dataset)]


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" Its folder '{folder}' does not exist either."
    hint = nearest(path.name, (entry.name for entry in folder.iterdir()))
    return hint or f" Nothing in '{folder}' has a similar name."
