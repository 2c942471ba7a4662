"""The report in a real browser: Chromium without a window, and without a way to any network."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from tests.comparison.simulated import ARMS, HOSTILE, simulated, with_hostile_names

from loraplex.comparison.page import write_report
from loraplex.comparison.statistics import summarize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)
PHONE, DESK = 390, 1440

# The arms of all marks that are drawn, by chart, and those marked as on the Pareto front.
DRAWN = """
const arms = (item, found) => {
  if (item.datum && item.datum.arm !== undefined) found.add(item.datum.arm);
  for (const inner of item.items || []) arms(inner, found);
  return found;
};
return Object.fromEntries([...document.querySelectorAll(".chart")]
  .filter((place) => place.offsetParent !== null)
  .map((place) => [place.id, [...arms(place.embedded.view.scenegraph().root, new Set())].sort()]));
"""
FRONT = """
const found = [];
const walk = (item) => {
  if (item.marktype === "symbol" && item.items.some((mark) => mark.size > 250)) {
    found.push(...item.items.map((mark) => mark.datum.arm));
  } else for (const inner of item.items || []) walk(inner);
};
walk(document.getElementById(arguments[0]).embedded.view.scenegraph().root);
return found.sort();
"""
# Texts of the charts with their boxes, and the box of the figure around them.
TEXTS = """
return [...document.querySelectorAll(".chart svg text")].filter(
  // Axis labels that would overlap are there but not seen; a cross marks a point.
  (text) => text.textContent.replace("×", "") && getComputedStyle(text).opacity !== "0",
).map((text) => {
  const box = (element) => { const b = element.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; };
  return {
    text: text.textContent, chart: text.closest(".chart").id, box: box(text), figure: box(text.closest("figure")),
    size: parseFloat(getComputedStyle(text).fontSize), halo: text.getAttribute("stroke-width") !== null,
  };
});
"""


class Browser:
    """A page in Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = DESK, scheme: str = "light") -> None:
        """Open a file at a width, and wait until its charts are drawn."""
        # Both logs begin anew.
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer(scheme)
        self.driver.get(path.as_uri())
        self.wait_until_drawn(scheme)

    def prefer(self, scheme: str) -> None:
        """Let the system prefer light or dark colors."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def wait_until_drawn(self, scheme: str) -> None:
        """Wait until all charts have the colors of `scheme`."""
        script = "return document.documentElement.dataset.drawn"
        WebDriverWait(self.driver, 30).until(lambda driver: driver.execute_script(script) == scheme)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what the script returns."""
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def all(self, selector: str) -> list[WebElement]:
        """Return the elements that match."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """Return the first element that matches."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def column(self, title: str) -> list[str]:
        """Return the first lines of a column of the table of numbers, from top to bottom."""
        heads = [button.text.rstrip("↑↓") for button in self.all("#c0 .numbers .heads button")]
        place = heads.index(title) + 1
        cells = self.all(f"#c0 .numbers tbody tr:not([hidden]) > :nth-child({place})")
        return [cell.text.split("\n")[0] for cell in cells]

    def head(self, title: str) -> WebElement:
        """Return the button in a heading of the table of numbers."""
        return next(b for b in self.all("#c0 .numbers .heads button") if b.text.rstrip("↑↓") == title)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([simulated()], tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    arguments = ["--headless=new", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    # Chromium's sandbox does not work for root.
    for argument in [*arguments, "--no-sandbox"] if os.geteuid() == 0 else arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver)
    driver.quit()


def test_the_console_is_silent_and_nothing_is_loaded(browser: Browser, report: Path) -> None:
    browser.open(report)
    for box in browser.all(".arms input"):
        box.click()
    for button in browser.all(".heads button"):
        button.click()
    browser.prefer("dark")
    browser.wait_until_drawn("dark")
    assert browser.driver.get_log("browser") == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [report.as_uri()]
    assert browser.run("return performance.getEntriesByType('resource').filter((e) => e.name.startsWith('http'))") == []


def test_the_page_runs_no_script_but_its_own(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.run("const s = document.createElement('script'); s.text = 'window.foreign = 1'; document.body.append(s);")
    assert browser.run("return window.foreign") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.driver.get_log("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_sticks_out_and_every_text_of_a_chart_is_whole(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    browser.open(report, width, scheme)
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true;")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run("return window.innerWidth") == width
    texts = browser.run(TEXTS)
    assert len({text["chart"] for text in texts}) == 7
    for text in texts:
        (left, right, top, bottom), (low, high, above, below) = text["box"], text["figure"]
        assert low <= left, text
        assert right <= high, text
        assert above <= top, text
        assert bottom <= below, text
        assert text["size"] >= 12, text
    assert browser.run("return parseFloat(getComputedStyle(document.querySelector('table')).fontSize)") >= 13


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_labels_in_a_chart_do_not_overlap(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width)
    texts = [text for text in browser.run(TEXTS) if not text["halo"]]
    for one, other in combinations(texts, 2):
        if one["chart"] == other["chart"]:
            (l1, r1, t1, b1), (l2, r2, t2, b2) = one["box"], other["box"]
            across, down = min(r1, r2) - max(l1, l2), min(b1, b2) - max(t1, t2)
            # Line boxes are higher than letters: neighbors in a list may touch.
            assert across <= 0 or down <= 4, (one["text"], other["text"], one["chart"])


def test_a_heading_sorts_and_says_so(browser: Browser, report: Path) -> None:
    browser.open(report)
    before = browser.column("arm")
    assert before == ["base model", ["lora", "reference"][0], "dora", "adalora", "vera", "lora-xs"]
    browser.head("mean").click()
    values = browser.column("mean")
    numbers = [float(value) for value in values[:-1]]
    assert numbers == sorted(numbers, reverse=True)
    assert values[-1] == "–", "rows without a value come last"
    head = browser.head("mean").find_element(By.XPATH, "..")
    assert head.get_attribute("aria-sort") == "descending"
    browser.head("mean").click()
    values = browser.column("mean")
    assert [float(value) for value in values[:-1]] == sorted(numbers)
    assert values[-1] == "–"
    assert head.get_attribute("aria-sort") == "ascending"
    browser.head("arm").click()
    assert browser.column("arm") == sorted(before)
    assert head.get_attribute("aria-sort") == "none"


def test_the_keyboard_sorts_too(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.run("arguments[0].focus()", browser.head("parameters"))
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.column("parameters")[:3] == ["612,480†", "860,160†", "4,880,000"]
    browser.driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert browser.column("parameters")[0] == "4,921,344"
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.driver.switch_to.active_element.text == "file"


@pytest.mark.parametrize("arm", ["dora", "adalora"])
def test_a_checkbox_hides_an_arm_in_the_table_and_in_all_charts(browser: Browser, report: Path, arm: str) -> None:
    browser.open(report)
    drawn = browser.run(DRAWN)
    assert len(drawn) == 7
    assert all(arm in arms for chart, arms in drawn.items() if chart != "c0-ranks-1")
    place = [kind.name for kind in ARMS].index(arm)
    box = browser.one(f"#c0 .arms input[data-arm='{place}']")
    browser.run("arguments[0].focus()", box)
    box.send_keys(Keys.SPACE)
    WebDriverWait(browser.driver, 10).until(
        lambda _: not any(arm in arms for arms in browser.run(DRAWN).values()), f"{arm} is still in a chart"
    )
    hidden = browser.run(DRAWN)
    # A chart about this arm alone is gone, the others show the other arms as before.
    assert set(drawn) - set(hidden) == ({"c0-ranks-1"} if arm == "adalora" else set())
    assert all(set(arms) == set(drawn[chart]) - {arm} for chart, arms in hidden.items())
    assert arm not in browser.column("arm")
    box.send_keys(Keys.SPACE)
    WebDriverWait(browser.driver, 10).until(lambda _: browser.run(DRAWN) == drawn, f"{arm} did not come back")
    assert arm in browser.column("arm")


def test_an_arm_stays_hidden_when_the_colors_change(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.one("#c0 .arms input[data-arm='1']").click()
    browser.prefer("dark")
    browser.wait_until_drawn("dark")
    assert not any("dora" in arms for arms in browser.run(DRAWN).values())


def test_the_front_is_made_of_the_arms_that_are_shown(browser: Browser, report: Path) -> None:
    comparison = simulated()
    times = {
        arm.name: [run.training_seconds or 0.0 for run in arm.runs if run.state == "finished"]
        for arm in comparison.arms
    }
    places = {row.arm: (sum(times[row.arm]) / len(times[row.arm]), row.mean) for row in summarize(comparison).arms}

    def front(arms: set[str]) -> list[str]:
        beaten = {
            arm
            for arm in arms
            for other in arms - {arm}
            if places[other][0] <= places[arm][0] and places[other][1] >= places[arm][1]
        }
        return sorted(arms - beaten)

    browser.open(report)
    assert browser.run(FRONT, "c0-accuracy-by-time") == front(set(places))
    for hidden in ("lora", "dora"):
        place = [kind.name for kind in ARMS].index(hidden)
        browser.one(f"#c0 .arms input[data-arm='{place}']").click()
        del places[hidden]
        WebDriverWait(browser.driver, 10).until(
            lambda _: browser.run(FRONT, "c0-accuracy-by-time") == front(set(places))
        )


def test_commands_can_be_copied(browser: Browser, report: Path) -> None:
    browser.open(report)
    button = browser.one("#c0 button.copy")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    WebDriverWait(browser.driver, 5).until(lambda _: button.text == "Copied")
    # Where a paste goes: into a field of the test's own.
    browser.run("const t = document.createElement('textarea'); t.id = 'paste'; document.body.append(t); t.focus();")
    browser.one("#paste").send_keys(Keys.CONTROL, "v")
    assert browser.one("#paste").get_property("value") == simulated().command


def test_hostile_names_are_shown_and_nothing_else_happens(browser: Browser, tmp_path: Path) -> None:
    comparison = with_hostile_names(simulated())
    path = write_report([comparison, simulated("Another", ARMS[:2], 1)], tmp_path)
    browser.open(path, PHONE)
    assert browser.driver.get_log("browser") == []
    assert browser.all("b") == []
    assert HOSTILE in browser.run(DRAWN)["c0-accuracy"]
    assert HOSTILE in browser.column("arm")[1]
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    # Sections are independent of each other.
    browser.one("#c1 .arms input").click()
    WebDriverWait(browser.driver, 10).until(lambda _: "lora" not in browser.run(DRAWN)["c1-accuracy"])
    assert HOSTILE in browser.run(DRAWN)["c0-accuracy"]
