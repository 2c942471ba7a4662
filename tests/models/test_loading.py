"""Loading by name: what a name means, and one line for everything that can be wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.extras import EMBEDDED
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from loraplex.errors import UserError
from loraplex.models import embedded
from loraplex.models.loading import load_model, load_pretrained, load_tokenizer, resolve_model
from loraplex.models.quiet import quiet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny saved model in bfloat16, without a tokenizer."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_dtype_auto_is_that_of_the_weights(folder: Path) -> None:
    assert load_model(str(folder)).dtype is torch.bfloat16
    assert load_model(str(folder), "float32").dtype is torch.float32
    assert not load_model(str(folder)).training


@EMBEDDED
def test_the_embedded_folder_of_another_machine_is_the_embedded_model() -> None:
    assert resolve_model(f"/home/someone/.cache/loraplex/models/{embedded.FOLDER_NAME}") == resolve_model("embedded")


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_a_hub_id_stays_as_it_is(name: str) -> None:
    assert resolve_model(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeded", r"there is no model 'embeded'\. Did you mean 'embedded'\?"),
        ("./nowhere", r"model folder '\./nowhere' does not exist: give a folder, a hub id, or 'embedded'"),
        ("a/b/c", r"model folder 'a/b/c' does not exist"),
    ],
)
def test_a_name_that_means_nothing(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_model(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_unknown_hub_id_is_one_line(load: object) -> None:
    assert callable(load)
    with pytest.raises(
        UserError, match=r"'nobody/nothing': .*; check the name and the network, or use 'embedded'"
    ) as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json: give the folder that transformers saved"):
        load_model(str(tmp_path))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model: give the model it was trained on"):
        load_model(str(tmp_path))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UserError, match=r"is a file: give the folder"):
        load_model(str(file))


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer: save it there"):
        load_tokenizer(str(folder))


def test_an_unknown_architecture_is_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(UserError, match=r"cannot load the model .*`lama`.*; check the folder") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot load the model .*; check the folder"):
        load_model(str(folder))


def test_missing_weights_are_refused_and_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        load_model(str(folder))


def test_an_unknown_dtype_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dtype 'float23' is not one of .* Did you mean 'float32'\?"):
        load_model(str(folder), "float23")  # type: ignore[arg-type]


def test_quiet_restores_the_settings_of_transformers() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with quiet():
        assert not transformers_logging.is_progress_bar_enabled()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


class TooLarge:
    """A model for which no machine has the memory."""

    @staticmethod
    def from_pretrained(*args: object, **kwargs: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)


class Broken:
    """A model with a mistake in its code."""

    @staticmethod
    def from_pretrained(*args: object, **kwargs: object) -> None:
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("name", ["nobody/nothing", None])
def test_no_memory_is_not_blamed_on_the_name(folder: Path, name: str | None) -> None:
    with pytest.raises(UserError, match="there is not enough memory") as caught:
        load_pretrained(TooLarge, name or str(folder), "auto")
    assert "check the" not in str(caught.value)


def test_what_goes_wrong_in_torch_is_not_blamed_on_the_name() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        load_pretrained(Broken, "nobody/nothing", "auto")


def test_weights_of_another_shape_are_blamed_on_the_folder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"cannot load the model .*; check the folder"):
        load_model(str(folder))
