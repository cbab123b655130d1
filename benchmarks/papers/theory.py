"""The bounds of arXiv:2108.00951 as functions, against runs on a quadratic all of whose constants are known.

The problem has d coordinates with curvatures h_j from 0.1 to 1. Worker i has ∇f_i(x) = a_i h x + c_i. The first one has
c_0 = √(n-1) c, all others -c / √(n-1), with ‖c‖² = ζ²; two others have a_i = 1 ± √(nC/2), the rest 1. The means of a_i,
c_i and (a_i - 1) c_i over workers are 1, 0 and 0, so that f = ½ Σ h_j x_j², and the (C, ζ²) similarity holds with
equality. The noise is Gaussian with E‖ξ‖² = M‖∇f_i‖² + σ², also with equality.

Each run is Algorithm 1: finished updates through error feedback, with a constant step γ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Final, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torch.optim import SGD

from benchmarks.papers.drawing import colour_of, marker_of, panels
from benchmarks.papers.recipe import Form, Oracle, Recipe, Row, oracle
from thresher.compression import Guarantee, paper_threshold, parse, parse_feedback, precision_threshold
from thresher.simulation import Simulator

NUMEL: Final = 256
CURVATURE: Final = torch.linspace(0.1, 1.0, NUMEL)
CONVEXITY: Final = 0.1  # μ of f, and of each f_i where C = 0


@final
@dataclass(frozen=True)
class Constants:
    """What the theorems know of a problem (section 3).

    Args:
        smoothness: L of every f_i.
        noise: σ² of a worker's gradient; the variance is M‖∇f_i‖² + σ².
        similarity: ζ² of the workers; mean‖∇f_i - ∇f‖² ≤ C‖∇f‖² + ζ².
        workers: n.
        gap: f(x_0) - f*.
        noise_slope: M.
        similarity_slope: C.
    """

    smoothness: float
    noise: float
    similarity: float
    workers: int
    gap: float
    noise_slope: float = 0.0
    similarity_slope: float = 0.0

    @property
    def mean_noise(self) -> float:
        """(Mζ² + σ²) / n: the part of the variance of the mean gradient that stays at an optimum (Lemma 11)."""
        return (self.noise_slope * self.similarity + self.noise) / self.workers

    @property
    def slope(self) -> float:
        """1 + M(C+1) / n, the factor of ‖∇f‖² in the second moment of the mean gradient (Lemma 11)."""
        return 1.0 + self.noise_slope * (self.similarity_slope + 1.0) / self.workers


class Terms(NamedTuple):
    """A bound a/(γT) + bγ + cγ² on the mean of E‖∇f(x_t)‖² over T rounds, for every step γ ≤ 1/q."""

    a: float
    b: float
    c: float
    q: float

    def at(self, step: float, rounds: int) -> float:
        """The bound for a step; inf if that is above 1/q."""
        return self.a / (step * rounds) + self.b * step + self.c * step**2 if step * self.q <= 1.0 else math.inf

    def tuned_step(self, rounds: int) -> float:
        """The step of the corollary: 1/q, or less where that makes one of the other two terms equal to the first."""
        steps = [1.0 / self.q]
        steps += [math.sqrt(self.a / (self.b * rounds))] if self.b > 0.0 else []
        steps += [math.cbrt(self.a / (self.c * rounds))] if self.c > 0.0 else []
        return min(steps)

    def tuned(self, rounds: int) -> float:
        """The bound of the corollary, which :meth:`at` keeps at the tuned step: qa/T + 2√(ab/T) + 2c^⅓ (a/T)^⅔."""
        share = self.a / rounds
        return self.q * share + 2.0 * math.sqrt(self.b * share) + 2.0 * math.cbrt(self.c * share**2)


def theorem_6(of: Constants, kappa: float) -> Terms:
    """Absolute compressors, non-convex: 4F/(γT) + 2γL(Mζ²+σ²)/n + 2γ²L²κ²."""
    smooth = of.smoothness
    return Terms(4.0 * of.gap, 2.0 * smooth * of.mean_noise, 2.0 * (smooth * kappa) ** 2, 2.0 * smooth * of.slope)


def theorem_7(of: Constants, delta: float) -> Terms:
    """δ-contractions, non-convex: 8F/(γT) + 4γL(Mζ²+σ²)/n + (8γ²L²/δ)((2/δ+M)ζ² + σ²)."""
    smooth, m, c = of.smoothness, of.noise_slope, of.similarity_slope
    last = 8.0 * smooth**2 / delta * ((2.0 / delta + m) * of.similarity + of.noise)
    q = 2.0 * smooth * max(of.slope, math.sqrt(2.0 * (c + 1.0) * (2.0 + delta * m)) / delta)
    return Terms(8.0 * of.gap, 4.0 * smooth * of.mean_noise, last, q)


def theorem_8(of: Constants) -> Terms:
    """All sent, non-convex: 2F/(γT) + γL(Mζ²+σ²)/n."""
    return Terms(2.0 * of.gap, of.smoothness * of.mean_noise, 0.0, of.smoothness * of.slope)


def theorem_1(of: Constants, step: float, rounds: int, total_error: float) -> float:
    """One worker, any compressor: 4F/(γT) + 2γLσ² + (2L²/T) Σ E‖e_t‖², for γ ≤ 1 / (2L(M+1)); inf above."""
    if 2.0 * of.smoothness * (of.noise_slope + 1.0) * step > 1.0:
        return math.inf
    first = 4.0 * of.gap / (step * rounds) + 2.0 * step * of.smoothness * of.noise
    return first + 2.0 * of.smoothness**2 * total_error / rounds


def remark_5(step: float, kappa: float) -> float:
    """Absolute compressors: mean E‖e_i‖² ≤ γ²κ² after every round."""
    return (step * kappa) ** 2


def lemma_13(of: Constants, step: float, delta: float, gradients: Sequence[float]) -> float:
    """δ-contractions: the total error of a run whose E‖∇f(x_t)‖² are ``gradients``, one of each round."""
    factor = 2.0 / delta + of.noise_slope
    constant = factor * of.similarity + of.noise
    moments = factor * (of.similarity_slope + 1.0) * sum(gradients) + len(gradients) * constant
    return 2.0 * step**2 / delta * moments


def lemma_15(of: Constants, step: float, rounds: int, kappa: float, *, convexity: float, distance: float) -> float:
    """E f(x̄) - f* of an absolute compressor, for the mean x̄ of x_t with the weights (1 - μγ/2)^-(t+1).

    Lemma 15 unrolled with ‖x̃_t - x_t‖² ≤ γ²κ²: Theorem 4 before its step is tuned, with all constants. ``convexity``
    is μ > 0, ``distance`` ‖x_0 - x*‖², and Σ‖∇f_i(x*)‖² / n is ζ². It is inf for γ > 1 / (4L(1 + 2M/n)).
    """
    slope = of.noise_slope / of.workers
    if 4.0 * of.smoothness * (1.0 + 2.0 * slope) * step > 1.0:
        return math.inf
    kept = (1.0 - convexity * step / 2.0) ** rounds
    start = convexity * distance * kept / (1.0 - kept)
    noise = 2.0 * step * (of.noise / of.workers + 2.0 * slope * of.similarity)
    return start + noise + 6.0 * of.smoothness * (step * kappa) ** 2


def theorem_4(of: Constants, rounds: int, kappa: float, *, convexity: float, distance: float) -> float:
    """The shape of E f(x̄) - f* at the best step: without constants in front and logarithms of T."""
    smooth, slope = of.smoothness, of.noise_slope / of.workers
    decay = math.exp(-convexity * rounds / (8.0 * smooth * (1.0 + 2.0 * slope)))
    noise = (of.noise + of.noise_slope * of.similarity) / (convexity * of.workers * rounds)
    return smooth * (1.0 + slope) * distance * decay + noise + smooth * (kappa / (convexity * rounds)) ** 2


def largest_threshold(of: Constants, k: float, numel: int) -> float:
    """Rule (29): up to this λ, the last term of Theorem 6 is no larger than that of Theorem 7 for Top-k."""
    variance = (2.0 * numel / k + of.noise_slope) * of.similarity + of.noise
    return 2.0 / math.sqrt(k) * math.sqrt(variance)


@final
@dataclass(frozen=True)
class Experiment:
    """One run: the point ``setting`` of a ``sweep``. Units and letters as in :class:`Constants`; ``start`` is x_0."""

    sweep: str
    method: str
    compressor: str
    setting: float
    seed: int
    rounds: int
    step: float = 0.01
    workers: int = 2
    noise: float = 1.0
    similarity: float = 1.0
    noise_slope: float = 0.0
    similarity_slope: float = 0.0
    start: float = 0.25

    @property
    def spread(self) -> float:
        """√(nC/2), by which the curvatures of two workers differ from the mean; C > 0 takes three workers or more."""
        return math.sqrt(self.workers * self.similarity_slope / 2.0)

    @property
    def constants(self) -> Constants:
        """What the theorems may know."""
        smoothness = (1.0 + self.spread) * float(CURVATURE.max())
        gap = 0.5 * self.start**2 * float(CURVATURE.sum())
        slopes = self.noise_slope, self.similarity_slope
        return Constants(smoothness, self.noise, self.similarity, self.workers, gap, *slopes)

    @property
    def guarantee(self) -> Guarantee:
        """What the compressor promises."""
        return parse(self.compressor, [(NUMEL,)]).guarantee


class Problem:
    """The gradients of the workers of an experiment; the noise is drawn anew at each call."""

    def __init__(self, experiment: Experiment) -> None:
        self._of = experiment
        self._generator = torch.Generator().manual_seed(experiment.seed)
        signs = 2.0 * torch.randint(2, (NUMEL,), generator=self._generator) - 1.0
        self._shift = signs * math.sqrt(experiment.similarity / NUMEL)

    def exact(self, worker: int, x: Tensor) -> Tensor:
        """∇f_i(x), [numel] float32."""
        others = self._of.workers - 1
        shift = 0.0 if others == 0 else math.sqrt(others) if worker == 0 else -1.0 / math.sqrt(others)
        factor = 1.0 + self._of.spread * {1: 1.0, 2: -1.0}.get(worker, 0.0)
        return factor * CURVATURE * x + shift * self._shift

    def gradient(self, worker: int, x: Tensor, step: int) -> Tensor:
        """The same with noise."""
        del step
        exact = self.exact(worker, x)
        variance = self._of.noise_slope * float(exact.square().sum()) + self._of.noise
        return exact + math.sqrt(variance / NUMEL) * torch.randn(NUMEL, generator=self._generator)


class Measured(NamedTuple):
    """Of one run: ‖∇f(x_t)‖² before each round, (1/n) Σ ‖e_i‖² after it, f(x̄) - f*, and the mean density."""

    gradients: list[float]
    errors: list[float]
    suboptimality: float
    density: float


def measure(of: Experiment) -> Measured:
    """Make the run; x̄ is weighted as in :func:`lemma_15`."""
    feedbacks = [parse_feedback(f"ErrorFeedback({of.compressor})", [(NUMEL,)]) for _ in range(of.workers)]
    start = torch.full((NUMEL,), of.start)
    optimizer = partial(SGD, lr=of.step)
    simulator = Simulator(feedbacks, Problem(of).gradient, start, optimizer, placement="update")
    gradients, errors, density = [], [], 0.0
    x, mean, weights = start, torch.zeros(NUMEL, dtype=torch.float64), 0.0
    for _ in range(of.rounds):
        weights = 1.0 + (1.0 - CONVEXITY * of.step / 2.0) * weights  # all so far, in units of the last one
        mean += (x.double() - mean) / weights
        gradients.append(float((CURVATURE * x).square().sum()))
        (done,) = simulator.run(1)
        x = done.x
        errors.append(done.error)
        density += done.density / of.rounds
    return Measured(gradients, errors, 0.5 * float((CURVATURE * mean.square()).sum()), density)


def theorems(of: Experiment) -> list[tuple[str, Terms]]:
    """Those that speak of the experiment's compressor."""
    promised, constants = of.guarantee, of.constants
    found = [("Theorem 8", theorem_8(constants))] if of.compressor == "Identity()" else []
    found += [] if promised.kappa is None else [("Theorem 6", theorem_6(constants, promised.kappa(NUMEL)))]
    return found + ([] if promised.delta is None else [("Theorem 7", theorem_7(constants, promised.delta(NUMEL)))])


