"""Figures 1, 4 and 7 of arXiv:2108.00951: SGD on logistic regression, Top-k and the hard threshold at equal volume.

Each worker draws one of its own rows a step; an epoch is N / n steps. With 20 workers the settings are the paper's: on
gisette-like Top-10 and τ = γλ = 5e-3 for 10 epochs, on madelon Top-1 and τ = 5e-4 for 30. a9a is ours: Top-1, and by
the rule of appendix C.3, τ = √(ε/d), the ε whose τ sends about as much. 100 workers have the same settings.
"""

from itertools import pairwise
from typing import Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.convex import Trial, Workers, mean_curve, problem, split, traced, trials
from benchmarks.papers.drawing import curve, panels
from benchmarks.papers.recipe import Form, Recipe, Row


class Setting(NamedTuple):
    """How a data set of N rows is run: k of Top-k, τ = γλ of the hard threshold in the unit of x, and how long."""

    rows: int
    k: int
    tau: float
    epochs: int


SETTINGS: Final = {
    "gisette-like": Setting(6000, k=10, tau=5e-3, epochs=10),
    "a9a": Setting(32_500, k=1, tau=0.65, epochs=10),
    "madelon": Setting(2000, k=1, tau=5e-4, epochs=30),
}
PANELS: Final = (
    ("step", "excess", "step", "f(x) - f*"),
    ("bits", "excess", "bits that a worker sent", "f(x) - f*"),
    ("step", "error", "step", "mean ‖e‖²"),
    ("step", "corrected", "step", "mean ‖e + γg‖²"),
    ("step", "bits_a_step", "step", "bits per step and worker"),
)


def cells(form: Form) -> list[Trial]:
    """One seed of 20 workers, or four, and two of 100."""
    seeds = {20: 1} if form == "short" else {20: 4, 100: 2}
    return [
        trial
        for name, setting in SETTINGS.items()
        for workers, number in seeds.items()
        for seed in range(number)
        for trial in trials(
            name,
            setting.k,
            setting.tau,
            workers=workers,
            steps=setting.epochs * setting.rows // workers,
            seed=seed,
        )
    ]


def run(trial: Trial) -> list[Row]:
    """The rows of one run (:func:`~benchmarks.papers.convex.traced`), and ``bits_a_step`` since the row before."""
    workers = Workers(problem(trial.data), trial.workers, trial.seed)
    rows = traced(trial, workers.sampled)
    for before, row in pairwise(rows):
        steps = float(row["step"]) - float(before["step"])
        row["bits_a_step"] = (float(row["bits"]) - float(before["bits"])) / steps
    rows[0]["bits_a_step"] = 0.0
    return rows


def draw(rows: list[Row]) -> Figure:
    """A line of panels for each data set and number of workers; curves are means over the seeds."""
    lines = split(rows, "data", "workers")
    figure, axes = panels(len(PANELS), rows=len(lines), width=3.7, height=2.9)
    for number, ((name, workers), part) in enumerate(lines.items()):
        own = axes[number * len(PANELS) : (number + 1) * len(PANELS)]
        for panel, columns in zip(own, PANELS, strict=True):
            _draw_panel(panel, part, columns)
        own[0].set_title(f"{name}, {workers} workers")
        own[0].legend(frameon=False)
    return figure


def _draw_panel(panel: Axes, rows: list[Row], columns: tuple[str, str, str, str]) -> None:
    x, y, x_label, y_label = columns
    for (method,), part in split(rows, "method").items():
        curve(panel, str(method), *mean_curve(part, x, y))
    panel.set(xlabel=x_label, ylabel=y_label, yscale="log", xscale="log" if x == "bits" else "linear")


RECIPE = Recipe("convex_sgd", "Figures 1, 4 and 7 of arXiv:2108.00951", cells, run, draw)
