"""`loraplex report`: the page of one or several comparisons, from what they have stored."""

from __future__ import annotations

from pathlib import Path

import click

from loraplex.errors import UserError


@click.command()
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the report; not needed for one FOLDER.")
def report(folders: tuple[Path, ...], output: Path | None) -> None:
    """Write report.html and plots/ again from the results in each FOLDER.

    One FOLDER gets its report back. Several are shown on one page, a section each and an overview before them.
    """
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

    click.echo(f"written to {write_report(comparisons, output)}")
