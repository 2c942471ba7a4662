"""`loraplex export`: an adapter in the form that a target loads, reloaded and compared before it is put in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraplex.cli.evaluate import _FORMATS


@click.command()
@click.argument("adapter")
@click.option("--to", type=click.Choice(["peft", "vllm", "merged", "gguf"]), required=True, help="What shall load it.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write; ADAPTER-TARGET when left out.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in the output folder.")
@click.option("--model", help="Base model instead of the one named in the adapter folder.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of what is written. auto: float32; for 'merged' that of the base model.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference of a logit, as a share of the largest logit. Default: by the data type.",
)
@click.option("--dequantize", is_flag=True, help="'merged' on a quantized base: write dequantized weights.")
@click.option(
    "--data", "sources", multiple=True, help="Rows to compare on: file, hub id, builtin:NAME, benchmark:FILE."
)
@click.option("--format", "form", type=click.Choice(_FORMATS), default="auto", show_default=True, help="Their form.")
@click.option("--limit", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of each source at most.")
@click.option(
    "--static-gates",
    "calibration",
    metavar="CALIBRATION",
    help="Routed adapters: fix the gates at their means over these rows. An approximation; what it loses is reported.",
)
@click.option("--calibration-limit", type=click.IntRange(min=1), default=256, show_default=True, help="Rows at most.")
@click.option("--per-task", is_flag=True, help="With --static-gates: one folder per value of their 'task' field.")
def export(adapter: str, to: str, output: Path | None, sources: tuple[str, ...], **options: Any) -> None:
    """Write ADAPTER in the form that PEFT, vLLM, transformers or llama.cpp load, and prove it.

    The result is read back, by PEFT or transformers, for vLLM and llama.cpp by their rules, and its logits are
    compared on real text; when they differ by more than the tolerance, the command fails and nothing is put in place.
    What has no exact form is refused with the reason. ADAPTER is an adapter folder, a run folder or a hub id.
    """
    calibration, most, per_task = (options.pop(key) for key in ("calibration", "calibration_limit", "per_task"))
    if per_task and not calibration:
        raise click.UsageError("--per-task belongs to --static-gates")
    if options["dequantize"] and to != "merged":
        raise click.UsageError("--dequantize belongs to --to merged")
    from loraplex.data import DataOptions
    from loraplex.export.exporting import ExportRequest, default_output, export_per_task
    from loraplex.export.exporting import export as run
    from loraplex.export.static_gates import StaticGates

    form, limit = options.pop("form"), options.pop("limit")
    data = DataOptions(test=sources, format=form, max_test=limit) if sources else None
    static = StaticGates(DataOptions(test=calibration, format=form, max_test=most)) if calibration else None

    def say(topic: str, text: str) -> None:
        click.echo(f"{topic + ':':10} {text}")

    target = output or default_output(adapter, to)
    order = ExportRequest(adapter=adapter, to=to, output=target, data=data, static=static, **options)
    if per_task:
        export_per_task(order, say)
        say("done", str(order.output))
    else:
        say("done", str(run(order, say).folder))
