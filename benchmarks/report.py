"""Fills docs/performance.md from the results: what stands between its markers is written here, the rest by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, results
from benchmarks.rounds import ROOT
from benchmarks.terminal import output
from loraplex.files import write_atomically

PAGE = ROOT / "docs" / "performance.md"
NAMES = {
    "ours": "loraplex",
    "ours-lora": "loraplex LoRA",
    "ours-mlp": "loraplex, MLP only",
    "ours-lora-mlp": "loraplex LoRA, MLP only",
    "echo-never": "loraplex LoRA under echo, no second pass (p = 0)",
    "echo-always": "loraplex LoRA under echo, always a second pass (p = 1)",
    "echo-full": "the same, the second pass over everything",
    "ours-bare": "loraplex, forward and backward alone",
    "peft-best": "PEFT, padding-free (its best)",
    "peft-padded": "PEFT, padded",
    "peft-shipped": "PEFT, shipped defaults",
    "limit": "the limit: frozen model, no adapters",
    "lm-eval-default": "lm-evaluation-harness, its default batch size of 1",
    "lm-eval-best": "lm-evaluation-harness, its best batch size",
    "passes": "forward and backward over the same batches, as in training",
    "hetero-all": "HeteroLoRA that keeps every site",
    "hetero-quarter": "HeteroLoRA, a quarter of the sites on",
    "hetero-proportional": "HeteroLoRA, ranks in proportion to a quarter of the budget",
    "alora": "ALoRA, with room for eight more ranks",
    "ours-lora-room": "loraplex LoRA with the ranks that ALoRA has room for",
}
_PEERS = ("peft", "PEFT", "lm-eval", "trl")
"""How the names of other projects' contestants begin."""
_COMMANDS = {
    "training-lora": "training --only lora",
    "training-dora": "training --only dora",
    "training-pair": "training --only pair",
    "training-compact": "training --only compact",
    "training-hydra": "training --only hydra",
    "training-echo": "training --only echo",
    "layers": "layers",
    "routed-layers": "routed-layers",
    "allocation-scoring": "allocation --only scoring",
    "allocation-steps": "allocation --only steps",
    "evaluation": "evaluation",
    "startup": "startup",
    "growth": "growth",
}

Result = dict[str, Any]


