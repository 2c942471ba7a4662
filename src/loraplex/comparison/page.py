"""The report of one or several comparisons: a single HTML file that loads nothing, and every plot as PNG and SVG."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loraplex import __version__
from loraplex.comparison.charts import draw
from loraplex.comparison.results import Comparison, Run
from loraplex.comparison.scene import Plot
from loraplex.comparison.statistics import summarize
from loraplex.comparison.summary import ArmStatistics, Contrast, Summary
from loraplex.comparison.table import Cell, Column, Row, columns, rows
from loraplex.files import write_atomically
from loraplex.plots import DARK, LIGHT, SHAPES, Colors, chart_config, chart_spec, points, rate, save_picture

REPORT, PLOTS = "report.html", "plots"
_ASSETS = Path(__file__).with_name("assets")
_PICTURE_WIDTH = 680
_FORMS = (".svg", ".png")
_VERDICTS = {"better": "better", "worse": "worse", "open": "not decided"}


@dataclass(frozen=True)
class Section:
    """One comparison as the page's template needs it."""

    id: str
    comparison: Comparison
    summary: Summary
    rows: Sequence[Row]
    columns: Sequence[Column]
    plots: Sequence[Plot]

    def facts(self) -> list[tuple[str, str]]:
        """Return what was compared, as terms with their descriptions."""
        comparison = self.comparison
        runs = [run for arm in comparison.arms for run in arm.runs]
        finished = sum(run.state == "finished" for run in runs)
        budget = comparison.budget
        if comparison.budget_parameters is not None:
            budget += f" ({comparison.budget_parameters:,} trainable parameters)"
        facts = {
            "Model": comparison.model,
            "Data": comparison.rows,
            "Budget": budget,
            "Reference": comparison.reference,
            "Seeds": ", ".join(map(str, comparison.seeds)),
            "Test items": _in_words(self.items()),
            "Runs": f"{finished} finished" if finished == len(runs) else f"{finished} of {len(runs)} finished",
        }
        return [(term, fact) for term, fact in facts.items() if fact]

    def items(self) -> list[int]:
        """Return the numbers of test items that runs had, usually one."""
        runs = [run for arm in self.comparison.arms for run in arm.runs if run.items]
        return sorted({len(run.items) for run in runs})

    def groups(self) -> list[tuple[str, int]]:
        """Return the headings over several columns with the number of columns under each."""
        counts: dict[str, int] = {}
        for column in self.columns:
            counts[column.group] = counts.get(column.group, 0) + 1
        return list(counts.items())

    def troubles(self) -> list[tuple[str, Run]]:
        """Return arm and run of every run that did not finish."""
        return [(row.name, run) for row in self.rows for run in row.troubles()]

    def outside(self) -> list[tuple[str, Cell]]:
        """Return the arms that could not keep to the budget, with the cell that says by how much."""
        size = next((column for column in self.columns if column.title == "parameters"), None)
        outside = [row for row in self.rows if row.arm is not None and not row.arm.within_budget]
        return [(row.name, size.cell(row)) for row in outside] if size else []

    def span(self) -> float:
        """Return the largest difference to be drawn, the same for all contrasts so that they can be compared."""
        ends = [abs(end) for contrast in self.summary.contrasts for end in (*contrast.interval, contrast.difference)]
        return max(ends, default=0.0) or 1.0

    def contrast(self, arm: str) -> Contrast | None:
        """Return the contrast of that arm, or None for the reference and for arms without a finished run."""
        return next((contrast for contrast in self.summary.contrasts if contrast.arm == arm), None)

    def statistics(self, arm: str) -> ArmStatistics | None:
        """Return the statistics of that arm, or None where it has no finished run or does not take part."""
        return next((statistics for statistics in self.summary.arms if statistics.arm == arm), None)

    def verdicts(self) -> str:
        """Return how many arms were better, worse or neither."""
        counts = dict.fromkeys(_VERDICTS, 0)
        for contrast in self.summary.contrasts:
            counts[contrast.verdict] += 1
        return ", ".join(f"{count} {_VERDICTS[verdict]}" for verdict, count in counts.items() if count)


