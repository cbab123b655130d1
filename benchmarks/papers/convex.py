"""Regularised logistic regression, split among workers, and how sparsified gradients bring it to its minimum.

The problem is (26) of arXiv:2108.00951, appendix C.3: f(x) = mean_j log(1 + exp(-y_j a_jᵀx)) + (μ/2)‖x‖², with
L = λ_max(AᵀA) / (4N), μ = L / 10⁴ and the learning rate γ = 1 / (L + μ) for every method.

Everything is told relative to the minimum x*: the workers hold z = x - x*. Thresher's vectors are float32, and near
zero these are precise enough for f(x* + z) - f(x*) to fall below 1e-10, where x itself would not be.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from benchmarks.papers import data
from benchmarks.papers.data import Doubles
from benchmarks.papers.recipe import Row
from thresher.compression import Round, parse_feedback

POINTS: Final = 200  # of a run that are kept
VALUE_BITS: Final = 32  # of each value that is sent; positions are not counted, as in the paper's figures


class Source(NamedTuple):
    """Where a data set comes from and where its runs start.

    Attributes:
        read: its rows, [N, d], and their labels, -1 or +1, [N].
        features: d.
        offset: s of the start x* + s·(1, …, 1).
    """

    read: Callable[[], tuple[Doubles, Doubles]]
    features: int
    offset: float


def _a9a() -> tuple[Doubles, Doubles]:
    rows, labels = data.svm("a9a", 123)
    return rows[:32_500], labels[:32_500]  # of 32,561: so that 20 and 100 workers have equal shards


SOURCES: Final[dict[str, Source]] = {
    "gisette-like": Source(data.gisette_like, 5000, 5e-3),
    "madelon": Source(lambda: data.svm("madelon", 500), 500, 1e-4),
    "a9a": Source(_a9a, 123, 1.0),
}


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """(26) of arXiv:2108.00951 on one data set, solved.

    Args:
        rows: A, [N, d].
        labels: y, -1 or +1, [N].
        smoothness: L, without the regulariser's μ.
        strength: μ.
        optimum: x*, [d].
    """

    rows: Doubles
    labels: Doubles
    smoothness: float
    strength: float
    optimum: Doubles

    @property
    def rate(self) -> float:
        """The learning rate γ = 1 / (L + μ)."""
        return 1.0 / (self.smoothness + self.strength)

    def value(self, point: Doubles) -> float:
        """The value of f at ``point``, [d]."""
        return _value(self.rows, self.labels, self.strength, point)

    def excess(self, z: Tensor) -> float:
        """f(x* + z) - f(x*), for z of [d] float32, to a few digits however small it is.

        As ∇f(x*) = 0 it is what f rises above its tangent at x*; with m the margins at x*, δ what z adds to them and
        p = 1 / (1 + exp(m)), each row has log(1 + p·(exp(-δ) - 1)) + p·δ of it.
        """
        moved = z.double().numpy()
        added = self.labels * (self.rows @ moved)
        missed = _missed(self.labels * (self.rows @ self.optimum))
        risen = np.log1p(missed * np.expm1(-added)) + missed * added
        return float(risen.mean() + self.strength / 2 * (moved @ moved))


@cache
def problem(name: str) -> Problem:
    """The data set ``name`` of :data:`SOURCES`, and its minimum; a minute for gisette-like, else a second."""
    rows, labels = SOURCES[name].read()
    smoothness = _largest_eigenvalue(rows) / (4 * len(rows))
    return Problem(rows, labels, smoothness, smoothness / 1e4, minimum(rows, labels, smoothness / 1e4))


def start(name: str) -> Tensor:
    """The z with which the runs on the data set ``name`` begin, [d] float32."""
    return torch.full((SOURCES[name].features,), SOURCES[name].offset)


def minimum(rows: Doubles, labels: Doubles, strength: float) -> Doubles:
    """x* of the problem with the regulariser μ = ``strength``, [d], by damped Newton steps.

    The directions are float32, for speed, and all that decides where it ends is float64.
    """
    count, numel = rows.shape
    point, narrow = np.zeros(numel), rows.astype(np.float32)
    for _ in range(60):
        missed = _missed(labels * (rows @ point))
        slope = strength * point - rows.T @ (labels * missed) / count
        scaled = narrow * np.sqrt(missed * (1 - missed) / count, dtype=np.float32)[:, None]
        factor = torch.linalg.cholesky(torch.from_numpy(scaled.T @ scaled).add_(torch.eye(numel), alpha=strength))
        step = torch.cholesky_solve(torch.from_numpy(slope).float()[:, None], factor)[:, 0].double().numpy()
        decrease = float(slope @ step)
        before, length = _value(rows, labels, strength, point), 1.0
        while (
            _value(rows, labels, strength, point - length * step) > before - 1e-4 * length * decrease and length > 1e-8
        ):
            length /= 2
        point = point - length * step
        if decrease <= 1e-20:  # twice what f could fall before this step; now it is far less
            break
    return point


def _value(rows: Doubles, labels: Doubles, strength: float, point: Doubles) -> float:
    loss = np.logaddexp(0.0, -labels * (rows @ point)).mean()
    return float(loss + strength / 2 * (point @ point))


def _missed(margins: Doubles) -> Doubles:
    """1 / (1 + exp(m)), the probability that the model gives to the wrong label."""
    missed: Doubles = np.exp(-np.logaddexp(0.0, margins))
    return missed


def _largest_eigenvalue(rows: Doubles) -> float:
    """λ_max of AᵀA, by the power method: the error is the square of the eigenvector's."""
    direction, before, value = rows.sum(axis=0), 0.0, 1.0
    while abs(value - before) > 1e-15 * value:
        before = value
        direction = direction / np.linalg.norm(direction)
        image = rows @ direction
        value = float(image @ image)
        direction = rows.T @ image
    return value


