"""Shortcuts have no place in any target; without an open one the adapter goes where LoRA goes."""

import pytest

from loraplex import UserError
from loraplex.allocation.sites import EDGES
from loraplex.analysis.inspection import inspect
from loraplex.export.exporting import ExportRequest, export

pytestmark = pytest.mark.usefixtures("stock_in_process")
SHORTCUTS = {"name": "uniform", "shortcuts": True, "shortcut_r": 2}


@pytest.mark.parametrize("to", ["peft", "vllm", "merged", "gguf"])
def test_they_are_refused_with_the_reason(make, to: str) -> None:
    adapter = make(allocation=SHORTCUTS)
    with pytest.raises(UserError, match=r"'lora' has shortcuts between points of the residual stream.*no weight"):
        export(ExportRequest(str(adapter), to, adapter.with_name("out")))
    assert not adapter.with_name("out").exists()


def test_a_checkpoint_is_refused_once_its_weights_are_read(make) -> None:
    def live(model) -> None:
        model.base_model.close_ranks("default", "model.layers.0.residual_mlp", [0, 1])

    adapter = make(allocation={"name": "hetero", "shortcuts": True, "shortcut_r": 2}, change=live)
    with pytest.raises(UserError, match=r"has 6 shortcuts, such as model\.layers\.0\.residual_attention, between"):
        export(ExportRequest(str(adapter), "peft", adapter.with_name("out")))


def test_with_all_of_them_closed_it_is_exported(make) -> None:
    def close(model) -> None:
        for site in model.base_model.open_shortcuts("default"):
            model.base_model.close_ranks("default", site, [0, 1])

    adapter = make(allocation={"name": "hetero", "shortcuts": True, "shortcut_r": 2}, change=close)
    done = export(ExportRequest(str(adapter), "peft", adapter.with_name("out")))
    assert done.agreements[0].passed


def test_inspection_shows_them_beside_the_sites(make) -> None:
    found = inspect(str(make(allocation=SHORTCUTS)))
    kinds = [site.kind for site in found.sites]
    assert [kinds.count(kind) for kind in EDGES] == [2, 2, 2, 1]
    assert found.parameters == sum(site.rank * (site.in_features + site.out_features) for site in found.sites)
    assert found.saved_as == "loraplex's own type"
    assert all("shortcuts" in reason for reason in found.exports.values())
