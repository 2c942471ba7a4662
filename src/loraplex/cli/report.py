"""`loraplex report`: the page of one or several comparisons, from what they have stored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.cli.arguments import Parser
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

DESCRIPTION = """Write report.html and plots/ again from the results in each FOLDER.

One FOLDER gets its report back. Several are shown on one page, a section each and an overview before them."""


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    made.add_argument("--output", type=Path, metavar="FOLDER", help="Where to write; not needed for one FOLDER.")
    return made


def run(arguments: Namespace) -> None:
    """Write the report, and say where it is."""
    folders: list[Path] = arguments.folders
    output: Path | None = arguments.output
    if output is None:
        if len(folders) > 1:
            raise UserError("a report of several comparisons has no folder of its own: name one with --output")
        output = folders[0]
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file: give a folder")
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UserError(f"'{folder}' is named more than once: name every comparison once")
    from loraplex.comparison.results import read_results

    # Read before the charts are imported: a mistyped folder shows at once.
    comparisons = [read_results(folder) for folder in folders]
    from loraplex.comparison.page import write_report

    print(f"written to {write_report(comparisons, output)}")
