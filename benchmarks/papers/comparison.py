"""Methods side by side at the end of training: quality against what was sent, for each task, over the seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.drawing import panels, points
from benchmarks.papers.recipe import Row
from benchmarks.papers.seeds import over_seeds
from benchmarks.papers.task import WORKERS
from benchmarks.papers.training import TASKS, Run, Training


@final
@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Args:
        training: the run; what follows a comma in its method's name is a variant of the method.
        target: the density that is to be sent, which the method reaches more or less.
    """

    training: Training
    target: float

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.training.seed


def compared(cell: Compared) -> list[Row]:
    """The row of the end of the run, as from :func:`trained`, with its target."""
    run = Run(cell.training)
    end = {"target": cell.target} | run.rows()[-1]
    if cell.training.placement == "update" and not math.isnan(float(end["quality"])):
        end |= qualities(run)
    return [end]


def qualities(run: Run) -> Row:
    """The quality at x and at x - mean residual of an update-placed run.

    Batch norm remembers the points at which gradients were taken, and with a residual applied these may be far from
    both. So that each point is judged by itself, the network looks at training data there first; that forgets nine
    tenths of what batch norm knew, and changes nothing else.
    """
    found: Row = {}
    for name, point in (("quality", run.simulator.synced), ("virtual_quality", run.simulator.virtual)):
        for worker in range(WORKERS):
            for step in range(3):
                run.task.gradient(worker, point, step)
        found[name] = run.task.quality(point)
    return found


class Point(NamedTuple):
    """Runs of one method that differ in nothing but the seed: means, and the standard deviation of the quality."""

    x: float
    quality: float
    deviation: float


def lines(rows: Sequence[Row], x: str = "density", quality: str = "quality") -> dict[str, list[Point]]:
    """The points of each method, by the column ``x``; a run that diverged makes the mean NaN."""
    along = over_seeds(rows, x, by=("method", "target"))
    spreads = over_seeds(rows, quality, by=("method", "target"))
    found: dict[str, list[Point]] = {}
    for key, (mean, deviation, _) in spreads.items():
        found.setdefault(str(key[0]), []).append(Point(along[key].mean, mean, deviation))
    return {method: sorted(points_of_method) for method, points_of_method in found.items()}


def draw_by_task(rows: Sequence[Row], x: str = "density", xlabel: str = "average density") -> Figure:
    """A panel for each task: quality against the column ``x``, a line for each method, dashed for a variant."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks), width=5.2, height=3.8)
    for task, panel in zip(tasks, axes, strict=True):
        for method, along in lines([row for row in rows if row["task"] == task], x).items():
            draw_line(panel, method, along)
        kind = next(kind for name, kind in TASKS.items() if name == task)
        panel.set(title=str(task), xlabel=xlabel, ylabel=kind.quality_name, xscale="log")
        panel.set_yscale("linear" if kind.higher_is_better else "log")
        panel.legend(fontsize=7)
    return figure


def draw_line(axes: Axes, method: str, along: Sequence[Point], *, label: str | None = None) -> None:
    """The points of a method with the spread of its quality, in the method's colour, dashed if it is a variant."""
    x, quality, deviation = zip(*along, strict=True)
    points(axes, method.partition(",")[0], x, quality, deviation, label=method if label is None else label)
    if "," in method:
        drawn, _, _ = axes.containers[-1]
        drawn.set(linestyle="--", markerfacecolor="white")
