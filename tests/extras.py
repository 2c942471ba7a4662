"""Which tests need more than the core install; they are left out, with the reason, where it is not there."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import transformers

NEEDS_TRL = "TRL is not installed: pip install 'loraplex[train]'"
TRL = pytest.mark.skipif(find_spec("trl") is None, reason=NEEDS_TRL)
SKLEARN = pytest.mark.skipif(
    find_spec("sklearn") is None, reason="scikit-learn is not installed: pip install 'loraplex[analysis]'"
)
EMBEDDED = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig") and find_spec("gguf") is None,
    reason="this transformers reads the embedded model with the package gguf, which is not installed",
)
SCIPY = pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is not installed, which PEFT's LoftQ asks for")


def without_fused_head() -> str:
    """Return why TRL's fused head cannot be tested here, nothing where it can."""
    if find_spec("trl") is None:
        return NEEDS_TRL
    utils = import_module("trl.trainer.utils")
    return "" if hasattr(utils, "add_fused_lm_head") else "this TRL has no fused head (add_fused_lm_head)"


_REASON = without_fused_head()
FUSED_HEAD = pytest.mark.skipif(_REASON != "", reason=_REASON or "not skipped")
