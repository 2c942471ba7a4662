"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Charts: drawn in the colors of the browser's scheme, and again when that changes.

  const shownArms = (section) =>
    section.arms.filter((_, place) => boxes(section).find((box) => Number(box.dataset.arm) === place).checked);

  const boxes = (section) => [...document.querySelectorAll(`fieldset[data-section="${section.id}"] input`)];

  async function drawChart(section, chart) {
    const place = document.getElementById(chart.id);
    if (place.embedded) place.embedded.finalize();
    const theme = dark.matches ? "dark" : "light";
    place.embedded = await window.vegaEmbed(place, chart.spec, {
      mode: "vega-lite",
      config: data.configs[theme],
      // Looks come from the page's own style sheet, which follows the scheme by itself.
      tooltip: { theme: "page", disableDefaultStyle: true },
      actions: false,
      renderer: "svg",
      // Errors only: a warning is about a scale without data, as when every arm is hidden.
      logLevel: 1,
      // Expressions are interpreted, so that the page can forbid the evaluation of text as code.
      ast: true,
    });
    await place.embedded.view.signal("shown", shownArms(section)).runAsync();
  }

  async function drawAll() {
    for (const section of data.sections) {
      for (const chart of section.charts) await drawChart(section, chart);
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  // Arms: one checkbox hides an arm in the table and in every chart of its section.

  async function showArms(section) {
    const article = document.getElementById(section.id);
    for (const box of boxes(section)) {
      for (const element of article.querySelectorAll(`tr[data-arm="${box.dataset.arm}"], figure[data-arm="${box.dataset.arm}"]`)) {
        element.hidden = !box.checked;
      }
    }
    const shown = shownArms(section);
    for (const chart of section.charts) {
      const place = document.getElementById(chart.id);
      // A figure that has just become visible measures its width again.
      if (place.embedded) await place.embedded.view.signal("shown", shown).resize().runAsync();
    }
    window.dispatchEvent(new Event("resize"));
  }

  // Tables: the heading's button sorts; rows without a value stay at the end.

  function sortBy(head) {
    const row = head.parentElement;
    const column = [...row.children].indexOf(head);
    const first = head.querySelector("button").dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of row.children) each.setAttribute("aria-sort", each === head ? order : "none");
    const sign = order === "ascending" ? 1 : -1;
    const body = row.closest("table").tBodies[0];
    const key = (tr) => {
      const cell = tr.children[column];
      if (cell.dataset.text !== undefined) return cell.dataset.text;
      return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
    };
    const compare = (a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === null || right === null) return (left === null) - (right === null);
      return sign * (typeof left === "string" ? left.localeCompare(right) : left - right);
    };
    body.append(...[...body.rows].sort(compare));
  }

  // A shadow at the right edge says that a table goes on.

  const markEdge = (scroll) =>
    scroll.parentElement.classList.toggle("more", scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft > 4);

  // Commands: to the clipboard, also where the browser offers it only the old way.

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      window.getSelection().removeAllRanges();
      window.getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  for (const section of data.sections) {
    for (const box of boxes(section)) box.addEventListener("change", () => showArms(section));
  }
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", () => copy(button));
  }
  for (const scroll of document.querySelectorAll(".scroll")) {
    scroll.addEventListener("scroll", () => markEdge(scroll), { passive: true });
    new ResizeObserver(() => markEdge(scroll)).observe(scroll);
  }
  dark.addEventListener("change", drawAll);
  drawAll();
})();
