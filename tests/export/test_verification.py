"""What the comparison says of logits that are known."""

import math

import pytest
import torch

from loraplex import UserError
from loraplex.data import Example
from loraplex.export.verification import PROMPTS, check, pair_logits, read_prompts
from loraplex.models.agreement import compare
from loraplex.models.loading import load_model, load_tokenizer


def test_the_numbers_are_those_of_their_formulae() -> None:
    before = [torch.tensor([[0.0, math.log(3)], [2.0, 0.0]]), torch.tensor([[0.0, -4.0]])]
    after = [torch.tensor([[math.log(3), 0.0], [2.0, 0.0]]), torch.tensor([[0.5, -4.0]])]
    found = compare("x", before, after, tolerance=0.25)
    assert (found.rows, found.tokens, found.largest_logit) == (2, 3, 4.0)
    assert found.max_difference == pytest.approx(math.log(3))
    assert found.mean_difference == pytest.approx((2 * math.log(3) + 0.5) / 6)
    assert found.same_top1 == pytest.approx(2 / 3)
    p, q = torch.tensor([1.0, math.exp(-4)]), torch.tensor([math.exp(0.5), math.exp(-4)])
    last = float((p / p.sum() * (p / p.sum() / (q / q.sum())).log()).sum())
    assert found.kl == pytest.approx((0.25 * math.log(1 / 3) + 0.75 * math.log(3) + last) / 3, rel=1e-5)
    assert not found.passed
    assert compare("x", before, after, tolerance=0.28).passed


def test_equal_logits_pass_any_tolerance_and_nan_none() -> None:
    logits = [torch.randn(3, 5)]
    same = compare("x", logits, [logits[0].clone()], tolerance=0)
    assert (same.max_difference, same.kl, same.same_top1, same.passed) == (0, 0, 1, True)
    check([same])
    broken = logits[0].clone()
    broken[1, 2] = math.nan
    with pytest.raises(UserError, match="a logit differs by nan"):
        check([same, compare("x", [torch.zeros(2, 2), *logits], [torch.zeros(2, 2), broken], tolerance=1e9)])


def test_the_prompts_are_text_of_several_kinds(tiny_model) -> None:
    rows = read_prompts(load_tokenizer(str(tiny_model)))
    assert len(rows) == len(PROMPTS) == 8
    assert all(8 < len(row) <= 128 for row in rows)


def test_of_many_rows_some_from_everywhere_are_compared(tiny_model) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    words = ["the", "cat", "dog", "sat", "on", "mat"]
    examples = [Example(f"{words[i // 36]} {words[i // 6 % 6]} {words[i % 6]}", " cat") for i in range(200)]
    rows = read_prompts(tokenizer, examples)
    assert len(rows) == 64
    assert {row[0] for row in rows} == {row[0] for row in read_prompts(tokenizer, examples[::36])}
    assert len(read_prompts(tokenizer, examples[:64])) == 64


def test_pairs_are_added_to_the_output_and_taken_away_again(tiny_model) -> None:
    model = load_model(str(tiny_model))
    rows = [[5, 6, 7]]
    bare = pair_logits(model, {}, rows)
    site = model.get_submodule("model.layers.1.mlp.down_proj")
    a, b = torch.randn(2, 48), torch.randn(32, 2)
    with_pair = pair_logits(model, {"model.layers.1.mlp.down_proj": (a, b)}, rows)
    torch.testing.assert_close(pair_logits(model, {}, rows), bare, rtol=0, atol=0)
    with torch.no_grad():
        site.weight += b @ a
    torch.testing.assert_close(pair_logits(model, {}, rows), with_pair)