def judged(of: Experiment, found: Measured) -> list[tuple[str, str, float, float]]:
    """Every quantity of a run that has a finite bound: (quantity, theorem, measured, bound)."""
    constants, promised, rounds = of.constants, of.guarantee, of.rounds
    total, before, gradient = sum(found.errors), sum(found.errors[:-1]), sum(found.gradients) / rounds
    points = [("squared gradient", name, gradient, terms.at(of.step, rounds)) for name, terms in theorems(of)]
    if of.sweep == "rounds":
        points += [("squared gradient", "corollary", gradient, terms.tuned(rounds)) for _, terms in theorems(of)]
    if of.workers == 1:
        points.append(("squared gradient", "Theorem 1", gradient, theorem_1(constants, of.step, rounds, before)))
    if promised.kappa is not None:
        kappa, distance = promised.kappa(NUMEL), NUMEL * of.start**2
        bound = remark_5(of.step, kappa)
        points += [("largest error", "Remark 5", max(found.errors), bound)]
        points += [("total error", "Remark 5", total, bound * rounds)]
        if of.similarity_slope == 0.0:
            bound = lemma_15(constants, of.step, rounds, kappa, convexity=CONVEXITY, distance=distance)
            points.append(("suboptimality", "Lemma 15", found.suboptimality, bound))
    if promised.delta is not None:
        bound = lemma_13(constants, of.step, promised.delta(NUMEL), found.gradients)
        points.append(("total error", "Lemma 13", total, bound))
    return [point for point in points if math.isfinite(point[-1])]


