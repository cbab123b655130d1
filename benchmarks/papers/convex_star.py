"""Figures 8 and 9 of arXiv:2108.00951: EF-GDstar on logistic regression, down to 1e-10 and below.

Workers take full gradients and send g_i = ∇f_i(x) - ∇f_i(x*) (EC-GDstar of arXiv:2010.12292), which vanish at x*: what
is held back is all that keeps a run from it. On madelon the settings are the paper's: Top-1 and 20 workers, Top-5 and
100, and τ = γλ = 1e-7, which is 1e-3 of the distance of each coordinate from x* at the start; so it is on the others.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from benchmarks.papers.convex import SOURCES, Trial, Workers, mean_curve, problem, split, traced, trials
from benchmarks.papers.drawing import curve, panels
from benchmarks.papers.recipe import Form, Oracle, Recipe, Row, oracle, oracle_at_most

# (data set, workers, k, steps), the longest first
SETTINGS: Final = (
    ("gisette-like", 20, 10, 10_000),
    ("madelon", 100, 5, 100_000),
    ("a9a", 20, 1, 40_000),
    ("madelon", 20, 1, 60_000),
)
PANELS: Final = (
    ("step", "excess", "step", "f(x) - f*"),
    ("bits", "excess", "bits that a worker sent", "f(x) - f*"),
    ("step", "error", "step", "mean ‖e‖²"),
)


def cells(form: Form) -> list[Trial]:
    """Only madelon with 20 workers, which has the oracles, or all; nothing is random but which rows are whose."""
    return [
        trial
        for name, workers, k, steps in (SETTINGS[-1:] if form == "short" else SETTINGS)
        for trial in trials(name, k, 1e-3 * SOURCES[name].offset, workers=workers, steps=steps, seed=0)
    ]


def run(trial: Trial) -> list[Row]:
    """The rows of one run (:func:`~benchmarks.papers.convex.traced`), with L, f* and f(x0) of its problem."""
    solved = problem(trial.data)
    rows = traced(trial, Workers(solved, trial.workers, trial.seed).shifted)
    least = solved.value(solved.optimum)
    first = solved.value(solved.optimum + np.full(solved.optimum.shape, SOURCES[trial.data].offset))
    return [row | {"L": solved.smoothness, "f_star": least, "f_x0": first} for row in rows]


def oracles(rows: Sequence[Row]) -> list[Oracle]:
    """The numbers of madelon with 20 workers, known from the paper's notebooks and from an independent repetition."""
    last = {
        method: part[-1]
        for (name, workers, method), part in split(rows, "data", "workers", "method").items()
        if name == "madelon" and workers == 20
    }
    threshold, top = (
        {key: value for key, value in last[method].items() if not isinstance(value, str)}
        for method in ("hard threshold", "Top-k")
    )
    star = "efgdstar_threshold"
    return [
        oracle("madelon_L", threshold["L"], expected=29790805.64933511, tolerance=1e-7),
        oracle("madelon_f_star", threshold["f_star"], expected=0.667919553429515, tolerance=2e-15),
        oracle("madelon_f_x0", threshold["f_x0"], expected=12.17092906, tolerance=1e-7),
        oracle(f"{star}_bits", threshold["bits"], expected=9.4e5, tolerance=0.15 * 9.4e5),
        oracle("efgdstar_top1_bits", top["bits"], expected=1.92e6, tolerance=0.01 * 1.92e6),
        oracle(f"{star}_mean_sq_error", threshold["error"], expected=1.47e-12, tolerance=0.1 * 1.47e-12),
        oracle_at_most(f"{star}_mean_sq_error_below", threshold["most_error"], most=5e-12),
        oracle_at_most(f"{star}_suboptimality", threshold["excess"], most=5e-11),
        oracle("efgdstar_top1_suboptimality", top["excess"], expected=3.03e-11, tolerance=0.1 * 3.03e-11),
    ]


def draw(rows: list[Row]) -> Figure:
    """A line of panels for each data set and number of workers."""
    lines = split(rows, "data", "workers")
    figure, axes = panels(len(PANELS), rows=len(lines))
    for number, ((name, workers), part) in enumerate(lines.items()):
        own = axes[number * len(PANELS) : (number + 1) * len(PANELS)]
        for panel, (x, y, x_label, y_label) in zip(own, PANELS, strict=True):
            for (method,), one in split(part, "method").items():
                curve(panel, str(method), *mean_curve(one, x, y))
            panel.set(xlabel=x_label, ylabel=y_label, yscale="log", xscale="log" if x == "bits" else "linear")
        own[0].set_title(f"{name}, {workers} workers")
        own[0].legend(frameon=False)
    return figure


RECIPE = Recipe("convex_star", "Figures 8 and 9 of arXiv:2108.00951", cells, run, draw, oracles)
