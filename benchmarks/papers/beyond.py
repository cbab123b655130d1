"""Methods that the papers did not compare, at equal bytes: what the frames on the wire take, with our coding."""

from collections.abc import Mapping
from typing import Final

from matplotlib.figure import Figure

from benchmarks.papers.comparison import draw_by_task
from benchmarks.papers.contestants import BUDGETS, METHODS, Contestant, contested
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import seeds
from benchmarks.papers.training import TASKS

SCALES: Final[Mapping[tuple[str, str, float], float]] = {}
"""Task, method and budget → what brings it to the budget's bytes, as the recipe ``scales`` found it; else 1."""


def cells(form: Form) -> list[Contestant]:
    """All methods on all tasks; in short within the larger budget only."""
    return [
        Contestant(task, method, budget, seed, form, SCALES.get((task, method, budget), 1.0))
        for seed in seeds(form)
        for task in TASKS
        for budget in (BUDGETS[:1] if form == "short" else BUDGETS)
        for method in METHODS
    ]


def draw(rows: list[Row]) -> Figure:
    """Quality against the bytes of a worker's frames in a round, for each task."""
    return draw_by_task(rows, "up_bytes_per_round", "bytes a worker sends in a round")


RECIPE: Final = Recipe(
    name="beyond",
    shows="the comparison that neither paper makes: quality at equal bytes on the wire",
    cells=cells,
    run=contested,
    draw=draw,
)
