"""A recipe with shortcuts: what is planned before, and what a run leaves."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM

from loraplex import load_adapter
from loraplex.allocation.sites import EDGES, is_edge
from loraplex.analysis.rank_map import rank_cells
from loraplex.models.loading import load_tokenizer
from loraplex.training.estimate import estimate
from loraplex.training.preparation import add_adapter, read_rows
from loraplex.training.reading import read_recipe
from loraplex.training.run import train

OPTIONS = ["--adapter.allocation", "{name: hetero, batches: 2, share: 0.3, shortcuts: true, separate_rankings: true}"]


def test_the_estimate_counts_them_as_the_real_model_has_them(tiny_recipe: Path, tiny_model: Path) -> None:
    recipe = read_recipe(tiny_recipe, OPTIONS)
    found = estimate(recipe, read_rows(recipe, load_tokenizer(recipe.model.name)))
    model = add_adapter(recipe, AutoModelForCausalLM.from_pretrained(tiny_model))
    assert (found.trainable, found.total) == model.get_nb_trainable_parameters()
    kinds = {kind.name: (kind.sites, kind.ranks, kind.parameters) for kind in found.kinds}
    assert [kinds[kind] for kind in EDGES] == [(n, (8, 8), n * 2 * 8 * 32) for n in (2, 2, 2, 1)]
    assert found.ranks.keys() == {layer.site for layer in model.base_model.adapter_layers()}
    # ⌊.3·14⌋ linear sites and round(.3·7) shortcuts
    assert found.budget == "6 modules"


def test_a_run_plans_draws_saves_and_reloads_them(tiny_recipe: Path, tiny_model: Path) -> None:
    result = train(read_recipe(tiny_recipe, OPTIONS))
    ranks = json.loads((result.folder / "plan.json").read_text())["ranks"]
    assert [rank for site, rank in ranks.items() if is_edge(site)].count(8) == 2
    assert set(EDGES) <= {cell.kind for cell in rank_cells([ranks])}
    assert (result.folder / "ranks.png").is_file()
    assert result.metrics["reload"]["difference"] == 0
    assert result.metrics["parameters"]["sites"] == 21
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), result.folder / "adapter")
    layers = {layer.site: layer.adapter("default").factors.rank for layer in again.base_model.adapter_layers()}
    assert layers == {site: rank for site, rank in ranks.items() if rank}
