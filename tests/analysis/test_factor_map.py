"""A and B of several adapters, and of several heads: vectors, their two numbers, the map, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.analysis.factor_map import FactorVector, check_lengths, read_vectors, separations
from loraplex.cli.main import main
from loraplex.errors import UserError


def save(model: Path, folder: Path, seed: int, start: int = 0, **fields: Any) -> str:
    """Save an adapter whose A are drawn by `start` and whose B by `seed`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], **fields})
    torch.manual_seed(start)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def two(tiny_model: Path, tmp_path: Path) -> list[str]:
    """Two adapters with the same A and different B."""
    return [save(tiny_model, tmp_path / name, seed) for name, seed in (("cats", 1), ("dogs", 2))]


def test_every_a_and_b_is_a_vector_with_the_scale_in_b(two: list[str]) -> None:
    from safetensors.torch import load_file

    vectors = read_vectors(two, None)
    # two adapters, two blocks, two kinds, A and B
    assert len(vectors) == 16
    assert {vector.label for vector in vectors} == {"cats", "dogs"}
    tensors = load_file(Path(two[0]) / "adapter_model.safetensors")
    site = "model.layers.1.self_attn.q_proj"
    found = {vector.part: vector.vector for vector in vectors if (vector.adapter, vector.site) == ("cats", site)}
    assert torch.equal(found["A"], tensors[f"base_model.model.{site}.lora_A.weight"].flatten())
    assert torch.equal(found["B"], tensors[f"base_model.model.{site}.lora_B.weight"].flatten() * 4)
    assert {vector.kind for vector in read_vectors(two, None, ["o_proj"])} == {"o_proj"}


def test_equal_a_coincide_and_unequal_b_part(two: list[str]) -> None:
    a, b = separations(read_vectors(two, None))
    assert (a.part, a.vectors, a.length, b.part, b.vectors, b.length) == ("A", 8, 64, "B", 8, 64)
    assert a.similarity == pytest.approx(1.0)
    assert b.similarity is not None
    assert abs(b.similarity) < 0.4
    # a vector that two labels share is as near to the other label's as to its own
    assert a.silhouette is not None
    assert a.silhouette < 0


def points(part: Any, label: str, *values: tuple[float, ...]) -> list[FactorVector]:
    return [FactorVector(label, f"block.{i}.q_proj", part, None, torch.tensor(value)) for i, value in enumerate(values)]


def test_the_numbers_by_hand() -> None:
    vectors = [
        *points("B", "one", (1.0, 0.0), (1.0, 0.1)),
        *points("B", "two", (0.0, 1.0), (0.0, -1.0)),
        *points("A", "one", (1.0, 1.0)),
    ]
    a, b = separations(vectors)
    assert (a.similarity, a.silhouette, a.labels) == (None, None, ("one",))
    assert b.similarity == pytest.approx((0.0 - 0.1 / 1.01**0.5) / 2, abs=1e-6)
    assert b.silhouette is not None
    clear = [*points("B", "one", (9.0, 0.0), (9.0, 0.1)), *points("B", "two", (0.0, 9.0), (0.0, 9.1))]
    assert (separations(clear)[1].silhouette or 0) > 0.95 > b.silhouette


def test_heads_are_told_apart(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from loraplex import AdapterConfig

    config = AdapterConfig(
        adapter={"name": "hydra", "heads": 3}, r=2, target_modules=["q_proj"], init_lora_weights=False, seed=0
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for layer in model.base_model.site_layers():
        b = layer.adapter("default").factors.lora_B.data
        b[:, 2:] = torch.cat([-b[:, :2], 2 * b[:, :2]], dim=1)
    model.save_pretrained(tmp_path / "routed")
    vectors = read_vectors([str(tmp_path / "routed")], str(tiny_model))
    assert [vector.head for vector in vectors] == [None, 0, 1, 2] * 2
    assert {vector.label for vector in vectors if vector.part == "B"} == {f"routed, head {n}" for n in (1, 2, 3)}
    a, b = separations(vectors)
    assert (a.similarity, a.silhouette) == (None, None)
    # of the pairs (1, -1), (1, 2), (-1, 2) one points the same way
    assert b.similarity == pytest.approx(-1 / 3)
    picture = tmp_path / "map.svg"
    assert main(["inspect", str(tmp_path / "routed"), "--model", str(tiny_model), "--tsne", str(picture)]) == 0
    assert picture.read_text().count("<path aria-label") >= 8


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_command_draws_and_prints(
    two: list[str], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / f"map.{kind}"
    assert main(["inspect", *two, "--tsne", str(picture)]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line.split("│") for line in printed.splitlines() if line.count("│") > 3}
    assert [cell.strip() for cell in lines["A"][2:5]] == ["8", "64", "1.000"]
    assert picture.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<svg")
    assert main(["inspect", *two, "--tsne", str(picture), "--module", "q_proj", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["part"] for entry in found] == ["A", "B"]
    assert found[0]["vectors"] == 4
    assert found[0]["similarity"] == pytest.approx(1.0)


def test_a_and_b_of_unequal_length_get_a_map_each(tiny_model: Path, tmp_path: Path) -> None:
    folders = [
        save(tiny_model, tmp_path / name, seed, target_modules=["up_proj"]) for name, seed in (("x", 1), ("y", 2))
    ]
    assert check_lengths(read_vectors(folders, None)) is False
    picture = tmp_path / "map.png"
    assert main(["inspect", *folders, "--tsne", str(picture)]) == 0
    assert picture.is_file()


def test_what_is_refused(two: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = save(tiny_model, tmp_path / "mixed", 3, target_modules=["q_proj", "k_proj"])
    wider = save(tiny_model, tmp_path / "wider", 3, r=4)
    draw = ["--tsne", str(tmp_path / "map.png")]
    capsys.readouterr()
    for arguments, status, message in [
        (two, 2, "2 adapters are for a map: add --tsne FILE"),
        ([two[0], "--module", "q_proj"], 2, "--module is for a map"),
        ([*two, *draw, "--sites"], 2, "--tsne compares adapters, --sites shows one"),
        ([*two, "--tsne", "map.jpeg"], 1, "ends in .png, .svg, .pdf"),
        ([*two, "--tsne", str(tmp_path / "no" / "map.png")], 1, "there is no folder"),
        ([two[0], mixed, *draw], 1, "k_proj A 64, B 32; o_proj A 64, B 64; q_proj A 64, B 64): choose kinds"),
        ([two[0], wider, *draw], 1, "q_proj A 64 or 128, B 64 or 128): choose kinds of module"),
        ([*two, *draw, "--module", "q_prj"], 1, "has no site of the kind 'q_prj'. Did you mean 'q_proj'?"),
        ([str(tmp_path), *draw], 1, "holds no adapter"),
    ]:
        assert main(["inspect", *arguments]) == status, arguments
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1, error
    assert main(["inspect", mixed, *draw, "--module", "k_proj"]) == 1
    assert "a map of 2 tensors shows nothing" in capsys.readouterr().err


def test_names_that_do_not_tell_adapters_apart_are_written_in_full(tiny_model: Path, tmp_path: Path) -> None:
    folders = [save(tiny_model, tmp_path / name / "adapter", 1) for name in ("x", "y")]
    assert {vector.label for vector in read_vectors(folders, None)} == set(folders)
    with pytest.raises(UserError, match="no adapter folder or hub id"):
        read_vectors([str(tmp_path / "z")], None)