def run(cell: Experiment) -> list[Row]:
    """A row for each bound: what it is on, what it says, and what was measured."""
    found = measure(cell)
    named: Row = {name: value for name, value in vars(cell).items() if isinstance(value, str | int | float)}
    named["density"] = found.density
    return [
        {**named, "quantity": quantity, "theorem": theorem, "measured": measured, "bound": bound}
        for quantity, theorem, measured, bound in judged(cell, found)
    ]


def _method(name: str, setting: float) -> str:
    """The call that makes the compressor ``name`` with its λ, ε, or density."""
    made = {"hard threshold": "HardThreshold", "fixed point": "StochasticRounding", "Top-k": "TopK"}
    return "Identity()" if name == "dense" else f"{made.get(name, 'RandomK')}({setting})"


PROPOSED: Final = (("dense", 1.0), ("hard threshold", 0.25), ("Top-k", 1 / 16), ("Random-k", 1 / 16))
RELATIVE: Final = ("Top-k", "Random-k")


def _errors(seed: int, rounds: int) -> list[Experiment]:
    """Over λ and ε; over δ at an optimum, with different workers or with noise; over target precisions."""
    absolute = product(("hard threshold", "fixed point"), (0.0625, 0.125, 0.25, 0.5, 1.0))
    made = [Experiment("threshold", name, _method(name, at), at, seed, rounds) for name, at in absolute]
    for name, count in product(RELATIVE, (2, 4, 6)):
        delta = 2.0**-count
        for similarity in (0.0, 1.0):
            at_optimum = partial(Experiment, step=0.004, start=0.0, similarity=similarity, noise=1.0 - similarity)
            label = f"{name}, ζ² = {similarity:.0f}, σ² = {1 - similarity:.0f}"
            made.append(at_optimum("delta", label, _method(name, delta), delta, seed, rounds))
    for epsilon in (1e-4, 1e-3, 1e-2):
        at = precision_threshold(epsilon, NUMEL, 0.01)
        made.append(Experiment("precision", "hard threshold", _method("hard threshold", at), epsilon, seed, rounds))
    return made


