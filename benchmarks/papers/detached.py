"""DEF and its relatives with random blocks: accuracy at each rate, the largest stable rate, and a sweep of λ."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.comparison import Point, draw_line, lines, qualities
from benchmarks.papers.drawing import panels
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import final as ends_of
from benchmarks.papers.seeds import seeds
from benchmarks.papers.training import DENSE, Run, Training

BLOCKS: Final = "RandomBlocks(1/64)"
# CSER as in its official runs (nothing of the update is sent, a reset in each round) is SAEF to the bit. Here it shares
# the volume out: half of it for the update, half for the reset, by blocks that are drawn apart.
CSER: Final = "ErrorReset(RandomBlocks(1/128), 1, RandomBlocks(1/128, seed=1))"
METHODS: Final = {"SGD": None, "EF": 0.0, "SAEF": 1.0, "DEF": 0.3, "CSER": None}
RATES: Final[dict[Form, tuple[float, ...]]] = {"short": (1 / 64, 1 / 16, 1 / 4), "full": (1 / 64, 1 / 16, 1 / 4, 1.0)}
SWEPT: Final[dict[Form, tuple[float, ...]]] = {"short": (0.1, 0.5), "full": (0.1, 0.2, 0.5, 0.7)}
SWEEP_RATE: Final = 1 / 4
EVALUATIONS: Final = 4
STABLE: Final = 20.0  # % accuracy at the end: twice that of a guess


@final
@dataclass(frozen=True)
class Detached:
    """One run: of a method, at a multiple of the task's rate; λ is that of DEF, None for methods without one."""

    method: str
    coefficient: float | None
    rate: float
    seed: int
    form: Form


def cells(form: Form) -> list[Detached]:
    """All methods at all rates, and DEF at one rate with other λ besides those of EF, DEF and SAEF, with one seed."""
    swept = [Detached("DEF, swept", coefficient, SWEEP_RATE, 0, form) for coefficient in SWEPT[form]]
    return swept + [
        Detached(method, coefficient, rate, seed, form)
        for seed in seeds(form)
        for method, coefficient in METHODS.items()
        for rate in RATES[form]
    ]


def run(cell: Detached) -> list[Row]:
    """Four rows; heavy-ball momentum in each worker, and nothing but finished updates is sent."""
    run = Run(
        Training("images", cell.method, feedback_of(cell), cell.seed, cell.form, "update", cell.rate, nesterov=False)
    )
    last = run.plan.rounds - 1
    evaluated = {round(last * (number + 1) / EVALUATIONS) for number in range(EVALUATIONS)}
    rows: list[Row] = []
    finite = True
    for step in range(run.plan.rounds):
        finite = finite and run.advance(step)
        if step in evaluated:
            row: Row = {"task": "images", "method": cell.method, "seed": cell.seed, "target": cell.rate}
            row |= {} if cell.coefficient is None else {"coefficient": cell.coefficient}
            row |= {"rate": run.plan.rate, "round": step + 1}
            rows.append(row | (qualities(run) if finite else {"quality": math.nan, "virtual_quality": math.nan}))
    return rows


def feedback_of(cell: Detached) -> str:
    """The call that makes the method."""
    if cell.coefficient is not None:
        return f"DetachedErrorFeedback({BLOCKS}, {cell.coefficient})"
    return DENSE if cell.method == "SGD" else CSER


def ends(rows: Sequence[Row]) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
    """Of each method, the sweep over λ left out: accuracy against the rate, at x and at x - mean residual.

    DEF at x - mean residual is DEF-A; CSER's paper evaluates the local models, whose mean that point is.
    """
    last = [row for row in ends_of(rows) if row["method"] in METHODS]
    at_x, at_virtual = (lines(last, "rate", quality) for quality in ("quality", "virtual_quality"))
    return at_x, at_virtual


def largest_stable_rate(along: Sequence[Point]) -> float:
    """Up to which all rates are stable; 0 if none is."""
    stable = itertools.takewhile(lambda point: point.quality > STABLE, along)
    return max((point.x for point in stable), default=0.0)


def draw(rows: list[Row]) -> Figure:
    """Accuracy against the rate at either point, and against λ at one rate."""
    figure, (x_panel, virtual_panel, swept) = panels(3, width=5.2, height=3.8)
    at_x, at_virtual = ends(rows)
    for method, along in at_x.items():
        style = "dense" if method == "SGD" else method
        draw_line(x_panel, style, along, label=f"{_best(method, along)}, stable to {largest_stable_rate(along):.3g}")
        label = _best("DEF-A" if method == "DEF" else method, at_virtual[method])
        draw_line(virtual_panel, style, at_virtual[method], label=label)
    for panel, title in ((x_panel, "at x"), (virtual_panel, "at x − mean residual")):
        panel.set(title=title, xlabel="learning rate", ylabel="accuracy in %", xscale="log", ylim=(0.0, 100.0))
        panel.legend(fontsize=7)
    _draw_sweep(swept, rows)
    return figure


def _best(name: str, along: Sequence[Point]) -> str:
    best = max(along, key=lambda point: -1.0 if math.isnan(point.quality) else point.quality)
    return f"{name}: best {best.quality:.1f} ± {best.deviation:.1f} %"


def _draw_sweep(axes: Axes, rows: Sequence[Row]) -> None:
    swept = [
        row | {"method": "DEF", "target": row["coefficient"]}
        for row in ends_of(rows)
        if row["target"] == SWEEP_RATE and row["seed"] == 0 and "coefficient" in row
    ]
    for quality, style, label in (("quality", "DEF", "at x"), ("virtual_quality", "DEF-A", "at x − mean residual")):
        draw_line(axes, style, lines(swept, "coefficient", quality)["DEF"], label=label)
    axes.set(title=f"at {SWEEP_RATE} of the task's rate", xlabel="λ: 0 is EF, 1 is SAEF", ylabel="accuracy in %")
    axes.legend(fontsize=7)


RECIPE: Final = Recipe(
    name="detached",
    shows="arXiv:2004.05298: SGD, EF, SAEF, DEF, DEF-A and CSER with random blocks at ratio 64",
    cells=cells,
    run=run,
    draw=draw,
)
