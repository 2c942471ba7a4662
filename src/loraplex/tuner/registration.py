"""Makes PEFT know the tuner: our own type in PEFT's public mappings, nothing patched. Importing this registers."""

from __future__ import annotations

from typing import Any, cast

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from loraplex.tuner.config import AdapterConfig, LoraplexType
from loraplex.tuner.model import LoraplexTuner

_KEY = cast(Any, LoraplexType.LORAPLEX)
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = AdapterConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = LoraplexTuner
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = LoraplexTuner.prefix