def _gradients(seed: int, rounds: int) -> list[Experiment]:
    """Over γ; over n and ζ² at an optimum; with M and C; over T at the tuned step; over k at the rules' thresholds."""
    made = []
    for name, at in PROPOSED:
        method = name, _method(name, at)
        made += [Experiment("step", *method, step, seed, rounds, step=step) for step in (0.004, 0.015, 0.1)]
        noisy = Experiment("workers", *method, 1, seed, rounds, step=0.015, workers=1, similarity=0.0, start=0.0)
        made += [replace(noisy, setting=n, workers=n) for n in (1, 4, 8)]
        apart = replace(noisy, sweep="similarity", workers=4)
        made += [replace(apart, setting=zeta, similarity=zeta) for zeta in (0.1, 1.0, 10.0)]
        sloping = Experiment("slopes", *method, at, seed, rounds, step=0.005, workers=4, noise_slope=0.5)
        made.append(replace(sloping, similarity_slope=0.25))
    for (name, at), length in product(PROPOSED[1:], (rounds // 16, rounds // 4, rounds)):
        untuned = Experiment("rounds", name, _method(name, at), length, seed, length)
        made.append(replace(untuned, step=theorems(untuned)[0][1].tuned_step(length)))
    for k in (4, 16, 64):
        rule = Experiment("rule", "Top-k", _method("Top-k", k / NUMEL), k, seed, rounds, step=0.002, noise=1 / 16)
        rules = {"(29)": largest_threshold(rule.constants, k, NUMEL), "1 / (2√k)": paper_threshold(k)}
        made += [rule] + [
            replace(rule, method=f"hard threshold, {name}", compressor=_method("hard threshold", at))
            for name, at in rules.items()
        ]
    return made


def cells(form: Form) -> list[Experiment]:
    """400 rounds and one seed in the short form, 1,200 rounds and three seeds in the full one."""
    seeds, rounds = (range(1), 400) if form == "short" else (range(3), 1200)
    return [cell for seed in seeds for cell in _errors(seed, rounds) + _gradients(seed, rounds)]


# Of each panel: its sweep, quantity, title and horizontal axis.
PANELS: Final = (
    ("threshold", "total error", "Total error, absolute (Remark 5)", "λ or ε"),
    ("delta", "total error", "1/δ² with ζ ≠ 0, 1/δ without (Lemma 13)", "δ"),
    ("precision", "largest error", "Error at λ = √(ε/d) / γ", "target precision ε"),
    ("rule", "total error", "λ by rule against Top-k", "k"),
    ("step", "squared gradient", "Theorems 6, 7 and 8", "step size γ"),
    ("similarity", "squared gradient", "At an optimum: Theorems 6, 7 and 8", "difference of workers ζ²"),
    ("workers", "squared gradient", "At an optimum: Theorems 1, 6, 7 and 8", "workers n"),
    ("rounds", "squared gradient", "Tuned steps (corollary)", "rounds T"),
)


def draw(rows: list[Row]) -> Figure:
    """Measured quantities (points) under their bounds (lines)."""
    figure, axes = panels(4, rows=2)
    for one, (sweep, quantity, title, label) in zip(axes, PANELS, strict=True):
        chosen = [row for row in rows if row["sweep"] == sweep and row["quantity"] == quantity]
        for number, method in enumerate(dict.fromkeys(str(row["method"]) for row in chosen)):
            _drawn(one, method, [row for row in chosen if row["method"] == method], dotted=number % 2 == 1)
        unit = "mean ‖∇f(x)‖²" if quantity == "squared gradient" else f"{quantity}, mean of ‖e‖² over workers"
        one.set(title=title, xlabel=label, ylabel=unit, xscale="log", yscale="log")
        one.xaxis.set_minor_formatter(NullFormatter())
        one.legend(fontsize=7)
    return figure


def _drawn(axes: Axes, method: str, rows: list[Row], *, dotted: bool) -> None:
    """One method: means over seeds; for a quantity with several bounds, the least of them."""
    settings = sorted({float(row["setting"]) for row in rows})
    at = [[row for row in rows if row["setting"] == setting] for setting in settings]
    measured = [sum(float(row["measured"]) for row in few) / len(few) for few in at]
    bounds = [min(float(row["bound"]) for row in few) for few in at]
    family = method.split(",", maxsplit=1)[0]
    axes.plot(settings, bounds, color=colour_of(family), linestyle=":" if dotted else "-", linewidth=1.2)
    (points,) = axes.plot(settings, measured, marker_of(family), color=colour_of(family), label=method)
    points.set_markerfacecolor("none" if dotted else colour_of(family))


def oracles(rows: Sequence[Row]) -> list[Oracle]:
    """How many measured points lie above their bound."""
    broken = sum(float(row["measured"]) > float(row["bound"]) for row in rows)
    return [oracle("theory_bounds_broken", broken, expected=0, tolerance=0)]


RECIPE: Final = Recipe(
    "theory", "arXiv:2108.00951: bounds and rules, against known constants", cells, run, draw, oracles
)
