"""A tokenizer of single letters for tiny models."""

from tests.tuner.tiny_models import VOCABULARY
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is enough for every text of the tests, within the tiny vocabulary."""
    known = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .?:\n", *"0123456789"]
    assert len(known) <= VOCABULARY
    model = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(known)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
