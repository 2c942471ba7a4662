"""TRL's trainers whose loss is not that of the labels alone."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from tests.tuner.letters import letters
from tests.tuner.trainer_arguments import arguments
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

PROMPTS = [f"what is {a} and 3? " for a in range(8)]


def length_of(completions: list[str], **_: Any) -> list[float]:
    """Reward completions by their length and their vowels: no two of a group are worth the same for long."""
    return [len(text) + sum(map(text.count, "aeiou")) for text in completions]


def other_loss(name: str, model: Any, folder: Path, **overrides: Any) -> Trainer:
    """Return the trainer of that name (DPO, KTO, GRPO) on a handful of rows."""
    given = arguments(folder, max_steps=4, bf16=False, **overrides)
    common = {"model": model, "processing_class": letters()}
    if name == "DPO":
        rows = [{"prompt": prompt, "chosen": "it is 4.", "rejected": "no."} for prompt in PROMPTS]
        return DPOTrainer(args=DPOConfig(max_length=64, **given), train_dataset=Dataset.from_list(rows), **common)
    if name == "KTO":
        told = [{"prompt": PROMPTS[i], "completion": "it is 4.", "label": i % 3 > 0} for i in range(len(PROMPTS))]
        return KTOTrainer(args=KTOConfig(max_length=64, **given), train_dataset=Dataset.from_list(told), **common)
    args = GRPOConfig(max_completion_length=6, num_generations=2, beta=0.1, temperature=0.7, **given)
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    return GRPOTrainer(reward_funcs=length_of, args=args, train_dataset=prompts, **common)
