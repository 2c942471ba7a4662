"""A program that knows nothing of loraplex: what stock PEFT computes with an adapter folder.

    python -P stock_peft.py BASE ADAPTER ROWS LOGITS

BASE is a model folder or hub id, ROWS a JSON file with lists of token ids; LOGITS becomes a safetensors file with the
tensors "0", "1", … of shape (tokens, vocabulary), in float32. `stock_logits` runs it in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def stock_logits(base: str, adapter: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (tokens, vocabulary) of every row of token ids, from a process without loraplex.

    Raises:
        RuntimeError: when that process fails, with the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        ids, logits = Path(folder) / "rows.json", Path(folder) / "logits.safetensors"
        ids.write_text(json.dumps([list(row) for row in rows]))
        command = [sys.executable, "-P", __file__, base, adapter, str(ids), str(logits)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            raise RuntimeError(
                f"the process that loads '{adapter}' into PEFT alone was killed by signal {-done.returncode}, "
                "as systems do that run out of memory"
            )
        if done.returncode != 0:
            raise RuntimeError(f"PEFT alone cannot load '{adapter}': {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        tensors = load_file(logits)
    return [tensors[str(index)] for index in range(len(rows))]


@torch.inference_mode()
def _write_logits(base: str, adapter: str, rows: str, logits: str) -> None:
    # Whatever would import loraplex from here on fails.
    sys.modules["loraplex"] = None  # type: ignore[assignment]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    found = {
        str(index): model(input_ids=torch.tensor([row])).logits[0]
        for index, row in enumerate(json.loads(Path(rows).read_text()))
    }
    save_file(found, logits)


if __name__ == "__main__":
    _write_logits(*sys.argv[1:])
