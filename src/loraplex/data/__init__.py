"""From a file, a hub data set or a built-in task to tokens: readers, forms, prompt templates, tokenization.

Nothing here imports torch; `datasets` and `reasoning_gym` are imported when a source needs them.
"""

from loraplex.data.examples import Example, Message
from loraplex.data.options import DataOptions
from loraplex.data.reading import read_examples
from loraplex.data.text_classes import ClassRows, tokenize_texts
from loraplex.data.tokenization import Tokenized, tokenize, tokenize_once

__all__ = [
    "ClassRows",
    "DataOptions",
    "Example",
    "Message",
    "Tokenized",
    "read_examples",
    "tokenize",
    "tokenize_once",
    "tokenize_texts",
]
