"""The package as a whole: its public names, and the rule that a warning of ours is a defect."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import loraplex
from loraplex.errors import UserError, nearest


def test_the_public_names() -> None:
    assert sorted(loraplex.__all__) == [
        "ALoRA",
        "Adapter",
        "AdapterConfig",
        "Add",
        "DoRA",
        "EchoLoRA",
        "HeteroLoRA",
        "HydraLoRA",
        "LoRA",
        "LoRAXS",
        "Magnitude",
        "PRoLoRA",
        "TiedLoRA",
        "UserError",
        "__version__",
        "load_adapter",
        "load_model",
        "load_tokenizer",
        "print_trainable_parameters",
        "start_allocation",
    ]


@pytest.mark.parametrize("name", loraplex.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(loraplex, name) is not None
    assert name in dir(loraplex)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'loraplex' has no attribute 'LoRa'"):
        loraplex.LoRa  # noqa: B018


def test_a_warning_of_ours_is_an_error_and_one_of_others_is_not() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="loraplex.data.reading")
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="transformers.modeling_utils")


OWN_FOLDER = """
import sys
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
                                    num_attention_heads=4, num_key_value_heads=2))
print(type(PeftModel.from_pretrained(base, sys.argv[1]).base_model).__name__)
"""


@pytest.mark.parametrize(
    ("first", "works"),
    [
        ("from loraplex import AdapterConfig", True),
        ("import peft, loraplex; loraplex.load_adapter", True),
        ("import transformers\nfrom loraplex.tuner.layer import SiteLayer", True),
        ("import loraplex", False),
        ("", False),
    ],
)
def test_peft_loads_our_own_type_once_loraplex_is_used_and_refuses_it_before(
    first: str, works: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    config = loraplex.AdapterConfig(adapter="prolora", r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    command = [sys.executable, "-c", f"{first}\n{OWN_FOLDER}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if works:
        assert (done.returncode, done.stdout) == (0, "LoraplexTuner\n"), done.stderr
    else:
        assert done.returncode == 1
        assert "LORAPLEX" in done.stderr.splitlines()[-1]


def test_importing_it_leaves_the_import_system_alone() -> None:
    script = "import sys; before = list(sys.meta_path)\nimport loraplex; print(sys.meta_path == before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_what_looks_for_special_attributes_loads_nothing() -> None:
    script = "import sys, loraplex; print(hasattr(loraplex, '__wrapped__'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_nearest_names_what_was_probably_meant() -> None:
    assert nearest("dorra", ["lora", "dora"]) == " Did you mean 'dora'?"
    assert nearest("xyzzy", ["lora", "dora"]) == ""
    assert issubclass(UserError, ValueError)
