"""`loraplex generate`: an adapter with its base model continues one prompt, token by token."""

from __future__ import annotations

import contextlib
import sys
from argparse import BooleanOptionalAction
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser, WrongUsageError, number, whole
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from transformers import PreTrainedTokenizerBase

DESCRIPTION = """Let a model with an adapter continue a prompt.

ADAPTER is an adapter folder, a run folder or a hub id."""


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("adapter", metavar="ADAPTER")
    made.add_argument(
        "--prompt", required=True, help="What to continue or to answer; '-' reads it from standard input."
    )
    made.add_argument("--model", help="Base model instead of the one named in the adapter folder.")
    made.add_argument("--max-new-tokens", type=whole(1), default=128, metavar="N", help="Longest answer. [128]")
    made.add_argument(
        "--chat", action=BooleanOptionalAction, help="Ask through the chat template. Default: where there is one."
    )
    made.add_argument(
        "--sample", action="store_true", help="Draw tokens at random instead of taking the most likely one."
    )
    made.add_argument("--temperature", type=number(0, above=True), metavar="T", help="With --sample: below 1 is safer.")
    made.add_argument(
        "--top-p", type=number(0, 1, above=True), metavar="P", help="With --sample: share of the mass to draw from."
    )
    made.add_argument("--seed", type=int, default=0, help="With --sample: the same seed draws the same text. [0]")
    made.add_argument("--without-adapter", action="store_true", help="Let the base model answer alone, to compare.")
    return made


def run(arguments: Namespace) -> None:
    """Print the answer while it is made."""
    drawn = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    given = {name: value for name, value in drawn.items() if value is not None}
    if given and not arguments.sample:
        raise WrongUsageError(f"--{next(iter(given)).replace('_', '-')} needs --sample")
    prompt: str = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty: give --prompt some text")

    import torch
    from transformers import TextStreamer, set_seed

    from loraplex.models.loading import load_tokenizer, quiet
    from loraplex.tuner.adapted_model import base_name, load_adapted, refuse_classifier

    adapter: str = arguments.adapter
    refuse_classifier(adapter, "generate")
    base = arguments.model or base_name(adapter)
    tokenizer = load_tokenizer(base)
    ids = torch.tensor([_prompt_ids(tokenizer, prompt, arguments.chat)])
    adapted = load_adapted(adapter, base)
    set_seed(arguments.seed)
    settings: dict[str, Any] = {"do_sample": arguments.sample, **given}
    # The answer appears while it is made.
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    off: contextlib.AbstractContextManager[None] = (
        adapted.disable_adapter() if arguments.without_adapter else contextlib.nullcontext()
    )
    with torch.inference_mode(), off, quiet():
        adapted.generate(
            input_ids=ids.to(adapted.device),
            attention_mask=torch.ones_like(ids).to(adapted.device),
            max_new_tokens=arguments.max_new_tokens,
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
