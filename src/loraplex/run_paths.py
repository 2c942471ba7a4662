"""Where the files of a run lie in its folder, for whoever writes or reads one."""

from __future__ import annotations

from pathlib import Path


class RunPaths:
    """The files of one run, by what they are."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.recipe = self.path / "recipe.yaml"
        self.decided = self.path / "decided.json"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.json"
        self.environment = self.path / "environment.json"
        self.plot = self.path / "loss.png"
        self.ranks_plot = self.path / "ranks.png"
        self.routing = self.path / "routing.json"
        self.routing_plot = self.path / "routing.png"
        self.earlier = self.path / "earlier-run"

    @property
    def contents(self) -> tuple[Path, ...]:
        """Everything a run writes; nothing else in the folder is ever moved or deleted.

        In the order in which it is moved aside: without metrics a run is not finished, and where the recipe lies aside
        everything does.
        """
        return (
            self.metrics,
            self.adapter,
            self.checkpoints,
            self.evaluation,
            self.decided,
            self.plan,
            self.environment,
            self.plot,
            self.ranks_plot,
            self.routing,
            self.routing_plot,
            self.recipe,
        )
