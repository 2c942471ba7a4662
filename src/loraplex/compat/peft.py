"""PEFT beyond its top-level names: the base classes of a tuner, its mappings, and how it matches names to modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

# The base classes that a tuner derives from: PEFT's documented way to add one, though not at the top level.
from peft.tuners.tuners_utils import BaseTuner as BaseTuner
from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer

# Which of the active adapters are not merged yet, with PEFT's warning where all are.
from peft.tuners.tuners_utils import check_adapters_to_merge as check_adapters_to_merge

# Whether a config's target_modules, exclude_modules and layers select a module: sites must be those that PEFT injects.
from peft.tuners.tuners_utils import check_target_module_exists

# File names of an adapter folder, and the word for every linear layer.
from peft.utils.constants import CONFIG_NAME as CONFIG_NAME
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME

# Names of the heads that PEFT trains in full for classification.
from peft.utils.constants import SEQ_CLS_HEAD_NAMES as SEQ_CLS_HEAD_NAMES

# Which modules LoRA adapts where target_modules is absent, by architecture.
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.constants import WEIGHTS_NAME as WEIGHTS_NAME

# The weight of a quantized linear layer as floating-point numbers.
from peft.utils.integrations import dequantize_module_weight as dequantize_module_weight

# PEFT's wrappers of modules_to_save and of trainable tokens: what is inside them is not the base model's own.
from peft.utils.other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key


def matching_pattern(patterns: Iterable[str], name: str) -> str:
    """Return which key of rank_pattern or alpha_pattern PEFT takes for a module, `name` itself where none matches."""
    found: str = get_pattern_key(list(patterns), name)
    return found


def is_target(config: Any, name: str) -> bool:
    """Return whether a config's target_modules, exclude_modules and layers select the module of that full name."""
    return bool(check_target_module_exists(config, name))


def register_tuner(kind: str, config: type, tuner: type, prefix: str) -> None:
    """Make PEFT know a tuner of ours: its config, its class and the prefix of its tensors, by its type's name.

    PEFT reads public mappings by the type of a config; nothing of PEFT is replaced.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    key = cast(Any, kind)
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = cast(Any, tuner)
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = prefix


def config_types() -> dict[str, type]:
    """Return PEFT's config classes by the name of their type, such as LORA."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def trained_biases(tuner: type, model: Any, state_dict: Any, config: Any) -> dict[str, Any]:
    """Return the entries of a state dict that are biases which the config trains; those are saved with the adapter."""
    found: dict[str, Any] = cast(Any, tuner)._get_learnable_bias_state_dict(model, state_dict, config)
    return found
