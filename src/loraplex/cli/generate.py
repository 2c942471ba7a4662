"""`loraplex generate`: an adapter with its base model continues one prompt, token by token."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from loraplex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@click.command()
@click.argument("adapter")
@click.option("--prompt", required=True, help="What to continue or to answer; '-' reads it from standard input.")
@click.option("--model", help="Base model instead of the one named in the adapter folder.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--chat/--no-chat", default=None, help="Ask through the chat template. Default: where there is one.")
@click.option("--sample", is_flag=True, help="Draw tokens at random instead of taking the most likely one.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="With --sample: below 1 is safer.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="With --sample: share of the mass to draw from."
)
@click.option("--seed", default=0, show_default=True, help="With --sample: the same seed draws the same text.")
@click.option("--without-adapter", is_flag=True, help="Let the base model answer alone, to compare.")
def generate(
    adapter: str,
    prompt: str,
    model: str | None,
    max_new_tokens: int,
    chat: bool | None,
    sample: bool,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    without_adapter: bool,
) -> None:
    """Let a model with an adapter continue a prompt.

    ADAPTER is an adapter folder, a run folder or a hub id.
    """
    drawn = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in drawn.items() if value is not None}
    if given and not sample:
        raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} needs --sample")
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UserError("the prompt is empty: give --prompt some text")

    import torch
    from transformers import TextStreamer, set_seed

    from loraplex.models.adapted import base_name, load_adapted, refuse_classifier
    from loraplex.models.loading import load_tokenizer
    from loraplex.models.quiet import quiet

    refuse_classifier(adapter, "generate")
    base = model or base_name(adapter)
    tokenizer = load_tokenizer(base)
    ids = torch.tensor([_prompt_ids(tokenizer, prompt, chat)])
    adapted = load_adapted(adapter, base)
    set_seed(seed)
    settings: dict[str, Any] = {"do_sample": sample, **given}
    # The answer appears while it is made.
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    off: contextlib.AbstractContextManager[None] = (
        adapted.disable_adapter() if without_adapter else contextlib.nullcontext()
    )
    with torch.inference_mode(), off, quiet():
        adapted.generate(
            input_ids=ids.to(adapted.device),
            attention_mask=torch.ones_like(ids).to(adapted.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **settings,
        )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> list[int]:
    """Return the tokens of the prompt, as a user's message where `chat` asks for it or the tokenizer has a template."""
    from loraplex.data import Example, Message
    from loraplex.data.tokenization import prompt_ids

    if chat or (chat is None and tokenizer.chat_template):
        return prompt_ids([Example((Message("user", prompt),), "", source="--chat")], tokenizer)[0]
    return prompt_ids([Example(prompt, "", source="--prompt")], tokenizer)[0]
