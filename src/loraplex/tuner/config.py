"""AdapterConfig: what a user writes; a PEFT config like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from loraplex.adapters.registry import SaveFormat
from loraplex.errors import UserError
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.peft_lora import options_of_lora, to_lora_config
from loraplex.tuner.shortcuts.compaction import finished_options


@dataclass
class AdapterConfig(AdapterOptions):
    """Configuration of one adapter; fields that PEFT users know have the same names and meaning.

    Example: `AdapterConfig(adapter=DoRA(), r=16, lora_alpha=32, target_modules="all-linear")`. What the fields mean
    stands with them in `AdapterOptions`. A config that is handed to PEFT is not changed: the model keeps a copy.

    Raises:
        UserError: (a ValueError) for unknown names, values out of range and combinations that are not possible.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json: PEFT's own LoRA config where the adapter is exactly that, ours otherwise."""
        if self.modules_to_save:
            # PEFT adds the classification heads at every load
            self.modules_to_save = list(dict.fromkeys(self.modules_to_save))
        if self.save_format is SaveFormat.OWN:
            # past this class: what is written may be another object's fields
            AdapterOptions.save_pretrained(finished_options(self), save_directory, **kwargs)
        else:
            to_lora_config(self).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_peft(cls, source: str | LoraConfig) -> AdapterConfig:
        """Return the config that reproduces a stock PEFT LoRA or DoRA adapter.

        Raises:
            UserError: when the folder's config uses something that loraplex does not represent.
        """
        config = PeftConfig.from_pretrained(source) if isinstance(source, str) else source
        if not isinstance(config, LoraConfig):
            raise UserError(f"{source} is a {config.peft_type} adapter: only LORA adapters can be read into loraplex")
        return cls(**options_of_lora(config))
