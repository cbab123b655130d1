"""The learning rates of the deep tasks: chosen on runs that send everything, and on nothing else."""

from typing import Final

from matplotlib.figure import Figure

from benchmarks.papers.comparison import Compared, compared
from benchmarks.papers.drawing import panels, points
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import PILOT
from benchmarks.papers.training import DENSE, TASKS, Training

MULTIPLES: Final = (1 / 2, 1.0, 2.0)
"""Of the rate that is in use."""


def cells(form: Form) -> list[Compared]:
    """Every task at every rate, on a seed that no other recipe takes a result from; in short the images only."""
    return [
        Compared(Training(task, "dense", DENSE, PILOT, form, rate=multiple, evaluations=1), 1.0)
        for task in (list(TASKS)[:1] if form == "short" else TASKS)
        for multiple in MULTIPLES
    ]


def draw(rows: list[Row]) -> Figure:
    """Quality against the rate, for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks))
    for task, panel in zip(tasks, axes, strict=True):
        mine = [row for row in rows if row["task"] == task]
        rates, qualities = ([float(row[name]) for row in mine] for name in ("rate", "quality"))
        points(panel, "dense", rates, qualities, [0.0] * len(mine))
        name = next(kind.quality_name for name, kind in TASKS.items() if name == task)
        panel.set(title=str(task), xlabel="learning rate", ylabel=name, xscale="log")
    return figure


RECIPE: Final = Recipe(name="rates", shows="the learning rates of the deep tasks", cells=cells, run=compared, draw=draw)