def run(folder: Path) -> None:
    """Draw the plots and fill every section that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    found = {name: results.read(name, folder) for name in _COMMANDS}
    plots.draw({name: result for name, result in found.items() if result}, PAGE.parent / "performance")
    for name, result in found.items():
        rounds = f" --rounds {result['rounds']}" if result else ""
        repeat = f"Repeat with `python -m benchmarks {_COMMANDS[name]}{rounds}`."
        body = "Not measured yet." if result is None else "\n\n".join([*_SECTIONS[name](result), _ran_on(result)])
        text = _filled(text, name, f"{body}\n\n{repeat}")
    write_atomically(PAGE, text)
    output.print(f"written to {PAGE.relative_to(ROOT)}")


def _filled(text: str, name: str, body: str) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"{PAGE.name} has no markers for {name}"
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _contest(result: Result) -> list[str]:
    """Return rates and peaks, ratios, and what the peers do better."""
    rates = _table(
        ["", f"{result['unit']}/s", "peak memory, MB", "of it above the loaded model, MB"],
        (
            [
                NAMES.get(name, name),
                f"{record['rate']:.1f}",
                f"{record['peak_bytes'] / 1e6:.0f}",
                f"{(record['peak_bytes'] - record['loaded_bytes']) / 1e6:.0f}",
            ]
            for name, record in result["contestants"].items()
        ),
    )
    return [rates, _ratios(result), ahead(result["comparisons"])]


def _ratios(result: Result) -> str:
    return _table(
        ["", "over", "what", "median ratio", "95 % interval", "goal"],
        (
            [
                NAMES.get(entry["of"], entry["of"]),
                NAMES.get(entry["over"], entry["over"]),
                entry["quantity"],
                f"{entry['median']:.3f}",
                results.bounds(entry),
                results.goal(entry),
            ]
            for entry in result["comparisons"]
        ),
    )


def ahead(comparisons: Iterable[Result]) -> str:
    """Return the lines that say where another project is ahead, and where a goal is missed."""
    entries = list(comparisons)
    lost = [entry for entry in entries if entry["over"].startswith(_PEERS) and not entry["ahead"]]
    missed = [entry for entry in entries if entry["reached"] is False]
    lines = [
        f"**{NAMES.get(entry['over'], entry['over'])} is ahead** of {NAMES.get(entry['of'], entry['of'])} in "
        f"{entry['quantity']}: ratio {entry['median']:.3f}."
        for entry in lost
    ] or ["No peer is ahead in this table."]
    lines += [
        f"Goal missed: {entry['quantity']} of {NAMES.get(entry['of'], entry['of'])} over "
        f"{NAMES.get(entry['over'], entry['over'])} is {entry['median']:.3f} ({results.bounds(entry)}), "
        f"wanted {entry['goal']:g}."
        for entry in missed
    ]
    return "\n".join(f"* {line}" for line in lines)


def _training(result: Result) -> list[str]:
    adapter = result["benchmark"].removeprefix("training-")
    return [*_contest(result), f"![{adapter} training](performance/{result['benchmark']}.png)"]


def _layers(result: Result) -> list[str]:
    head = ["adapter, weights", "in × out", "tokens", "ours, ms", "PEFT, ms", "median ratio", "95 % interval", "goal"]
    rows, comparisons = [], []
    for layer in result["layers"]:
        shape = f"{layer['in_features']} × {layer['out_features']}"
        of = f"{layer['adapter']} {layer['dtype']}"
        ours, peers = (f"{1e3 * middle(layer['seconds'][name]):.1f}" for name in ("ours", "peft"))
        entry = {**layer, "quantity": "speed", "of": f"{of} {shape}, {layer['tokens']} tokens", "over": "PEFT's layer"}
        ratio = [f"{layer['median']:.2f}", results.bounds(layer), results.goal(entry)]
        rows.append([of, shape, str(layer["tokens"]), ours, peers, *ratio])
        comparisons.append(entry)
    return [_table(head, rows), ahead(comparisons), "![layers](performance/layers.png)"]


def _routed_layers(result: Result) -> list[str]:
    head = ["over", "tokens", "dropout", "ours, ms", "theirs, ms", "frozen, ms", "what", "median", "95 %", "goal"]
    rows, comparisons = [], []
    for layer in result["layers"]:
        names = ("ours", layer["over"], "frozen")
        times = [f"{1e3 * middle(layer['seconds'][name]):.1f}" for name in names]
        for what, title in (("whole", "whole pass"), ("added", "frozen products taken off")):
            entry = {**layer[what], "quantity": "speed", "over": layer["over"]}
            entry["of"] = f"ours at {layer['tokens']} tokens, dropout {layer['dropout']}, {title},"
            place = [layer["over"], str(layer["tokens"]), str(layer["dropout"]), *times, title]
            rows.append([*place, f"{entry['median']:.2f}", results.bounds(entry), results.goal(entry)])
            comparisons.append(entry)
    return [_table(head, rows), ahead(comparisons)]


def _scoring(result: Result) -> list[str]:
    count = result["settings"]["batches"]
    head = ["", "passes counted, forward", "backward", f"in passes of training, {count} + 1 wanted", "95 % interval"]
    rows = []
    for entry in result["comparisons"]:
        passes = result["passes"][entry["of"]]
        scaled = [f"{count * value:.2f}" for value in (entry["median"], entry["low"], entry["high"])]
        rows.append([entry["of"], str(passes["forward"]), str(passes["backward"]), scaled[0], " – ".join(scaled[1:])])
    return [_table(head, rows), *_contest(result)]


def _evaluation(result: Result) -> list[str]:
    head = ["", "accuracy", "items", "answered otherwise than by loraplex"]
    rows = (
        [NAMES[name], f"{entry['accuracy']:.3f}", str(entry["items"]), str(entry["answered_otherwise"])]
        for name, entry in result["accuracy"].items()
    )
    probed = ", ".join(f"{size}: {rate:.1f}" for size, rate in result["batch_sizes_probed"].items())
    return [
        *_contest(result),
        _table(head, rows),
        f"Items per second of the harness by batch size: {probed}.",
        "![evaluation](performance/evaluation.png)",
    ]


def _startup(result: Result) -> list[str]:
    head = ["command", "median s", "95 % interval", "goal"]
    rows = (
        [f"`{name}`", f"{entry['median']:.3f}", results.bounds(entry), results.goal({**entry, "quantity": "time"})]
        for name, entry in result["seconds"].items()
    )
    return [_table(head, rows), ahead(result["comparisons"])]


def _growth(result: Result) -> list[str]:
    head = ["varies", "value", "ours, tokens/s", "PEFT's best", "ratio", "ours, peak MB", "PEFT's best", "ratio"]
    rows, comparisons = [], []
    for point in result["points"]:
        ours, peers = (point["contestants"][name] for name in ("ours", "peft-best"))
        speed, memory = point["comparisons"]
        rates = [f"{side['rate']:.0f}" for side in (ours, peers)]
        peaks = [f"{side['peak_bytes'] / 1e6:.0f}" for side in (ours, peers)]
        ratios = [f"{entry['median']:.2f}" for entry in (speed, memory)]
        rows.append([point["axis"], str(point["value"]), *rates, ratios[0], *peaks, ratios[1]])
        place = f"loraplex at {point['axis']} {point['value']}"
        comparisons += [{**speed, "of": place}, {**memory, "of": place}]
    return [_table(head, rows), ahead(comparisons), "![growth](performance/growth.png)"]


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return sorted(values)[len(values) // 2]


def _ran_on(result: Result) -> str:
    ran = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
    return (
        f"{result['rounds']} counted rounds after {result['warm_up']}; {ran['date']}, commit {ran['commit']}, "
        f"{ran['cpu']}, {ran['threads']} threads of {ran['cores']} cores, load before {ran['load_before']}; {versions}."
    )


_SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "training-lora": _training,
    "training-dora": _training,
    "training-pair": _training,
    "training-compact": _training,
    "training-hydra": _training,
    "training-echo": _training,
    "layers": _layers,
    "routed-layers": _routed_layers,
    "allocation-scoring": _scoring,
    "allocation-steps": _contest,
    "evaluation": _evaluation,
    "startup": _startup,
    "growth": _growth,
}
