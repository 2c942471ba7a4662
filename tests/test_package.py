"""The package as a whole: its public names, and the rule that a warning of ours is a defect."""

import subprocess
import sys
import warnings

import pytest

import loraplex
from loraplex.errors import UserError, nearest


def test_the_public_names() -> None:
    assert sorted(loraplex.__all__) == [
        "ALoRA",
        "Adapter",
        "AdapterConfig",
        "Add",
        "EchoLoRA",
        "HeteroLoRA",
        "LoRA",
        "Magnitude",
        "UserError",
        "__version__",
        "start_allocation",
        "load_adapter",
        "load_model",
        "load_tokenizer",
        "print_trainable_parameters",
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


@pytest.mark.parametrize(
    "imports",
    [
        "import loraplex, peft",
        "import peft, loraplex",
        "import loraplex, transformers, importlib.util as u; u.find_spec('peft')",
    ],
)
def test_peft_knows_our_type_in_whatever_order_they_are_imported(imports: str) -> None:
    script = f"{imports}; from peft import PEFT_TYPE_TO_CONFIG_MAPPING as known; print('LORAPLEX' in list(known))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_nearest_names_what_was_probably_meant() -> None:
    assert nearest("dorra", ["lora", "dora"]) == " Did you mean 'dora'?"
    assert nearest("xyzzy", ["lora", "dora"]) == ""
    assert issubclass(UserError, ValueError)
