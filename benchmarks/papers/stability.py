"""How large a step detached error feedback bears, and how far workers stand from the virtual iterate.

On the quadratic h·x²/2 with the step η, no momentum, and each coordinate sent with chance p in a round, a coordinate is
multiplied by a random factor from one time it is sent to the next; its mean square is stable while E[factor²] < 1. The
factor depends on s = η·h and on the coefficient λ of the residual alone, so the largest stable s is known exactly. Here
it is found again in the simulator, with Random-k in place of random blocks: the chance of a coordinate is the same, and
the coordinates of a round are not neighbours, so that a run has as many independent factors as it can.

The mismatch identity is algebra: with the residuals e_k of the workers, their mean ē, V = mean‖e_k - ē‖² and
S = ‖ē‖², it is mean‖(x - ē) - (x - λ e_k)‖² = λ²V + (1-λ)²S, which is least at λ* = S / (S + V).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD

from benchmarks.papers.drawing import panels
from benchmarks.papers.recipe import Form, Oracle, Recipe, Row, oracle, oracle_at_most
from thresher.compression import parse_feedback
from thresher.compression.feedback import Feedback
from thresher.protos.errors import NonFiniteGradientError
from thresher.simulation import Simulator

CHANCE: Final = 1 / 64  # that a coordinate is sent in a round
COEFFICIENTS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
SHOWN: Final = (0.0, 0.3, 1.0)  # of the mismatch: error feedback, the papers' value, SAEF
COLOURS: Final = dict(zip(SHOWN, ("#1f5aa6", "#8e44ad", "#e0a100"), strict=True))
LEAST_STEP: Final = CHANCE / 2
MOST_STEP: Final = 4.0
HALVINGS: Final = 9
STARTS: Final = 128  # rounds in which the intervals that are looked at begin
LONGEST: Final = 896  # rounds until almost surely all of them have ended: (1 - p)^896 = 7e-7
NEGLIGIBLE: Final = 1e-30  # below it, float32 has too few digits for a ratio
WORKERS: Final = 8
NUMEL: Final = 1024
RATE: Final = 0.001
MOMENTUM: Final = 0.9


@final
@dataclass(frozen=True)
class Limit:
    """The largest stable s = η·h: of which coefficient of the residual, on how many coordinates at a time."""

    coefficient: float
    seed: int
    numel: int = 16384


@final
@dataclass(frozen=True)
class Mismatch:
    """A run of workers with minima of their own, in which both sides of the identity are taken."""

    coefficient: float
    seed: int
    rounds: int = 600


def mean_square_growth(s: float, coefficient: float, chance: float = CHANCE) -> float:
    """E[factor²] of a coordinate from one time it is sent to the next, for s = η·h; inf where it has no mean.

    With q = 1 - λs and J rounds in between, geometric with parameter p, the factor is 1 - (1 - q^J) / λ, and 1 - J·s
    for λ = 0 (derived from the algorithm of arXiv:2004.05298).
    """
    if coefficient == 0.0:
        return 1.0 - 2.0 * s / chance + s * s * (2.0 - chance) / chance**2
    q = 1.0 - coefficient * s
    if (1.0 - chance) * q * q >= 1.0:
        return math.inf
    first = chance * q / (1.0 - (1.0 - chance) * q)
    second = chance * q * q / (1.0 - (1.0 - chance) * q * q)
    rest = 1.0 - 1.0 / coefficient
    return rest**2 + 2.0 * rest / coefficient * first + second / coefficient**2


def largest_stable(growth: Callable[[float], float], halvings: int) -> float:
    """Where ``growth`` reaches 1, between steps that are half the chance and 4: bisected on a logarithmic axis.

    What is left of the bracket in the end is divided where a straight line through both ends reaches 1.
    """
    low, high = LEAST_STEP, MOST_STEP
    below, above = 0.0, math.inf
    for _ in range(halvings):
        middle = math.sqrt(low * high)
        grown = growth(middle)
        if grown < 1.0:
            low, below = middle, grown
        else:
            high, above = middle, grown
    share = (1.0 - below) / (above - below) if math.isfinite(above) else 0.5
    return low + share * (high - low)


def stability_limit(coefficient: float) -> float:
    """The largest stable s as the formula has it; 2p / (2 - p) for λ = 0."""
    return largest_stable(partial(mean_square_growth, coefficient=coefficient), halvings=50)


def measured_growth(s: float, limit: Limit) -> float:
    """Mean over coordinates of (x after / x before)², each from one time it is sent to the next; inf if x overflows.

    Intervals count that begin in the first rounds, and the run goes on until they have ended: to leave out those that
    are cut off would leave out the long ones.
    """
    feedback = _feedback(f"RandomK({CHANCE}, seed={limit.seed})", limit.coefficient, limit.numel)
    start = torch.ones(limit.numel)
    simulator = Simulator([feedback], lambda _, x, __: x, start, partial(SGD, lr=s), placement="update")
    before, begun = start.double(), torch.zeros(limit.numel, dtype=torch.int64)
    total, count = 0.0, 0
    try:
        for step in range(STARTS + LONGEST):
            (done,) = simulator.run(1)
            sent = done.messages[0].indices
            after = done.x[sent].double()
            counts = (begun[sent] < STARTS) & (before[sent].abs() > NEGLIGIBLE)
            total += float((after / before[sent]).square()[counts].sum())
            count += int(counts.sum())
            before[sent], begun[sent] = after, step + 1
    except NonFiniteGradientError:
        return math.inf
    return total / count if math.isfinite(total) else math.inf


def _feedback(compressor: str, coefficient: float, numel: int) -> Feedback:
    return parse_feedback(f"DetachedErrorFeedback({compressor}, coefficient={coefficient})", [(numel,)])


def _limit_rows(limit: Limit) -> list[Row]:
    return [
        {
            "check": "limit",
            "coefficient": limit.coefficient,
            "seed": limit.seed,
            "chance": CHANCE,
            "formula": stability_limit(limit.coefficient),
            "measured": largest_stable(partial(measured_growth, limit=limit), HALVINGS),
        }
    ]


def _mismatch_rows(cell: Mismatch) -> list[Row]:
    generator = torch.Generator().manual_seed(cell.seed)
    curvature = torch.linspace(0.1, 1.0, NUMEL)
    minima = 1.0 + 0.3 * torch.randn(WORKERS, NUMEL, generator=generator)

    def gradient(worker: int, x: Tensor, step: int) -> Tensor:
        del step
        return curvature * (x - minima[worker]) + 0.3 * torch.randn(NUMEL, generator=generator)

    blocks = f"RandomBlock({CHANCE}, seed={cell.seed})"
    feedbacks = [_feedback(blocks, cell.coefficient, NUMEL) for _ in range(WORKERS)]
    optimizer = partial(SGD, lr=RATE, momentum=MOMENTUM)
    simulator = Simulator(feedbacks, gradient, torch.zeros(NUMEL), optimizer, placement="update")
    rows: list[Row] = []
    for _ in range(cell.rounds // 20):
        done = simulator.run(20)[-1]
        residuals = torch.stack([feedback.residual for feedback in feedbacks]).double()
        sides = mismatch(cell.coefficient, done.x.double(), torch.stack(simulator.points).double(), residuals)
        named: Row = {"check": "mismatch", "coefficient": cell.coefficient, "seed": cell.seed, "chance": CHANCE}
        rows.append({**named, "round": done.step + 1, **sides})
    return rows


def mismatch(coefficient: float, x: Tensor, points: Tensor, residuals: Tensor) -> dict[str, float]:
    """Both sides of the identity of a round, and what it says the best coefficient is.

    Args:
        coefficient: λ.
        x: [numel], what all workers share.
        points: [workers, numel], where they take their next gradients.
        residuals: [workers, numel].

    Returns:
        ``measured``: mean‖(x - ē) - point_k‖²; ``formula``: λ²V + (1-λ)²S; ``variance``: V; ``second_moment``: S, all
        in squared units of x; ``best_coefficient``: S / (S + V).
    """
    mean = residuals.mean(0)
    variance = float((residuals - mean).square().sum(1).mean())
    moment = float(mean.square().sum())
    return {
        "formula": coefficient**2 * variance + (1.0 - coefficient) ** 2 * moment,
        "measured": float((x - mean - points).square().sum(1).mean()),
        "variance": variance,
        "second_moment": moment,
        "best_coefficient": moment / (moment + variance),
    }


def cells(form: Form) -> list[Limit | Mismatch]:
    """One seed in the short form, three in the full one."""
    seeds = range(1 if form == "short" else 3)
    limits: list[Limit | Mismatch] = [Limit(one, seed) for one in COEFFICIENTS for seed in seeds]
    return limits + [Mismatch(one, seed) for one in SHOWN for seed in seeds]


def run(cell: Limit | Mismatch) -> list[Row]:
    """The rows of either kind: both have what the formula says and what was measured."""
    return _limit_rows(cell) if isinstance(cell, Limit) else _mismatch_rows(cell)


def draw(rows: list[Row]) -> Figure:
    """The limits over λ; both sides of the identity, and the best λ, over the run."""
    figure, (limits, sides, best) = panels(3)
    grid = [number / 200 for number in range(201)]
    limits.semilogy(grid, [stability_limit(one) for one in grid], color="#999999", label="formula")
    found = [row for row in rows if row["check"] == "limit"]
    x, y = ([float(row[name]) for row in found] for name in ("coefficient", "measured"))
    limits.semilogy(x, y, "D", color="#8e44ad", markersize=5, label="simulator")
    limits.set(title=f"Stable steps, p = 1/{1 / CHANCE:.0f}", xlabel="coefficient λ", ylabel="largest stable s = η·h")
    limits.legend()
    for coefficient, colour in COLOURS.items():
        runs = [row for row in rows if row["check"] == "mismatch" and row["coefficient"] == coefficient]
        shown = [row for row in runs if row["seed"] == 0]
        rounds, formula, measured, optimum = (
            [float(row[name]) for row in shown] for name in ("round", "formula", "measured", "best_coefficient")
        )
        sides.semilogy(rounds, formula, color=colour, label=f"λ = {coefficient}")
        sides.semilogy(rounds, measured, ".", color=colour)
        best.plot(rounds, optimum, color=colour, label=f"λ = {coefficient}")
    sides.set(title="Line: λ²V + (1-λ)²S", xlabel="round", ylabel="mean ‖virtual iterate - point‖²")
    best.set(title="Best coefficient along the run", xlabel="round", ylabel="S / (S + V)", ylim=(0, 1))
    sides.legend()
    best.legend()
    return figure


def oracles(rows: Sequence[Row]) -> list[Oracle]:
    """The limits for λ = 0, 0.1 and 0.3, within 3 %, and the largest relative difference of the two sides."""
    found = []
    for name, coefficient in (("ef_", 0.0), ("def_", 0.3), ("def_", 0.1)):
        limits = [row for row in rows if row["check"] == "limit" and row["coefficient"] == coefficient]
        measured = sum(float(row["measured"]) for row in limits) / len(limits)
        suffix = "_0_1" if coefficient == 0.1 else ""
        expected = stability_limit(coefficient)
        found.append(oracle(f"{name}stability_limit{suffix}", measured, expected=expected, tolerance=0.03 * expected))
    sides = [(float(row["measured"]), float(row["formula"])) for row in rows if row["check"] == "mismatch"]
    worst = max(abs(measured - formula) / formula for measured, formula in sides)
    return [*found, oracle_at_most("mismatch_identity_error", worst, most=1e-4)]


RECIPE: Final = Recipe(
    "stability",
    "arXiv:2004.05298: the largest stable step of error feedback and detached error feedback, the mismatch identity",
    cells,
    run,
    draw,
    oracles,
)
