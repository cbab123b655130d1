"""EC-SGD-DIANA beside EF-SGD on logistic regression: what learnt shifts do for a relative and an absolute compressor.

EC-SGD-DIANA (arXiv:2010.12292) is the practical way to do without the gradients at x* that EF-GDstar takes: worker i
learns a shift h_i and compresses e_i + γ(ĝ_i - h_i + h) with h = mean h_i; a second message, Q(ĝ_i - h_i), moves the
shift, h_i ← h_i + α Q(ĝ_i - h_i). Q is the unbiased random-k, with as many values as Top-k sends and so the same bits
again; α = 1 / (1 + ω) = k / d. Gradients are of one sample each, as in :mod:`benchmarks.papers.convex_sgd`.
"""

from dataclasses import dataclass
from typing import Final, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.papers.convex import (
    SOURCES,
    VALUE_BITS,
    Trial,
    Workers,
    mean_curve,
    problem,
    split,
    traced,
    trials,
)
from benchmarks.papers.convex_sgd import SETTINGS
from benchmarks.papers.drawing import colour_of, panels
from benchmarks.papers.recipe import Form, Recipe, Row
from thresher.compression import Compressor, Round
from thresher.compression.catalogue import parse

PANELS: Final = (
    ("step", "excess", "step", "f(x) - f*"),
    ("bits", "excess", "bits that a worker sent", "f(x) - f*"),
    ("step", "error", "step", "mean ‖e‖²"),
)


@final
@dataclass(frozen=True)
class Cell:
    """A run of EF-SGD, or of EC-SGD-DIANA.

    Args:
        trial: what it has in common with the others.
        k: values in the second message of a worker; 0: EF-SGD, which has none.
        seed: of the trial, and of the coordinates that are drawn.
    """

    trial: Trial
    k: int
    seed: int


def cells(form: Form) -> list[Cell]:
    """One seed of madelon, or four, and gisette-like as well; 20 workers."""
    names, seeds = (("madelon",), 1) if form == "short" else (("gisette-like", "madelon"), 4)
    return [
        Cell(trial, k, seed)
        for name in names
        for seed in range(seeds)
        for trial in trials(
            name,
            SETTINGS[name].k,
            SETTINGS[name].tau,
            workers=20,
            steps=SETTINGS[name].epochs * SETTINGS[name].rows // 20,
            seed=seed,
        )
        if trial.method != "dense"
        for k in (0, SETTINGS[name].k)
    ]


@final
class Shifts:
    """The shifts h_i of all workers, [n, d] float32, zero at first.

    Args:
        quantizer: Q of the workers' vectors, one after the other; unbiased.
        workers: n.
        numel: d.
        rate: α.
    """

    def __init__(self, quantizer: Compressor, workers: int, numel: int, rate: float) -> None:
        self._quantizer = quantizer
        self._rate = rate
        self._step = 0
        self.values = torch.zeros(workers, numel)

    def shifted(self, gradients: Tensor) -> Tensor:
        """ĝ_i - h_i + h for the ``gradients`` ĝ_i, [n, d] float32; then the shifts move towards them."""
        apart = gradients - self.values
        sent = apart + self.values.mean(dim=0)
        message = self._quantizer.compress(apart.flatten(), Round(self._step))
        self.values.add_(message.densify().view_as(apart), alpha=self._rate)
        self._step += 1
        return sent


def run(cell: Cell) -> list[Row]:
    """The rows of one run (:func:`~benchmarks.papers.convex.traced`); ``bits`` are those of both messages."""
    trial, numel = cell.trial, SOURCES[cell.trial.data].features
    workers = Workers(problem(trial.data), trial.workers, trial.seed)
    if cell.k == 0:
        plain: Row = {"algorithm": "EF-SGD"}
        return [plain | row for row in traced(trial, workers.sampled)]
    quantizer = parse(f"LayerWise(UnbiasedRandomK({cell.k}/{numel}, seed={cell.seed}))", [(numel,)] * trial.workers)
    assert isinstance(quantizer, Compressor)
    shifts = Shifts(quantizer, trial.workers, numel, cell.k / numel)
    rows = traced(trial, lambda z: shifts.shifted(workers.sampled(z)))
    name: Row = {"algorithm": "EC-SGD-DIANA"}
    second = VALUE_BITS * cell.k
    return [name | row | {"bits": float(row["bits"]) + second * int(row["step"])} for row in rows]


def draw(rows: list[Row]) -> Figure:
    """A line of panels for each data set; curves are means over the seeds, EC-SGD-DIANA's are dashed."""
    lines = split(rows, "data")
    figure, axes = panels(len(PANELS), rows=len(lines))
    for number, ((name,), part) in enumerate(lines.items()):
        own = axes[number * len(PANELS) : (number + 1) * len(PANELS)]
        for panel, (x, y, x_label, y_label) in zip(own, PANELS, strict=True):
            for (algorithm, method), one in split(part, "algorithm", "method").items():
                dashes = "-" if algorithm == "EF-SGD" else "--"
                at = mean_curve(one, x, y)
                panel.plot(*at, dashes, color=colour_of(str(method)), linewidth=1.4, label=f"{algorithm}, {method}")
            panel.set(xlabel=x_label, ylabel=y_label, yscale="log", xscale="log" if x == "bits" else "linear")
        own[0].set_title(f"{name}, 20 workers")
        own[0].legend(frameon=False)
    return figure


RECIPE = Recipe("convex_diana", "EC-SGD-DIANA, appendix C.3 of arXiv:2108.00951", cells, run, draw)
