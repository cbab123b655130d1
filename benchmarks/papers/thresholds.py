"""Paper 1, appendix D: which hard threshold λ gives which average density, and what the paper's rule says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.drawing import colour_of, panels, points
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import PILOT
from benchmarks.papers.task import WORKERS
from benchmarks.papers.training import TASKS, Run, TaskName, Training

TARGETS: Final = (0.01, 0.003, 0.001)
"""The average densities of the other recipes."""

LADDERS: Final[dict[TaskName, tuple[float, ...]]] = {
    "images": (0.01, 0.03, 0.1, 0.3, 1.0),
    "language": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "recommendation": (0.0001, 0.0003, 0.001, 0.003, 0.01),
}
"""The thresholds tried, in the unit of the gradient."""

LAMBDAS: Final[dict[TaskName, dict[float, float]]] = {
    "images": {0.01: 0.043, 0.003: 0.087, 0.001: 0.16},
    "language": {0.01: 0.0020, 0.003: 0.0049, 0.001: 0.011},
    "recommendation": {0.01: 0.00084, 0.003: 0.0018, 0.001: 0.0037},
}
"""Average density → the threshold that gives it in the full form: :func:`threshold_for` of the measured ladder."""


@final
@dataclass(frozen=True)
class Pilot:
    """A run with a threshold of the ladder, on a seed that no other recipe uses."""

    task: TaskName
    threshold: float
    form: Form
    seed: int = PILOT


def cells(form: Form) -> list[Pilot]:
    """All thresholds of all ladders; every other one in the short form."""
    step = 2 if form == "short" else 1
    return [Pilot(task, threshold, form) for task in TASKS for threshold in LADDERS[task][::step]]


def run(pilot: Pilot) -> list[Row]:
    """The last row of the run, with the threshold and the number of parameters."""
    feedback = f"ErrorFeedback(HardThreshold({pilot.threshold}))"
    piloted = Run(Training(pilot.task, "hard threshold", feedback, pilot.seed, pilot.form, evaluations=1))
    numel = piloted.simulator.synced.numel()
    return [{"threshold": pilot.threshold, "numel": numel, **row} for row in piloted.rows()]


def threshold_for(density: float, thresholds: Sequence[float], densities: Sequence[float]) -> float:
    """The threshold that gives ``density``, to two digits: on the line between its neighbours, both axes logarithmic.

    Args:
        density: wanted, within the ``densities``.
        thresholds: tried, rising.
        densities: that they gave, falling.

    Raises:
        ValueError: the ladder does not reach ``density``.
    """
    if not densities[-1] <= density <= densities[0]:
        raise ValueError(f"the ladder reaches densities from {densities[-1]:.2g} to {densities[0]:.2g}, not {density}")
    logarithm = np.interp(math.log(density), np.log(densities[::-1]), np.log(thresholds[::-1]))
    return float(f"{math.exp(logarithm):.2g}")


def rule(density: float, numel: int) -> float:
    """The paper's threshold for k = density · numel: λ = 1 / (2 √k), which is (29) with ζ = 0 and σ = 1/4."""
    return 0.5 / math.sqrt(density * numel)


def draw(rows: list[Row]) -> Figure:
    """Density and quality against the threshold, a column for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks), rows=2)
    for task, above, below in zip(tasks, axes[: len(tasks)], axes[len(tasks) :], strict=True):
        ladder = [row for row in rows if row["task"] == task]
        _draw_densities(above, ladder)
        above.set_title(str(task))
        thresholds, quality = _columns(ladder, "threshold", "quality")
        points(below, "hard threshold", thresholds, quality, [0.0] * len(ladder))
        below.set(xscale="log", xlabel="threshold λ, in units of the gradient")
        below.set_ylabel(next(kind.quality_name for name, kind in TASKS.items() if name == task))
    return figure


def _draw_densities(axes: Axes, ladder: Sequence[Row]) -> None:
    thresholds, densities = _columns(ladder, "threshold", "density")
    points(axes, "hard threshold", thresholds, densities, [0.0] * len(ladder), label="measured")
    shown = np.geomspace(min(densities), max(densities))
    numel = int(ladder[0]["numel"])
    axes.plot([rule(density, numel) for density in shown], shown, "--", color=colour_of("dense"), label="λ = 1/(2√k)")
    found = {
        density: threshold_for(density, thresholds, densities)
        for density in TARGETS
        if densities[-1] <= density <= densities[0]
    }
    label = ", ".join(f"{threshold:g}" for threshold in found.values())
    axes.plot(list(found.values()), list(found), "*", color=colour_of("budget"), zorder=3, label=f"read off: {label}")
    axes.set(xscale="log", yscale="log", xlabel="threshold λ, in units of the gradient", ylabel="average density")
    axes.legend()


def _columns(rows: Sequence[Row], *names: str) -> list[list[float]]:
    return [[float(row[name]) for row in rows] for name in names]


RECIPE: Final = Recipe(
    name="thresholds",
    shows=f"paper 1, appendix D: hard threshold against average density, {WORKERS} workers",
    cells=cells,
    run=run,
    draw=draw,
)
