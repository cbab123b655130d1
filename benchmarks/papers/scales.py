"""How equal bytes are met: the scale of each method's setting, from at most three runs on a seed of their own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from matplotlib.figure import Figure

from benchmarks.papers.contestants import BUDGETS, METHODS, Contestant, contested
from benchmarks.papers.drawing import curve, panels
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import PILOT
from benchmarks.papers.training import TASKS

NEAR: Final = 0.1  # bytes that differ by no more than this fraction are equal
TRIES: Final = 3
EXACT: Final = {"Top-k", "DEF", "EF21"}
"""Methods that send as many coordinates as Top-k in each round, so there is nothing to seek."""


def cells(form: Form) -> list[Contestant]:
    """Every other method on each task and within each budget; in short on the recommendation, in the larger one."""
    return [
        Contestant(task, method, budget, PILOT, form)
        for task in (list(TASKS)[-1:] if form == "short" else TASKS)
        for budget in (BUDGETS[:1] if form == "short" else BUDGETS)
        for method in METHODS
        if method not in EXACT
    ]


def run(cell: Contestant) -> list[Row]:
    """A row for each try, with ``used``: the bytes up as a fraction of those of Top-k."""
    (measure,) = contested(replace(cell, method="Top-k"))
    rows: list[Row] = []

    def used(scale: float) -> float:
        (row,) = contested(replace(cell, scale=scale))
        rows.append(row | {"used": float(row["up_bytes"]) / float(measure["up_bytes"])})
        return float(rows[-1]["used"])

    scale_for(used)
    return rows


def scale_for(used: Callable[[float], float]) -> float:
    """The scale whose ``used`` is nearest to 1, of a few tries; each corrects the one before."""
    tried: dict[float, float] = {}
    scale = 1.0
    for _ in range(TRIES):
        tried[scale] = used(scale)
        if abs(tried[scale] - 1.0) <= NEAR:
            break
        scale = float(f"{scale / tried[scale]:.3g}")
    return best(tried)


def best(tried: dict[float, float]) -> float:
    """Of scale → what was used, the scale whose use is nearest to 1."""
    return min(tried, key=lambda scale: abs(tried[scale] - 1.0))


def found(rows: list[Row]) -> dict[tuple[str, str, float], float]:
    """Task, method and budget → the scale, where it is not 1."""
    tries: dict[tuple[str, str, float], dict[float, float]] = {}
    for row in rows:
        key = (str(row["task"]), str(row["method"]), float(row["target"]))
        tries.setdefault(key, {})[float(row["scale"])] = float(row["used"])
    return {key: best(tried) for key, tried in tries.items() if best(tried) != 1.0}


def draw(rows: list[Row]) -> Figure:
    """What each try used, for each task and budget."""
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    figure, axes = panels(len(tasks))
    for task, panel in zip(tasks, axes, strict=True):
        for method, budget in dict.fromkeys((str(row["method"]), row["target"]) for row in rows):
            mine = [row for row in rows if (row["task"], row["method"], row["target"]) == (task, method, budget)]
            tried, used = ([float(row[name]) for row in mine] for name in ("scale", "used"))
            curve(panel, method, tried, used, label=f"{method}, {budget:g}")
            panel.lines[-1].set_marker("o")
        panel.axhspan(1.0 - NEAR, 1.0 + NEAR, color="#dddddd")
        panel.set(title=task, xscale="log", yscale="log", xlabel="scale of the setting", ylabel="bytes of Top-k's")
        panel.legend(fontsize=6)
    return figure


RECIPE: Final = Recipe(
    name="scales", shows="how the methods of `beyond` are brought to equal bytes", cells=cells, run=run, draw=draw
)
