"""DEF with λ* = S / (S + V), estimated from the residuals in each round, against the fixed 0.3 of its scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, cast, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.papers.comparison import qualities
from benchmarks.papers.detached import BLOCKS
from benchmarks.papers.drawing import curve, panels
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import seeds
from benchmarks.papers.training import Run, Training

FIXED: Final = 0.3
RATE: Final = 1 / 4  # of the task's own, where both are stable
ROWS: Final = 80  # of a run, about
EVALUATIONS: Final = 4


class Spread(NamedTuple):
    """How the residuals e_k of the workers lie about their mean ē.

    Args:
        second_moment: S = ‖ē‖².
        variance: V = (1/K) Σ ‖e_k - ē‖².
    """

    second_moment: float
    variance: float

    @property
    def best(self) -> float:
        """λ* = S / (S + V), where :meth:`mismatch` is least; 0 where all residuals are."""
        total = self.second_moment + self.variance
        return self.second_moment / total if total else 0.0

    def mismatch(self, coefficient: float) -> float:
        """(1/K) Σ ‖(x - ē) - (x - λ e_k)‖² = λ² V + (1 - λ)² S: how far gradients are taken from where x would be."""
        return coefficient**2 * self.variance + (1.0 - coefficient) ** 2 * self.second_moment


def spread_of(residuals: Sequence[Tensor]) -> Spread:
    """S and V of the ``residuals``, [numel] float32 each (arXiv:2004.05298; the identity behind λ* is exact)."""
    stacked = torch.stack(list(residuals)).double()
    mean = stacked.mean(dim=0)
    return Spread(float(mean.square().sum()), float((stacked - mean).square().sum(dim=1).mean()))


@final
@dataclass(frozen=True)
class Adaptive:
    """One run: ``method`` is "DEF" with the fixed coefficient, or "DEF, λ*"."""

    method: str
    seed: int
    form: Form


def cells(form: Form) -> list[Adaptive]:
    """Both on the images."""
    return [Adaptive(method, seed, form) for seed in seeds(form) for method in ("DEF, λ*", "DEF")]


def run(cell: Adaptive) -> list[Row]:
    """Rows of S, V, λ* and the λ in use with its mismatch, in squared units of the parameters; some with qualities.

    A worker knows the residuals of the others only after a round, so λ* of one round is used in the next.
    """
    feedback = f"DetachedErrorFeedback({BLOCKS}, {FIXED})"
    run = Run(Training("images", cell.method, feedback, cell.seed, cell.form, "update", RATE, nesterov=False))
    rounds = run.plan.rounds
    evaluated = {round((rounds - 1) * (number + 1) / EVALUATIONS) for number in range(EVALUATIONS)}
    rows: list[Row] = []
    for step in range(rounds):
        used = run.feedbacks[0].detached
        if not run.advance(step):
            break  # the rows end where the run diverged
        spread = spread_of([feedback.residual for feedback in run.feedbacks])
        if step % max(1, rounds // ROWS) == 0 or step in evaluated:
            row = _row(cell, step, spread, used)
            rows.append(row | (qualities(run) if step in evaluated else {}))
        if cell.method != "DEF":
            for feedback_of_worker in run.feedbacks:
                feedback_of_worker.detached = spread.best
    return rows


def _row(cell: Adaptive, step: int, spread: Spread, used: float) -> Row:
    return {
        "task": "images",
        "method": cell.method,
        "seed": cell.seed,
        "round": step + 1,
        "second_moment": spread.second_moment,
        "variance": spread.variance,
        "best": spread.best,
        "used": used,
        "mismatch": spread.mismatch(used),
    }


def draw(rows: list[Row]) -> Figure:
    """S and V, λ*, and the mismatch over the rounds, of the first seed; the accuracies in the legend are of all."""
    figure, (moments, best, mismatch) = panels(3)
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method and row["seed"] == 0]
        rounds = [float(row["round"]) for row in mine]

        def column(name: str, mine: Sequence[Row] = mine) -> list[float]:
            return [float(row[name]) for row in mine]

        style = "DEF" if method == "DEF" else "DEF-A"
        curve(moments, style, rounds, column("second_moment"), label=f"S, {method}")
        moments.plot(rounds, column("variance"), "--", color=moments.lines[-1].get_color(), label=f"V, {method}")
        curve(best, style, rounds, column("best"), label=f"λ* in the run of {method}")
        curve(mismatch, style, rounds, column("mismatch"), label=f"{method}: {_ends(rows, method)}")
    best.axhline(FIXED, color="#222222", linewidth=0.8, linestyle=":", label=f"fixed {FIXED}")
    moments.set(title="residuals of the workers", ylabel="‖·‖² of the parameters", yscale="log")
    best.set(title="λ* = S / (S + V)", ylim=(0.0, 1.0))
    mismatch.set(title="λ² V + (1 − λ)² S", yscale="log")
    for panel in (moments, best, mismatch):
        panel.set(xlabel="round")
        panel.legend(fontsize=7)
    return figure


def _ends(rows: Sequence[Row], method: str) -> str:
    """The accuracy at the end, mean over the seeds, at x and at x - mean residual."""
    last: dict[int, Row] = {
        cast("int", row["seed"]): row for row in rows if row["method"] == method and "quality" in row
    }
    at_x, at_virtual = (
        sum(float(row[name]) for row in last.values()) / max(1, len(last)) for name in ("quality", "virtual_quality")
    )
    return f"{at_x:.1f} % at x, {at_virtual:.1f} % at x − ē"


RECIPE: Final = Recipe(
    name="adaptive",
    shows="arXiv:2004.05298: the trade-off between variance and second moment, with λ estimated online",
    cells=cells,
    run=run,
    draw=draw,
)
