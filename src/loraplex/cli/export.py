"""`loraplex export`: an adapter in the form that a target loads, reloaded and compared before it is put in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser, WrongUsageError, add_keys, in_words_of, number, section, whole

if TYPE_CHECKING:
    from argparse import Namespace

DESCRIPTION = """Write ADAPTER in the form that PEFT, vLLM, transformers or llama.cpp load, and prove it.

The result is read back, by PEFT or transformers, for vLLM and llama.cpp by their rules, and its logits are
compared on real text; when they differ by more than the tolerance, the command fails and nothing is put in place.
What has no exact form is refused with the reason. ADAPTER is an adapter folder, a run folder or a hub id."""

TARGETS = ("peft", "vllm", "merged", "gguf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KEYS = {"--data": "data.test", "--format": "data.format", "--limit": "data.max_test"}
CHANGED: dict[str, dict[str, Any]] = {
    "--data": {
        "help": "Rows to compare on: file, hub id, builtin:NAME, benchmark:FILE; may be given several times.",
    },
    "--limit": {"default": 8},
}


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("adapter", metavar="ADAPTER")
    made.add_argument("--to", choices=TARGETS, required=True, help="What shall load it.")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="Folder to write; ADAPTER-TARGET when left out.")
    made.add_argument("--overwrite", action="store_true", help="Replace an earlier export in the output folder.")
    made.add_argument("--model", help="Base model instead of the one named in the adapter folder.")
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="Of what is written. auto: float32; for 'merged' that of the base model. [auto]",
    )
    made.add_argument(
        "--tolerance",
        type=number(0),
        metavar="SHARE",
        help="Largest difference of a logit, as a share of the largest logit. Default: by the data type.",
    )
    made.add_argument(
        "--dequantize", action="store_true", help="'merged' on a quantized base: write dequantized weights."
    )
    add_keys(made, KEYS, CHANGED)
    made.add_argument(
        "--static-gates",
        dest="calibration",
        metavar="CALIBRATION",
        help="Routed adapters: fix the gates at their means over these rows. An approximation; what it loses is "
        "reported.",
    )
    made.add_argument("--calibration-limit", type=whole(1), default=256, metavar="N", help="Rows at most. [256]")
    made.add_argument(
        "--per-task", action="store_true", help="With --static-gates: one folder per value of their 'task' field."
    )
    return made


def run(arguments: Namespace) -> None:
    """Export, and say what was written and how well it agrees."""
    if arguments.per_task and not arguments.calibration:
        raise WrongUsageError("--per-task belongs to --static-gates")
    if arguments.dequantize and arguments.to != "merged":
        raise WrongUsageError("--dequantize belongs to --to merged")
    with in_words_of(KEYS):
        _export(arguments)


def _export(arguments: Namespace) -> None:
    from loraplex.data import DataOptions
    from loraplex.export.exporting import ExportRequest, default_output, export, export_per_task
    from loraplex.export.static_gates import StaticGates

    rows = section(arguments, "data")
    calibration = {**rows, "test": arguments.calibration, "max_test": arguments.calibration_limit}
    order = ExportRequest(
        adapter=arguments.adapter,
        to=arguments.to,
        output=arguments.output or default_output(arguments.adapter, arguments.to),
        overwrite=arguments.overwrite,
        model=arguments.model,
        dtype=arguments.dtype,
        tolerance=arguments.tolerance,
        dequantize=arguments.dequantize,
        data=DataOptions(**rows) if rows["test"] else None,
        static=StaticGates(DataOptions(**calibration)) if arguments.calibration else None,
    )

    def say(topic: str, text: str) -> None:
        print(f"{topic + ':':10} {text}")

    if arguments.per_task:
        export_per_task(order, say)
        say("done", str(order.output))
    else:
        say("done", str(export(order, say).folder))
