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
def export(adapter: str, to: str, output: Path | None, sources: tuple[str, ...], **options: Any) -> None:
    """Write ADAPTER in the form that PEFT, vLLM, transformers or llama.cpp load, and prove it.

    The result is reloaded by the target's own loader and its logits are compared on real text; when they differ by
    more than the tolerance, the command fails and nothing is put in place. What has no exact form is refused with the
    reason. ADAPTER is an adapter folder, a run folder or a hub id.
    """
    if options["dequantize"] and to != "merged":
        raise click.UsageError("--dequantize belongs to --to merged")
    from loraplex.data import DataOptions
    from loraplex.export.exporting import Order, default_output
    from loraplex.export.exporting import export as run

    form, limit = options.pop("form"), options.pop("limit")
    data = DataOptions(test=sources, format=form, max_test=limit) if sources else None

    def say(topic: str, text: str) -> None:
        click.echo(f"{topic + ':':10} {text}")

    order = Order(adapter=adapter, to=to, output=output or default_output(adapter, to), data=data, **options)
    done = run(order, say)
    say("done", str(done.folder))
