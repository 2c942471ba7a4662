"""What is put in place is what was compared."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loraplex import AdapterConfig
from loraplex.errors import UserError
from loraplex.models.fingerprint import check_base, describe_base
from loraplex.training.reloading import site_differences
from loraplex.training.saving import save_checked

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.fixture(params=[torch.float32], ids=str)
def trained(tiny_model: Path, request: pytest.FixtureRequest) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=request.param)
    config = AdapterConfig(r=2, target_modules="all-linear", init_lora_weights=False, seed=0, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], indirect=True)
def test_a_good_adapter_is_put_in_place(trained: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    base = describe_base(trained.get_base_model(), "tiny")
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_model, dtype=trained.get_base_model().dtype)
    reloaded, report = save_checked(trained, tmp_path / "adapter", ROWS, base, load)
    assert report.difference == 0
    assert report.rows == 2
    assert report.site_difference_peft is not None
    assert report.site_difference_peft <= 1e-7
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


@pytest.mark.parametrize("adapter", ["lora", "dora", "tied-tl6", "lora-xs", "prolora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_site_is_compared_whatever_hides_in_the_rounding(
    adapter: str, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_model, dtype=dtype)
    config = AdapterConfig(
        adapter=adapter, r=2, target_modules="all-linear", init_lora_weights=False, seed=0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(), config)
    reloaded, report = save_checked(
        model, tmp_path / "adapter", ROWS, describe_base(model.get_base_model(), "tiny"), load
    )
    assert report.site_difference_peft is not None
    assert report.site_difference_peft <= 1e-6
    sites = [difference.site for difference in site_differences(model, reloaded)]
    assert sites == [layer.site for layer in model.base_model.site_layers()]
    wrong = "model.layers.1.mlp.down_proj"
    reloaded.get_base_model().get_submodule(wrong).lora_B["default"].weight.data *= 1.001
    failed = [found.site for found in site_differences(model, reloaded) if found.difference > found.allowed]
    assert failed == [wrong]


def test_a_scale_that_is_wrong_at_one_site_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_model, dtype=torch.bfloat16)
    config = AdapterConfig(r=2, target_modules="all-linear", init_lora_weights=False, seed=0, task_type="CAUSAL_LM")
    model = get_peft_model(load(), config)
    write = model.save_pretrained

    def write_wrongly(folder: str) -> None:
        write(folder)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(model, "save_pretrained", write_wrongly)
    with pytest.raises(UserError, match=r"by PEFT, .* at model\.layers\.0\.self_attn\.v_proj the output differs by"):
        save_checked(model, tmp_path / "adapter", ROWS, describe_base(model.get_base_model(), "tiny"), load)
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def recorded(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with the record of the tiny model."""
    from loraplex.models.fingerprint import write_base

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
