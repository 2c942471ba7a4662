"""From a recipe to a trained, saved, reloaded and measured adapter, on TRL's SFTTrainer."""
