"""What is put in place is what was compared."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loraplex import AdapterConfig
from loraplex.errors import UserError
from loraplex.training.base_model import check_base, describe_base
from loraplex.training.saving import save_checked

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.fixture(params=[torch.float32], ids=str)
def trained(tiny_model: Path, request: pytest.FixtureRequest) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=request.param)
    config = AdapterConfig(r=2, target_modules="all-linear", init_weights=False, seed=0, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], indirect=True)
def test_a_good_adapter_is_put_in_place(trained: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    base = describe_base(trained.get_base_model(), "tiny")
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_model, dtype=trained.get_base_model().dtype)
    reloaded, report = save_checked(trained, tmp_path / "adapter", ROWS, base, load)
    assert report.difference == 0
    assert report.rows == 2
    assert reloaded.peft_config["default"].peft_type == "LORA"
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_computes_something_else_is_not(trained: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    def other_base() -> LlamaForCausalLM:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.model.norm.weight.data += 0.5
        return model

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "earlier").touch()
    with pytest.raises(UserError, match="reloaded by loraplex, does not compute what the trained one does"):
        save_checked(trained, folder, ROWS, describe_base(trained.get_base_model(), "tiny"), other_base)
    assert [path.name for path in folder.iterdir()] == ["earlier"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def recorded(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with the record of the tiny model."""
    from loraplex.training.base_model import write_base

    write_base(tmp_path, describe_base(AutoModelForCausalLM.from_pretrained(tiny_model), "tiny"))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error")
def test_the_same_base_fits_in_any_data_type(tiny_model: Path, recorded: Path, dtype: torch.dtype) -> None:
    check_base(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype), recorded)


def test_a_base_of_another_shape_is_refused(tiny_model: Path, recorded: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_model, num_key_value_heads=4, ignore_mismatched_sizes=True)
    with pytest.raises(UserError, match="'tiny' with num_key_value_heads 2, this base model has 4: use 'tiny'"):
        check_base(other, recorded)


def test_a_base_with_other_weights_is_a_warning(tiny_model: Path, recorded: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    for parameter in other.parameters():
        parameter.data *= 1.5
    with pytest.warns(UserWarning, match="was trained on 'tiny'; this base model has other weights"):
        check_base(other, recorded)


def test_a_damaged_record_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "base_model.json").write_text('{"shape": {}')
    with pytest.raises(UserError, match=r"base_model\.json is damaged"):
        check_base(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)


def test_a_folder_without_a_record_passes(tiny_model: Path, tmp_path: Path) -> None:
    check_base(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