@final
class Workers:
    """The rows of a problem, dealt at random to workers in equal shards, and their gradients, all workers' at once.

    Args:
        solved: the problem.
        count: n of workers; it divides N.
        seed: of the deal and of the samples that are drawn.
    """

    def __init__(self, solved: Problem, count: int, seed: int) -> None:
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)
        deal = torch.randperm(len(solved.rows), generator=self._generator).numpy()
        # Features are whole numbers or were float32 from the beginning: nothing is lost.
        self._rows = torch.from_numpy(solved.rows[deal].astype(np.float32)).view(count, -1, solved.rows.shape[1])
        self._labels = torch.from_numpy(solved.labels[deal]).view(count, -1)
        self._optimum = torch.from_numpy(solved.optimum)
        self._margins = torch.from_numpy(solved.labels[deal] * (solved.rows[deal] @ solved.optimum)).view(count, -1)
        self._strength = solved.strength

    def sampled(self, z: Tensor) -> Tensor:
        """∇f_ij(x* + z), [n, d] float32, each worker i at a row j of its own, drawn with replacement."""
        drawn = torch.randint(self._rows.shape[1], (self.count,), generator=self._generator)
        every = torch.arange(self.count)
        rows, labels = self._rows[every, drawn].double(), self._labels[every, drawn]
        margins = self._margins[every, drawn] + labels * (rows @ z.double())
        slopes = -labels * torch.sigmoid(-margins)
        return (slopes[:, None] * rows + self._strength * (self._optimum + z)).float()

    def shifted(self, z: Tensor) -> Tensor:
        """∇f_i(x* + z) - ∇f_i(x*), [n, d] float32, over each worker's whole shard.

        With p the probability of the wrong label at x* and E = exp(-δ) - 1, δ what z adds to the margin, the
        probability rises by p·(1 - p)·E / (1 + p·E): no difference of nearly equal numbers is taken. The products with
        the features are float32, relative to z like everything else.
        """
        added = self._labels * (self._rows @ z).double()
        missed, grown = torch.sigmoid(-self._margins), torch.expm1(-added)
        slopes = -self._labels * missed * (1 - missed) * grown / (1 + missed * grown) / self._rows.shape[1]
        return torch.bmm(slopes.float()[:, None], self._rows)[:, 0] + self._strength * z


