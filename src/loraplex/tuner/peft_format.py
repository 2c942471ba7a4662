"""Any adapter that is one pair per site, written out as a plain LoRA or DoRA folder of stock PEFT.

Every site gets A (r, in) and s·B (out, r) as `Factors.compact` gives them: exact, at the size of LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.registry import SaveFormat
from loraplex.compat.peft import SAFETENSORS_WEIGHTS_NAME
from loraplex.errors import UserError
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.file_tensors import file_tensors, of_adapter, peft_tensors
from loraplex.tuner.model import LoraplexTuner
from loraplex.tuner.peft_lora import to_lora_config
from loraplex.tuner.sites import module_names


def peft_adapter(model: PeftModel, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return config and tensors of the stock PEFT adapter that computes what this one does now.

    The model is not changed. The scale is folded into B, `lora_alpha` is r at every site; biases and modules that are
    saved with the adapter come along.

    Raises:
        UserError: when the adapter has no such form, or no open rank.
    """
    tuner, config = model.base_model, model.peft_config.get(adapter_name)
    if not isinstance(tuner, LoraplexTuner) or not isinstance(config, AdapterConfig):
        raise UserError(f"the model carries no loraplex adapter '{adapter_name}'")
    if config.adapter.peft_format is SaveFormat.OWN:
        raise UserError(
            f"adapter '{adapter_name}' ({config.adapter.name}) is not one pair (A, B) per site: it is no LoRA"
        )
    if opened := tuner.open_shortcuts(adapter_name):
        raise UserError(
            f"adapter '{adapter_name}' has {len(opened)} shortcuts, such as {opened[0]}, for which LoRA has no place"
        )
    ranks, tensors = peft_tensors(tuner.site_layers(), adapter_name)
    if not tensors:
        raise UserError(f"adapter '{adapter_name}' has no open rank left: there is nothing to write")
    finished = copy(config)
    finished.bind(replace(config.state, finished_ranks=ranks, other_modules=module_names(tuner.model)))
    besides = get_peft_model_state_dict(model, adapter_name=adapter_name)
    own = file_tensors(of_adapter(model.state_dict(), adapter_name), config, adapter_name, model)
    tensors.update({key: value for key, value in besides.items() if key not in own})
    return to_lora_config(finished), tensors


def save_peft_format(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write `peft_adapter` as a folder that stock PEFT loads; see there for what is raised."""
    write_adapter(Path(folder), *peft_adapter(model, adapter_name))


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder that stock PEFT loads for inference: `tensors` under their keys in the file, and `config`."""
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    # copies: a file must not hold two tensors that lie in the same memory
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(copies, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
