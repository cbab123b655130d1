"""The convex recipes: their runs, figures and oracles on a small problem, and the shifts of DIANA."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.papers import convex, convex_diana, convex_sgd, convex_star
from benchmarks.papers.convex import Problem, Source, minimum
from benchmarks.papers.recipe import Recipe, Row
from thresher.compression import UnbiasedRandomK

N, D = 400, 6


@cache
def made(name: str) -> Problem:
    del name
    draws = np.random.default_rng(0)
    rows = draws.normal(size=(N, D)).astype(np.float32).astype(float)
    labels = np.where(rows[:, 0] + draws.normal(size=N) < 0.0, -1.0, 1.0)
    return Problem(rows, labels, 1.0, 0.05, minimum(rows, labels, 0.05))


@pytest.fixture(autouse=True)
def small_problem(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in (convex, convex_sgd, convex_star, convex_diana):
            patch.setattr(module, "problem", made)
        small = {name: Source(source.read, D, 0.5) for name, source in convex.SOURCES.items()}
        patch.setattr(convex, "SOURCES", small)
        patch.setattr(convex_star, "SOURCES", small)
        patch.setattr(convex_diana, "SOURCES", small)
        yield


@pytest.mark.parametrize("recipe", [convex_sgd.RECIPE, convex_star.RECIPE, convex_diana.RECIPE])
def test_short_runs_are_some_of_the_full_ones(recipe: Recipe) -> None:
    assert set(recipe.cells("short")) < set(recipe.cells("full"))


def test_bits_are_those_of_the_values() -> None:
    """Top-1 sends one value a step, everything d, and the threshold fewer than everything."""
    bits = {}
    for trial in convex_sgd.cells("short")[-3:]:
        rows = convex_sgd.run(replace(trial, steps=100, tau=trial.tau and 0.5))
        assert [row["step"] for row in rows] == list(range(101))
        bits[trial.method] = float(rows[-1]["bits"])
        assert sum(float(row["bits_a_step"]) for row in rows) == pytest.approx(bits[trial.method])
    assert (bits["Top-k"], bits["dense"]) == (3200.0, 3200.0 * D)
    assert 0 < bits["hard threshold"] < bits["dense"]


def test_full_gradients_reach_the_minimum() -> None:
    """With the gradients at the minimum taken off, nothing that is held back keeps a run from it."""
    rows = [row for trial in convex_star.cells("short") for row in convex_star.run(replace(trial, steps=500))]
    for (method,), part in convex.split(rows, "method").items():
        assert float(part[0]["excess"]) > 0.1
        assert float(part[-1]["excess"]) < 1e-7, method
        assert float(part[-1]["most_error"]) <= D * 5e-4**2 or method != "hard threshold"
    assert isinstance(convex_star.draw(rows), Figure)
    found = {one["name"]: one for one in convex_star.oracles(rows)}
    assert len(found) == 9
    assert not found["madelon_L"]["ok"]
    assert found["efgdstar_top1_bits"]["measured"] == 500 * 32.0


def test_shifts_learn_constant_gradients() -> None:
    """What is sent becomes the mean gradient, and its mean over the workers is that from the beginning."""
    gradients = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    shifts = convex_diana.Shifts(UnbiasedRandomK(0.25), 2, 2, 0.25)
    for _ in range(200):
        torch.testing.assert_close(shifts.shifted(gradients).mean(dim=0), gradients.mean(dim=0))
    torch.testing.assert_close(shifts.shifted(gradients), gradients.mean(dim=0).expand(2, 2), rtol=0, atol=1e-3)


def test_the_second_message_counts() -> None:
    """EC-SGD-DIANA with Top-1 takes the bits of EF-SGD twice."""
    runs: list[Row] = []
    last = {}
    for cell in convex_diana.cells("short"):
        rows = convex_diana.run(replace(cell, trial=replace(cell.trial, steps=50)))
        last[cell.trial.method, rows[-1]["algorithm"]] = rows[-1]["bits"]
        runs += rows
    assert last["Top-k", "EF-SGD"] == 1600
    assert last["Top-k", "EC-SGD-DIANA"] == 3200
    assert isinstance(convex_diana.draw(runs), Figure)


def test_the_figure_of_sgd() -> None:
    rows = [row for trial in convex_sgd.cells("short")[-3:] for row in convex_sgd.run(replace(trial, steps=5))]
    assert len(convex_sgd.draw(rows).axes) == 5