def write_report(comparisons: Sequence[Comparison], folder: Path) -> Path:
    """Write report.html and plots/ into `folder` and return the path of the report.

    An earlier report there is replaced; the page is whole or not written at all.
    """
    assert comparisons
    places = arm_places(comparisons)
    sections = [_section(number, comparison, list(places)) for number, comparison in enumerate(comparisons)]
    for number, section in enumerate(sections, 1):
        prefix = f"{number}-{_slug(section.comparison.name)}-" if len(sections) > 1 else ""
        _write_pictures(section, list(places), folder / PLOTS, prefix)
    write_atomically(folder / REPORT, _html(sections, places))
    return folder / REPORT


def arm_places(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """Return for every arm's name its place in the palette, the same in all comparisons."""
    names = dict.fromkeys(arm.name for comparison in comparisons for arm in comparison.arms)
    return {name: place for place, name in enumerate(names)}


def _section(number: int, comparison: Comparison, names: Sequence[str]) -> Section:
    summary = summarize(comparison)
    table = rows(comparison, summary)
    plots = draw(comparison, summary, names, legends=False)
    return Section(f"c{number}", comparison, summary, table, columns(table, comparison.reference), plots)


def _write_pictures(section: Section, names: Sequence[str], folder: Path, prefix: str) -> None:
    """Write every plot of a section as it looks with all arms, on white."""
    for plot in draw(section.comparison, section.summary, names, legends=True):
        for form in _FORMS:
            path = folder / f"{prefix}{plot.name}{form}"
            save_picture(path, plot.chart, plot.title, section.comparison.name, width=_PICTURE_WIDTH)


def _html(sections: Sequence[Section], places: dict[str, int]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    scripts = [_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")), _script(_asset("report.js"))]
    names = [section.comparison.name for section in sections]
    return environment.get_template("report.html.jinja").render(
        title=names[0] if len(names) == 1 else f"{len(names)} comparisons",
        sections=sections,
        places=places,
        verdicts=_VERDICTS,
        points=points,
        rate=rate,
        shape=lambda name: SHAPES[places[name] % len(SHAPES)],
        style=Markup(_asset("report.css") + _variables(LIGHT, DARK, len(places))),
        data=_inline_json(_data(sections)),
        scripts=scripts,
        hashes=" ".join(_hash(script) for script in scripts),
        version=__version__,
    )


def _data(sections: Sequence[Section]) -> dict[str, Any]:
    """Return what the page's script draws from."""
    return {
        "configs": {"light": chart_config(LIGHT, alone=False), "dark": chart_config(DARK, alone=False)},
        "sections": [
            {
                "id": section.id,
                "arms": [arm.name for arm in section.comparison.arms],
                "charts": [
                    {"id": f"{section.id}-{plot.name}", "spec": {**chart_spec(plot.chart), "width": "container"}}
                    for plot in section.plots
                ],
            }
            for section in sections
        ],
    }


def _inline_json(value: Any) -> Markup:
    """Return JSON that cannot end the script element it stands in, nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _script(text: str) -> Markup:
    """Return our own JavaScript as the content of a script element."""
    return Markup(text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _hash(script: str) -> str:
    """Return the name under which a Content-Security-Policy allows this one script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _variables(light: Colors, dark: Colors, arms: int) -> str:
    """Return the colors as CSS variables, light ones and those for dark."""

    def block(colors: Colors) -> str:
        roles = {"background": colors.background, "ink": colors.ink, "muted": colors.muted, "line": colors.grid}
        roles |= {f"arm-{place}": colors.arms[place % len(colors.arms)] for place in range(arms)}
        return ":root { " + " ".join(f"--{name}: {color};" for name, color in roles.items()) + " }"

    return f"{block(light)}\n@media (prefers-color-scheme: dark) {{ {block(dark)} }}\n"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _in_words(numbers: Sequence[int]) -> str:
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}" if numbers else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "comparison"
