"""Makes PEFT know the tuner: our own type in PEFT's public mappings, nothing patched. Importing this registers."""

from __future__ import annotations

from loraplex.compat.peft import register_tuner
from loraplex.training_hooks.registry import REGISTRY
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner
from loraplex.tuner.options import LoraplexType

register_tuner(LoraplexType.LORAPLEX, AdapterConfig, LoraplexTuner, LoraplexTuner.prefix)
# PEFT makes the tuner, so whoever registers it has to bring along what acts between training steps
LoraplexTuner.observers.append(REGISTRY.watch)
