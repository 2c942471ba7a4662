"""Target `gguf`: a LoRA adapter file for llama.cpp (`--lora`), written with its own Python package.

The format is that of llama.cpp's loader (src/llama-adapter.cpp) and converter (convert_lora_to_gguf.py): metadata
general.type = adapter, adapter.type = lora, adapter.lora.alpha as a 32-bit float, and per weight `NAME` of the base
file the tensors `NAME.lora_a`, A (r, in), and `NAME.lora_b`, B (out, r), applied with scale alpha / r. Files of the
architecture llama keep the rows of the query and key weights in another order, so B's rows are permuted alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from loraplex.errors import UserError
from loraplex.export.pairs import SitePair, plain_form
from loraplex.export.peft import ranks_in_words
from loraplex.export.subject import ExportCandidate, not_plain_lora
from loraplex.export.target import Logits, Target, WriteOptions
from loraplex.export.verification import pair_logits
from loraplex.models.loading import load_config, load_model

READER = "llama.cpp's Python reader"
FILE = "adapter.gguf"
_QTYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


class Architecture(NamedTuple):
    """How llama.cpp keeps models of one type."""

    name: gguf.MODEL_ARCH
    permuted: bool = False
    """Whether the rows of the query and key weights are in the order of llama.cpp's rotary embedding."""


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3),
    "gemma": Architecture(gguf.MODEL_ARCH.GEMMA),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2),
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2),
}
"""By transformers' model_type: those of which llama.cpp's converter changes no weight but by this permutation."""


class Place(NamedTuple):
    """Where a site is in llama.cpp's files."""

    tensor: str
    heads: int | None
    """Number of heads whose rows are permuted, None where the order is that of transformers."""


def refuse(subject: ExportCandidate) -> str | None:
    """Refuse what is not plain LoRA, and models and sites that llama.cpp has no known name for."""
    if (reason := not_plain_lora(subject, "llama.cpp")) is not None:
        return reason
    if subject.base is None:
        return "the base model's configuration, which tells the names of the tensors, is not at hand: give --model"
    if subject.base.model_type not in ARCHITECTURES:
        return (
            f"how llama.cpp keeps models of type '{subject.base.model_type}' is not known here (known are "
            f"{', '.join(ARCHITECTURES)}); '--to merged' writes a model for its convert_hf_to_gguf.py"
        )
    for site in subject.ranks:
        place_of = place(site, subject.base)
        if place_of is None:
            return f"llama.cpp has no tensor for {site}; '--to merged' writes a model for its convert_hf_to_gguf.py"
        if place_of.tensor == "output.weight" and subject.base.tie_word_embeddings:
            return (
                f"{site} is tied to the token embedding and has no tensor of its own in llama.cpp's files; adapt "
                "without it, or '--to peft' keeps it"
            )
    return None


def place(site: str, config: Any) -> Place | None:
    """Return the tensor of a site, or None when llama.cpp has none; `config` is the base model's."""
    architecture = ARCHITECTURES[config.model_type]
    name = _names(architecture.name, config.num_hidden_layers).get_name(site)
    if name is None:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    return Place(f"{name}.weight", heads.get(site.rpartition(".")[2]) if architecture.permuted else None)


@functools.cache
def _names(architecture: gguf.MODEL_ARCH, blocks: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(architecture, blocks)


def permute(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key weight (out, …) in llama.cpp's order.

    Within a head transformers turns row i together with row i + d/2, llama.cpp row 2i with row 2i + 1.
    """
    permuted: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return permuted


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Return the rows (out, …) in transformers' order again."""
    undone: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return undone


def write(model: PeftModel, folder: Path, how: WriteOptions) -> list[str]:
    """Write every pair under its tensor's name, padded with zeros to one rank r, alpha = r: the scale is 1."""
    pairs = plain_form(model).pairs
    config: Any = model.get_base_model().config
    rank = max(pair.rank for pair in pairs.values())
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type].name])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_file_type(_FILE_TYPES[how.dtype])
    for site, pair in pairs.items():
        found = place(site, config)
        assert found is not None, "refuse() has seen the sites"
        _add(writer, found, pair.padded(rank), _QTYPES[how.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [f"llama.cpp LoRA file {FILE}, {ranks_in_words(pairs)}, kept as rank {rank} with alpha {rank}"]


def _add(writer: gguf.GGUFWriter, where: Place, pair: SitePair, qtype: gguf.GGMLQuantizationType) -> None:
    b = pair.b if where.heads is None else permute(pair.b, where.heads)
    for suffix, tensor in (("lora_a", pair.a), ("lora_b", b)):
        data = gguf.quants.quantize(tensor.contiguous().numpy(), qtype)
        writer.add_tensor(f"{where.tensor}.{suffix}", data, raw_dtype=qtype)


def read_as_llama_cpp(file: Path) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
    """Return the architecture, and A (r, in) and scaled B (out, r) by tensor of the base, as llama.cpp reads a file.

    Raises:
        UserError: when its loader would refuse the file.
    """
    reader = gguf.GGUFReader(file)
    for key, wanted in ((gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER), (gguf.Keys.Adapter.TYPE, "lora")):
        if _field(reader, key) != wanted:
            raise UserError(f"{file.name}: {key} is {_field(reader, key)!r}, llama.cpp expects '{wanted}'")
    alpha = float(_field(reader, gguf.Keys.Adapter.LORA_ALPHA) or 0.0)
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, _, half = tensor.name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise UserError(f"{file.name}: llama.cpp knows no adapter tensor '{tensor.name}'")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        halves.setdefault(name, {})[half] = torch.from_numpy(np.array(values, dtype=np.float32))
    pairs = {}
    for name, found in halves.items():
        if len(found) < 2 or len(found["lora_a"]) != found["lora_b"].shape[1]:
            raise UserError(f"{file.name}: the pair of '{name}' is incomplete or of two ranks")
        # llama.cpp: without alpha the scale is 1
        scale = alpha / len(found["lora_a"]) if alpha else 1.0
        pairs[name] = (found["lora_a"], found["lora_b"] * scale)
    return str(_field(reader, gguf.Keys.General.ARCHITECTURE)), pairs


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def reload(folder: Path, base: str, rows: Sequence[Sequence[int]]) -> dict[str, Logits]:
    """Return what follows from the file when its pairs are put back on the base model of transformers."""
    config = load_config(base)
    architecture, read = read_as_llama_cpp(folder / FILE)
    if architecture != gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type].name]:
        raise UserError(f"{FILE} says architecture '{architecture}', which is not that of '{base}'")
    model = load_model(base, "float32")
    pairs = {}
    for site, _ in model.named_modules():
        where = place(site, config)
        if where is not None and where.tensor in read:
            a, b = read.pop(where.tensor)
            pairs[site] = (a, b if where.heads is None else unpermute(b, where.heads))
    if read:
        raise UserError(f"{FILE} holds '{next(iter(read))}', which the base model does not have")
    return {READER: pair_logits(model, pairs, rows)}


def snippet(folder: Path, base: str) -> str:
    """Return the lines that read the file, run in its folder."""
    return (
        "import gguf\n\n"
        f'adapter = gguf.GGUFReader("{FILE}")\n'
        'alpha = adapter.get_field("adapter.lora.alpha").contents()\n'
        "names = [tensor.name for tensor in adapter.tensors]\n"
    )


GGUF = Target(
    name="gguf",
    summary="a LoRA file for llama.cpp",
    refuse=refuse,
    write=write,
    reload=reload,
    snippet=snippet,
    usage=lambda folder, base: f"llama-cli -m BASE_MODEL.gguf --lora {FILE}",
)
