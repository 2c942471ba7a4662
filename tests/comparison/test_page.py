"""The report as data: what is in the page, the table and the charts. test_browser.py opens it."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tests.comparison.simulated import ARMS, HOSTILE, OUT_OF_MEMORY, Kind, simulated, with_hostile_names

from loraplex.comparison import table
from loraplex.comparison.charts import draw
from loraplex.comparison.curves import course, rank_map
from loraplex.comparison.page import write_report
from loraplex.comparison.results import Comparison
from loraplex.comparison.scene import SHOWN, Plot
from loraplex.comparison.statistics import summarize
from loraplex.comparison.theme import DARK, LIGHT, SHAPES, arm_places

SMALL = (Kind("lora", "lora r=4", 0.5, 4000, 1.0), Kind("dora", "dora r=4", 0.6, 4010, 1.2))


class Page(HTMLParser):
    """The elements of a page: tags with attributes, the text outside of scripts, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return simulated()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, comparison: Comparison) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert write_report([comparison], folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def plots_of(comparison: Comparison) -> dict[str, Plot]:
    names = list(arm_places([comparison]))
    return {plot.name: plot for plot in draw(comparison, summarize(comparison), names, legends=False)}


def written(tmp_path: Path, *comparisons: Comparison) -> Page:
    return Page(write_report(comparisons, tmp_path).read_text(encoding="utf-8"))


def test_the_size_stands_before_the_results_and_those_before_the_numbers(page: Page, comparison: Comparison) -> None:
    summary = summarize(comparison)
    parts = [
        comparison.name,
        comparison.description,
        comparison.model,
        comparison.rows,
        comparison.budget,
        summary.beforehand,
        *(contrast.sentence for contrast in summary.contrasts),
        "All numbers",
        "12.5 % of budget",
        OUT_OF_MEMORY,
        "Charts",
        comparison.command,
        *(run.command for arm in comparison.arms for run in arm.runs),
        "Environment",
        "2.13.0",
    ]
    places = [page.text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_the_page_loads_nothing(page: Page, folder: Path) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            address = attributes.get(name) or ""
            assert not address or address.startswith(("#", "data:")), (tag, address)
    assert "@import" not in (folder / "report.html").read_text(encoding="utf-8")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy


def test_every_plot_is_there_as_a_picture(folder: Path, comparison: Comparison) -> None:
    names = set(plots_of(comparison))
    assert names == {
        "accuracy",
        "accuracy-by-parameters",
        "accuracy-by-time",
        "learning-curves",
        "tasks",
        "ranks-1",
        "learning-rates",
    }
    assert {path.stem for path in (folder / "plots").glob("*.svg")} == names
    assert {path.stem for path in (folder / "plots").glob("*.png")} == names
    assert (folder / "plots" / "tasks.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_users_stays_text(tmp_path: Path, comparison: Comparison, page: Page) -> None:
    hostile = written(tmp_path, with_hostile_names(comparison))
    assert len(hostile.scripts) == len(page.scripts) == 3
    # Nothing was opened by a name: what is in `page` and no <b>.
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in page.tags}
    assert hostile.text.count(HOSTILE) > 10
    data = json.loads(hostile.scripts[0])
    assert data["sections"][0]["arms"][0] == HOSTILE
    assert not re.search("[<>&]", hostile.scripts[0])


def test_several_comparisons_have_an_overview_and_the_same_colors(tmp_path: Path) -> None:
    first = simulated("First", SMALL)
    second = simulated("Second", (Kind("vera", "vera", 0.1, 500, 0.9), *reversed(SMALL)), seed=1)
    page = written(tmp_path, first, second)
    assert "2 comparisons Overview" in page.text.replace("loraplex · comparisons ", "")
    assert [a["id"] for tag, a in page.tags if tag == "article"] == ["c0", "c1"]
    data = json.loads(page.scripts[0])
    for section in data["sections"]:
        for chart in section["charts"]:
            assert set(_domains(chart["spec"])) == {("lora", "dora", "vera")}, chart["id"]
    assert (tmp_path / "plots" / "1-first-accuracy.svg").exists()
    assert (tmp_path / "plots" / "2-second-accuracy.svg").exists()


def _domains(spec: dict[str, Any]) -> list[tuple[str, ...]]:
    encodings = [layer["encoding"] for layer in spec["layer"]]
    return [tuple(e["color"]["scale"]["domain"]) for e in encodings if e.get("color", {}).get("field") == "arm"]


def test_every_layer_of_every_chart_can_hide_an_arm(comparison: Comparison) -> None:
    for name, plot in plots_of(comparison).items():
        spec = plot.chart.to_dict()
        shown = next(param for param in spec["params"] if param["name"] == SHOWN)
        assert shown["value"] == [arm.name for arm in comparison.arms]
        for layer in spec["layer"]:
            assert SHOWN in layer["transform"][0]["filter"], name


def test_charts_without_data_are_left_out(comparison: Comparison) -> None:
    bare = [
        replace(arm, trials=[], runs=[replace(run, tasks={}, ranks={}, loss=[]) for run in arm.runs])
        for arm in comparison.arms
    ]
    assert set(plots_of(replace(comparison, arms=bare))) == {"accuracy", "accuracy-by-parameters", "accuracy-by-time"}


def test_only_uneven_ranks_have_a_map(comparison: Comparison) -> None:
    maps = {name: plot.arm for name, plot in plots_of(comparison).items() if plot.arm is not None}
    assert maps == {"ranks-1": "adalora"}


@pytest.mark.parametrize("unfinished", ["failed", "missing"])
def test_a_comparison_without_any_finished_run_has_a_report(tmp_path: Path, unfinished: Any) -> None:
    plain = simulated("Nothing yet", SMALL)
    arms = [
        replace(arm, trials=[], runs=[type(run)(run.seed, unfinished, run.command) for run in arm.runs])
        for arm in plain.arms
    ]
    page = written(tmp_path, replace(plain, arms=arms, base=None, budget_parameters=None, environment={}))
    assert "There is nothing to compare yet" in page.text
    assert "0 of 6 finished" in page.text
    assert ("not run yet" if unfinished == "missing" else "failed without a message") in page.text


def test_one_seed_and_a_loss_that_is_not_a_number_have_a_report(tmp_path: Path) -> None:
    plain = simulated("One seed", SMALL)
    arms = [replace(arm, runs=[replace(arm.runs[0], loss=[(1, 2.0), (2, math.nan)])]) for arm in plain.arms]
    page = written(tmp_path, replace(plain, arms=arms, seeds=[0]))
    curve = next(c for c in json.loads(page.scripts[0])["sections"][0]["charts"] if c["id"] == "c0-learning-curves")
    assert {row["step"] for rows in curve["spec"]["datasets"].values() for row in rows} == {1}
    assert "one seed says nothing" in page.text


def test_one_seed_gives_no_verdict_anywhere_on_the_page(tmp_path: Path) -> None:
    plain = simulated("One seed", SMALL)
    reference, other = (replace(arm, runs=arm.runs[:1]) for arm in plain.arms)
    all_wrong = [replace(item, correct=False) for item in reference.runs[0].items]
    reference = replace(reference, runs=[replace(reference.runs[0], items=all_wrong)])
    once = replace(plain, arms=[reference, other], seeds=[0])
    summary = summarize(once)
    (contrast,) = summary.contrasts
    assert contrast.adjusted_p_value < 1e-9
    row = next(row for row in table.rows(once, summary) if row.name == other.name)
    cells = {column.title: column.cell(row) for column in table.columns([row], once.reference)}
    assert (cells["points"].mark, cells["p"].text) == (None, table.NOTHING)
    for page in (written(tmp_path / "one", once), written(tmp_path / "two", once, replace(once, name="Again"))):
        classes = {attributes.get("class") for _, attributes in page.tags}
        assert "verdict open" in classes
        assert not classes & {"verdict better", "verdict worse"}
        assert "could be detected" not in page.text


def test_the_table_says_what_the_runs_say(comparison: Comparison) -> None:
    summary = summarize(comparison)
    rows = table.rows(comparison, summary)
    assert [row.name for row in rows] == ["base model", *(kind.name for kind in ARMS)]
    columns = {column.title: column for column in table.columns(rows, comparison.reference)}
    assert list(columns) == [
        *("mean", "± seeds", "± items", "points", "p", "parameters", "file"),
        *("s/step", "tokens/s", "memory", "training", "FLOPs", "energy"),
    ]
    dora, vera, failed = rows[2], rows[4], rows[5]
    steps = [run.seconds_per_step for run in dora.runs if run.seconds_per_step is not None]
    assert columns["s/step"].cell(dora).value == sum(steps) / len(steps)
    assert columns["mean"].cell(dora).value == summary.arms[1].mean
    assert columns["energy"].cell(dora).text == "2.75 Wh"
    outside = columns["parameters"].cell(vera)
    assert (outside.text, outside.below, outside.mark) == ("612,480", "12.5 % of budget", "outside")
    assert columns["parameters"].cell(dora).mark is None
    assert columns["mean"].cell(failed).value is None
    assert columns["parameters"].cell(failed).text == "860,160"
    assert [run.error for run in failed.troubles()] == [OUT_OF_MEMORY] * 3
    base = rows[0]
    assert comparison.base is not None
    assert columns["mean"].cell(base).value == comparison.base.accuracy
    assert columns["s/step"].cell(base).value is None


def test_columns_without_any_value_are_left_out(comparison: Comparison) -> None:
    arms = [
        replace(arm, runs=[replace(run, energy_kwh=None, flops=None) for run in arm.runs]) for arm in comparison.arms
    ]
    silent = replace(comparison, arms=arms)
    columns = table.columns(table.rows(silent, summarize(silent)), "lora")
    assert not {"FLOPs", "energy"} & {column.title for column in columns}


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (table.points(0.0123), "+1.2"),
        (table.points(-0.0123), "−1.2"),
        (table.points(-0.0001), "±0.0"),
        (table.duration(42.345), "42.3 s"),
        (table.duration(59.99), "60 s"),
        (table.duration(259), "4 min 19 s"),
        (table.duration(7260), "2 h 01 min"),
        (table.in_bytes(999_950), "1.00 MB"),
        (table.in_bytes(512), "512 B"),
        (table.with_prefix(1.9e14), "190 T"),
        (table.energy(0.0021), "2.10 Wh"),
        (table.rate(5e-4), "5e-4"),
        (table.rate(1.5e-3), "1.5e-3"),
    ],
)
def test_numbers_are_written_as_people_read_them(shown: str, text: str) -> None:
    assert shown == text


