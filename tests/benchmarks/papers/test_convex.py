"""The convex problem, its minimum and its gradients; and that all workers at once are the simulator's, one by one."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

from benchmarks.papers import convex, data
from benchmarks.papers.convex import Descent, Problem, Workers, mean_curve, minimum, split
from benchmarks.papers.data import Doubles
from thresher.compression import parse_feedback
from thresher.simulation import Simulator

N, D = 60, 7


def made(seed: int = 0) -> Problem:
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(N, D)).astype(np.float32).astype(float)
    labels = np.where(draws.random(N) < 0.5, -1.0, 1.0)
    return Problem(rows, labels, 1.0, 0.01, minimum(rows, labels, 0.01))


def slope(problem: Problem, point: Doubles, rows: slice = slice(None)) -> Doubles:
    """∇f by the formula, over some of the rows."""
    part, labels = problem.rows[rows], problem.labels[rows]
    loss: Doubles = -part.T @ (labels / (1 + np.exp(labels * (part @ point)))) / len(part)
    return loss + problem.strength * point


def test_the_minimum_has_no_slope() -> None:
    solved = made()
    assert np.abs(slope(solved, solved.optimum)).max() < 1e-9


def test_the_power_method_finds_the_spectral_norm() -> None:
    rows = made().rows
    assert convex._largest_eigenvalue(rows) == pytest.approx(np.linalg.norm(rows, 2) ** 2, rel=1e-12)


@given(st.integers(0, 2**32), st.floats(1e-3, 3.0))
def test_the_excess_is_the_difference_of_values(seed: int, size: float) -> None:
    solved = made()
    z = size * torch.randn(D, generator=torch.Generator().manual_seed(seed))
    above = solved.value(solved.optimum + z.double().numpy()) - solved.value(solved.optimum)
    assert solved.excess(z) == pytest.approx(above, rel=1e-6, abs=1e-14)


def test_a_tiny_excess_is_quadratic() -> None:
    """Halving z quarters it, long after the values themselves look equal."""
    solved, z = made(), 1e-9 * torch.ones(D)
    assert solved.excess(z) == pytest.approx(4 * solved.excess(z / 2), rel=1e-3)


def test_workers_share_the_gradient() -> None:
    """The mean of all shards' differences is that of f; each is zero at the minimum."""
    solved, z = made(), torch.linspace(-1, 1, D)
    workers = Workers(solved, 4, seed=3)
    expected = slope(solved, solved.optimum + z.double().numpy()) - slope(solved, solved.optimum)
    np.testing.assert_allclose(workers.shifted(z).mean(dim=0).numpy(), expected, atol=1e-6)
    assert not workers.shifted(torch.zeros(D)).any()


def test_samples_are_rows_gradients() -> None:
    """Each is the gradient of one row, and all rows come up."""
    solved, z = made(), torch.linspace(-1, 1, D)
    point = solved.optimum + z.double().numpy()
    known = np.stack([slope(solved, point, slice(row, row + 1)) for row in range(N)])
    workers = Workers(solved, 4, seed=3)
    drawn = np.concatenate([workers.sampled(z).numpy() for _ in range(200)])
    nearest = np.abs(drawn[:, None] - known[None]).max(axis=2)
    assert nearest.min(axis=1).max() < 1e-5
    assert len(set(nearest.argmin(axis=1).tolist())) == N


@pytest.mark.parametrize(
    ("together", "alone", "tau"),
    [
        ("ErrorFeedback(HardThreshold())", "ErrorFeedback(HardThreshold())", 0.05),
        (f"ErrorFeedback(LayerWise(TopK(2/{D})))", f"ErrorFeedback(TopK(2/{D}))", None),
        ("NoFeedback(Identity())", "NoFeedback(Identity())", None),
    ],
)
def test_all_at_once_is_the_simulator_to_the_bit(together: str, alone: str, tau: float | None) -> None:
    """Points, errors and what is sent."""
    solved, workers, rate, rounds = made(), 4, 0.3, 30
    start = torch.full((D,), 0.5)
    one_by_one = Workers(solved, workers, seed=1)
    drawn: dict[int, torch.Tensor] = {}

    def gradient(worker: int, point: torch.Tensor, step: int) -> torch.Tensor:
        if step not in drawn:
            drawn[step] = one_by_one.sampled(point)
        return drawn[step][worker]

    simulator = Simulator(
        [parse_feedback(alone, [(D,)]) for _ in range(workers)],
        gradient,
        start,
        partial(SGD, lr=rate),
        placement="update",
        threshold=None if tau is None else tau / rate,
    )
    descent, at_once, sent = Descent(together, start, workers, rate, tau), Workers(solved, workers, seed=1), 0
    for done in simulator.run(rounds):
        descent.advance(at_once.sampled(descent.point))
        sent += done.elements
        assert torch.equal(descent.point, done.x)
        assert descent.error == pytest.approx(done.error, rel=1e-12)
        assert descent.sent == sent
    assert tau is None or 0 < sent < rounds * workers * D


def test_the_mean_over_seeds_is_geometric() -> None:
    rows: list[dict[str, str | int | float]] = [
        {"step": 0, "seed": 0, "x": 1.0, "y": 4.0},
        {"step": 1, "seed": 0, "x": 2.0, "y": 0.0},
        {"step": 0, "seed": 1, "x": 3.0, "y": 9.0},
    ]
    at, means = mean_curve(rows, "x", "y")
    assert at == [2.0]
    assert means == pytest.approx([6.0])
    assert list(split(rows, "seed")) == [(0,), (1,)]


def test_madelon_is_the_papers() -> None:
    """Its constants to the digits the notebooks print."""
    try:
        solved = convex.problem("madelon")
    except data.MissingDataError as missing:
        pytest.skip(str(missing))
    assert solved.smoothness == pytest.approx(29790805.64933511, rel=1e-14)
    assert solved.value(solved.optimum) == pytest.approx(0.667919553429515, abs=2e-15)
    assert solved.excess(convex.start("madelon")) == pytest.approx(12.1709290562 - 0.6679195534, rel=1e-7)
