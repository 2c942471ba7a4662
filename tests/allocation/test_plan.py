"""Plans as data: written, read back, and refused in one line when they are not plans."""

import pytest

from loraplex.allocation.plan import Plan
from loraplex.allocation.sites import Site
from loraplex.errors import UserError


def test_a_plan_reads_back_and_names_what_it_adapts(tmp_path):
    plan = Plan({"layers.0.q": 4, "layers.1.q": 0})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.adapted == ["layers.0.q"]


def test_a_site_knows_its_kind_and_its_layer():
    sites = [Site("model.layers.3.mlp.up_proj", 8, 16, bias=False), Site("head", 8, 2, bias=True)]
    assert [(site.kind, site.layer) for site in sites] == [("up_proj", 3), ("head", None)]


@pytest.mark.parametrize("rank", [-1, 2.0, True, "4"])
def test_ranks_that_are_no_counts_are_refused(rank):
    with pytest.raises(UserError, match=r"plan gives rank .* to layers\.0\.q: give a whole number"):
        Plan({"layers.0.q": rank})


def test_files_that_hold_no_plan_are_refused_in_one_line(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(UserError, match="no plan at"):
        Plan.load(path)
    path.write_text('{"ranks": {\n"a": 1,,}}')
    with pytest.raises(UserError, match=r"plan\.json:2: not JSON"):
        Plan.load(path)
    path.write_text('{"ranks": [1]}')
    with pytest.raises(UserError, match="a plan is"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "q_proj"),
        ("bert.encoder.layer.11.attention.output.dense", "attention.output.dense"),
        ("bert.encoder.layer.0.output.dense", "output.dense"),
        ("bert.pooler.dense", "bert.pooler.dense"),
        ("transformer.h.2.attn.c_proj", "attn.c_proj"),
    ],
)
def test_modules_of_one_name_in_a_block_are_of_different_kinds(name: str, kind: str) -> None:
    assert Site(name, 2, 2, bias=False).kind == kind