def test_a_learning_curve_keeps_its_ends_and_its_level() -> None:
    curve = course([(step, 1.0) for step in range(1, 2001)])
    assert len(curve) <= 160
    assert curve[-1] == (2000, 1.0)
    assert {value for _, value in curve} == {1.0}
    assert course([]) == []
    short = course([(1, 3.0), (2, 1.0), (3, 2.0)])
    assert [step for step, _ in short] == [1, 2, 3]


def test_a_rank_map_is_sorted_by_layer_and_averages_over_seeds() -> None:
    cells = rank_map(
        [
            {"lm_head": 3, "model.layers.10.mlp.up_proj": 4, "model.layers.2.mlp.up_proj": 8},
            {"lm_head": 5, "model.layers.10.mlp.up_proj": 4, "model.layers.2.mlp.up_proj": 0},
        ]
    )
    assert cells == [("2", "mlp.up_proj", 4.0), ("10", "mlp.up_proj", 4.0), ("–", "lm_head", 4.0)]


# Machado, Oliveira and Fernandes (IEEE TVCG 15, 2009): full color blindness, in linear sRGB.
VISION = {
    "normal": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linear(color: str) -> list[float]:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def oklab(rgb: list[float]) -> list[float]:
    cones = (
        (0.4122214708, 0.5363325363, 0.0514459929),
        (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005),
    )
    axes = (
        (0.2104542553, 0.7936177850, -0.0040720468),
        (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660),
    )
    roots = [max(0.0, sum(w * c for w, c in zip(row, rgb, strict=True))) ** (1 / 3) for row in cones]
    return [sum(w * root for w, root in zip(row, roots, strict=True)) for row in axes]


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_colors_of_arms_are_told_apart(colors: Any, vision: str) -> None:
    seen = [
        oklab(
            [min(1.0, max(0.0, sum(w * c for w, c in zip(row, linear(color), strict=True)))) for row in VISION[vision]]
        )
        for color in colors.arms
    ]
    assert min(math.dist(one, other) for one, other in combinations(seen, 2)) > 0.085


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colors_are_seen_on_their_background(colors: Any) -> None:
    def contrast(color: str) -> float:
        light = [
            sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (color, background)
        ]
        return (max(light) + 0.05) / (min(light) + 0.05)

    background = colors.background
    assert min(map(contrast, colors.arms)) >= 3
    assert min(contrast(colors.ink), contrast(colors.muted)) >= 4.5


def test_color_and_shape_tell_many_arms_apart() -> None:
    looks = {(place % len(LIGHT.arms), place % len(SHAPES)) for place in range(40)}
    assert len(looks) == 40