@final
class Descent:
    """Algorithm 1 of arXiv:2108.00951 for all workers at once: theirs is one vector, one worker after the other.

    A hard threshold judges each coordinate alone and ``LayerWise`` each worker's part alone, so that one call of
    Thresher's feedback compresses what all workers send. The simulator's update-placed rounds, worker by worker, give
    the same to the bit, and take ten times as long on vectors as short as these.

    Args:
        feedback: as of the catalogue: of a hard threshold, of ``LayerWise`` with a worker for a layer, or of Identity.
        point: z at the start, [d] float32.
        workers: n.
        rate: the learning rate γ.
        tau: γλ, the hard threshold of updates, in the unit of x.
    """

    def __init__(self, feedback: str, point: Tensor, workers: int, rate: float, tau: float | None = None) -> None:
        self._feedback = parse_feedback(feedback, [tuple(point.shape)] * workers)
        self._workers = workers
        self._rate = rate
        self._threshold = None if tau is None else tau / rate  # λ, in the unit of the gradient
        self.point = point.clone()
        self.step = 0
        self.sent = 0
        """Values sent so far, by all workers together."""
        self.error = 0.0
        """(1/n) Σ ‖e_i‖² after the last round; e_i is the residual of worker i, in the unit of x."""
        self.corrected = 0.0
        """(1/n) Σ ‖e_i + γ g_i‖² in the last round, before its compression."""
        self.total_error = 0.0
        self.most_error = 0.0

    def advance(self, gradients: Tensor) -> None:
        """One round with the workers' gradients at ``point``, [n, d] float32."""
        # As far as a step of plain SGD moves each worker, rounded as in the simulator.
        updates = self.point - torch.add(self.point, gradients, alpha=-self._rate)
        here = Round(self.step, threshold=self._threshold, scale=self._rate, rate=self._rate)
        message = self._feedback.compress(updates.flatten(), here)
        mean = torch.zeros_like(self.point)
        mean.index_add_(0, message.indices % mean.numel(), message.values).div_(self._workers)
        self.point.sub_(mean)
        self.step += 1
        self.sent += message.count
        self.error = float(self._feedback.residual.double().square().sum()) / self._workers
        # What is sent and what is held back share no coordinate, so their squares add up.
        self.corrected = self.error + float(message.values.double().square().sum()) / self._workers
        self.total_error += self.error
        self.most_error = max(self.most_error, self.error)


@final
@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        data: the name of the data set.
        method: its name in the figure.
        feedback: the call that makes it, for all workers as one vector (:class:`Descent`).
        tau: γλ of a hard threshold, in the unit of x; None: there is none.
        workers: n.
        steps: in all.
        seed: of the deal and of the samples.
    """

    data: str
    method: str
    feedback: str
    tau: float | None
    workers: int
    steps: int
    seed: int


def traced(trial: Trial, gradients: Callable[[Tensor], Tensor]) -> list[Row]:
    """Run ``trial`` with the workers' gradients at z, [n, d] float32.

    Returns:
        A row for the start and for at most 200 rounds, evenly spread; the last one is of the last round. Besides what
        says which run it is: ``step``; ``excess``, f(x) - f*; ``bits``, those of the values that one worker has sent so
        far, on average; ``error`` and ``corrected``, as of :class:`Descent`; ``most_error`` and ``mean_error``, the
        largest and the mean ``error`` of the rounds so far.
    """
    solved = problem(trial.data)
    descent = Descent(trial.feedback, start(trial.data), trial.workers, solved.rate, trial.tau)
    rows = [_row(trial, descent, solved)]
    due = {round(trial.steps * (number + 1) / POINTS) for number in range(POINTS)}
    for _ in range(trial.steps):
        descent.advance(gradients(descent.point))
        if descent.step in due:
            rows.append(_row(trial, descent, solved))
    return rows


def _row(trial: Trial, descent: Descent, solved: Problem) -> Row:
    return {
        "data": trial.data,
        "method": trial.method,
        "feedback": trial.feedback,
        "workers": trial.workers,
        "seed": trial.seed,
        "step": descent.step,
        "excess": solved.excess(descent.point),
        "bits": VALUE_BITS * descent.sent / trial.workers,
        "error": descent.error,
        "corrected": descent.corrected,
        "most_error": descent.most_error,
        "mean_error": descent.total_error / max(1, descent.step),
    }


def trials(name: str, k: int, tau: float, *, workers: int, steps: int, seed: int) -> list[Trial]:
    """The runs that are compared: uncompressed, with the threshold ``tau`` = γλ, and with the ``k`` largest."""
    numel = SOURCES[name].features
    methods: list[tuple[str, str, float | None]] = [
        ("dense", "NoFeedback(Identity())", None),
        ("hard threshold", "ErrorFeedback(HardThreshold())", tau),
        ("Top-k", f"ErrorFeedback(LayerWise(TopK({k}/{numel})))", None),
    ]
    return [Trial(name, method, feedback, own, workers, steps, seed) for method, feedback, own in methods]


def mean_curve(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Over the seeds in ``rows``: at each step the mean of ``x`` and the geometric mean of ``y``, without zeros."""
    steps: dict[str | int | float, list[Row]] = {}
    for row in rows:
        if float(row[y]) > 0.0:
            steps.setdefault(row["step"], []).append(row)
    at = [float(np.mean([float(row[x]) for row in each])) for each in steps.values()]
    return at, [math.exp(np.mean([math.log(float(row[y])) for row in each])) for each in steps.values()]


def split(rows: Sequence[Row], *columns: str) -> dict[tuple[str | int | float, ...], list[Row]]:
    """The rows that agree in ``columns``, by what these hold; all in the order of ``rows``."""
    parts: dict[tuple[str | int | float, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[column] for column in columns), []).append(row)
    return parts
