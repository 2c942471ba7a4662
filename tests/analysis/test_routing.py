"""Gates by site and task: what is measured is what the routers say, and measuring leaves no trace."""

from pathlib import Path

import pytest
import torch
from tests.tuner.tiny_models import adapted, config, logits, tokens

from loraplex.analysis.routing_plot import draw_routing
from loraplex.tuner.routing import RoutingWatch, by_task, gate_records, history, measure_routing, overview, plain

TARGETS = {"adapter": {"name": "hydra", "heads": 3}, "target_modules": ["up_proj", "down_proj"]}


def rows(count: int = 4, length: int = 7) -> list[list[int]]:
    return [tokens(1, length + index, seed=index)[0].tolist() for index in range(count)]


def test_means_over_all_tokens_of_all_rows_are_those_of_the_routers() -> None:
    model = adapted(**TARGETS)
    seen = {}
    for site in gate_records(model):
        layer = model.get_base_model().get_submodule(site)
        seen[site] = (layer, [])
        layer.register_forward_pre_hook(lambda module, args, kept=seen[site][1]: kept.append(args[0][0]))
    before = logits(model)
    for _, kept in seen.values():
        kept.clear()
    found = measure_routing(model, rows())
    assert list(found) == list(seen)
    assert len(found) == 4
    for site, (layer, kept) in seen.items():
        inputs = torch.cat(kept).clone()
        assert found[site].tokens == len(inputs) == 7 + 8 + 9 + 10
        gates = (inputs @ layer.adapter("default").combine.lora_route.T).softmax(-1).mean(0)
        assert found[site].load == pytest.approx(gates.tolist(), rel=1e-5)
    # nothing is recorded any longer, and nothing has changed
    assert torch.equal(logits(model), before)
    assert all(record.read() is None for record in gate_records(model).values())


def test_tasks_are_apart_and_cut_to_the_most_rows() -> None:
    model, given = adapted(**TARGETS), rows()
    found = by_task(model, given, ["a", "b", "a", "a"], most=2)
    assert list(found) == ["a", "b"]
    for task, chosen in (("a", [given[0], given[2]]), ("b", [given[1]])):
        assert found[task] == measure_routing(model, chosen)


def test_an_adapter_that_routes_nothing_has_no_gates() -> None:
    model = adapted(adapter="lora")
    assert gate_records(model) == {}
    assert measure_routing(model, rows()) == {}


def test_only_the_active_adapter_is_looked_at() -> None:
    model = adapted(**TARGETS)
    model.add_adapter("other", config(adapter={"name": "hydra", "heads": 2}, target_modules=["q_proj"]))
    assert {record.heads for record in gate_records(model).values()} == {3}
    model.set_adapter("other")
    assert {record.heads for record in gate_records(model).values()} == {2}


def test_a_watch_says_what_happened_since_the_last_look_and_keeps_some_snapshots() -> None:
    model = adapted(**TARGETS)
    watch = RoutingWatch(model)
    assert watch.look(1, 100) == ({}, None)
    logits(model)
    said, sites = watch.look(1, 100)
    assert said == pytest.approx(overview(measure_routing(model, tokens().tolist())), rel=1e-5)
    watch = RoutingWatch(model)
    logits(model)
    watch.forget()
    assert watch.look(3, 100) == ({}, None)
    kept = 0
    for step in range(1, 101):
        logits(model)
        kept += watch.look(step, 100)[1] is not None
    assert 30 <= kept <= 41
    watch.stop()
    logits(model)
    assert watch.look(1, 100) == ({}, None)
    log = [{"step": 1, "loss": 2.0, **said, "routing": sites}, {"step": 1, "eval_loss": 1.0}, {"step": 2, "loss": 1.0}]
    found = history(log)
    assert found["over_training"] == [{"step": 1, "entropy": said["router_entropy"], "dead_heads": said["dead_heads"]}]
    assert [snapshot["step"] for snapshot in found["snapshots"]] == [1]


@pytest.mark.parametrize("course", [[], [{"step": 1, "entropy": 0.9, "dead_heads": 0.0}]])
def test_the_picture_is_drawn_with_and_without_a_course(tmp_path: Path, course) -> None:
    tasks = {task: plain(sites) for task, sites in by_task(adapted(**TARGETS), rows(), ["a", "b", "", "a"]).items()}
    draw_routing(tmp_path / "routing.png", {"over_training": course, "tasks": tasks}, "hydra")
    assert (tmp_path / "routing.png").stat().st_size > 5000
