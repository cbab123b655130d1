"""The largest stable step: the formula against itself and against the simulator, and the mismatch identity."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.papers import stability
from benchmarks.papers.recipe import Row
from benchmarks.papers.stability import Limit, Mismatch


def test_without_detaching_the_limit_has_a_closed_form() -> None:
    """2p / (2 - p) for λ = 0; and the numbers known for λ = 0.1 and 0.3 with p = 1/64."""
    chance = 1 / 64
    assert stability.stability_limit(0.0) == pytest.approx(2 * chance / (2 - chance), rel=1e-9)
    assert stability.stability_limit(0.1) == pytest.approx(0.0197, abs=5e-5)
    assert stability.stability_limit(0.3) == pytest.approx(0.0391, abs=5e-5)
    assert stability.stability_limit(0.5) == pytest.approx(2.0, rel=1e-6)
    assert stability.stability_limit(1.0) == pytest.approx(2.0, rel=1e-6)


@given(s=st.floats(0.001, 1.0), coefficient=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
def test_growth_is_the_mean_over_intervals(s: float, coefficient: float) -> None:
    """E[factor²] is the sum over J of p (1-p)^(J-1) factor(J)²; here with p = 1/4, so that it ends soon."""
    q = 1 - coefficient * s
    factors = [1 - (1 - q**j) / coefficient if coefficient else 1 - j * s for j in range(1, 400)]
    expected = sum(0.25 * 0.75 ** (j - 1) * factor**2 for j, factor in enumerate(factors, 1))
    found = stability.mean_square_growth(s, coefficient, chance=0.25)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("coefficient", stability.COEFFICIENTS)
def test_all_smaller_steps_are_stable(coefficient: float) -> None:
    """The formula reaches 1 once, so that a bisection finds the largest stable step."""
    limit = stability.stability_limit(coefficient)
    grid = [limit * 0.99 * number / 200 for number in range(1, 201)]
    assert all(stability.mean_square_growth(s, coefficient) < 1.0 for s in grid)
    assert stability.mean_square_growth(limit * 1.01, coefficient) > 1.0


def test_a_step_without_a_mean_square_is_unstable() -> None:
    assert stability.mean_square_growth(3.0, 1.0) == math.inf


@pytest.mark.parametrize(("coefficient", "s"), [(0.0, 0.01), (0.3, 0.03)])
def test_the_simulator_grows_as_the_formula_says(coefficient: float, s: float) -> None:
    """Four thousand coordinates: within four standard errors."""
    measured = stability.measured_growth(s, Limit(coefficient, seed=1, numel=4096))
    assert measured == pytest.approx(stability.mean_square_growth(s, coefficient), abs=0.1)


def test_an_overflow_is_unstable() -> None:
    assert stability.measured_growth(3.5, Limit(1.0, seed=0, numel=128)) == math.inf


def test_both_sides_of_the_identity_agree() -> None:
    """On a run, to the precision of float32; λ* is at most 1 and makes the right side least."""
    rows = stability.run(Mismatch(0.3, seed=3, rounds=60))
    assert [row["round"] for row in rows] == [20, 40, 60]
    for row in rows:
        assert row["measured"] == pytest.approx(row["formula"], rel=1e-4)
        assert 0.0 < float(row["best_coefficient"]) < 1.0


@given(st.integers(0, 99), st.floats(0.0, 1.0))
def test_no_coefficient_beats_the_best(seed: int, coefficient: float) -> None:
    """λ²V + (1-λ)²S ≥ SV / (S + V), with equality at S / (S + V)."""
    residuals = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).double()
    x = torch.zeros(6).double()

    def at(one: float) -> dict[str, float]:
        return stability.mismatch(one, x, x - one * residuals, residuals)

    sides = at(coefficient)
    assert sides["measured"] == pytest.approx(sides["formula"])
    best = at(sides["best_coefficient"])["measured"]
    moment, variance = sides["second_moment"], sides["variance"]
    assert best == pytest.approx(moment * variance / (moment + variance))
    assert best <= sides["measured"] * (1 + 1e-12)


def test_forms_and_figure() -> None:
    """The short form has the first seed of the full one; a tiny run can be drawn, and has its four oracles."""
    assert set(stability.cells("short")) == {cell for cell in stability.cells("full") if cell.seed == 0}
    found = [Limit(one, 0) for one in stability.COEFFICIENTS]
    rows: list[Row] = [
        {"check": "limit", "coefficient": one.coefficient, "seed": 0, "measured": 1.1, "formula": 1.0} for one in found
    ]
    rows += [row for one in stability.SHOWN for row in stability.run(replace(Mismatch(one, seed=0), rounds=40))]
    assert isinstance(stability.draw(rows), Figure)
    verdicts = {one["name"]: one["ok"] for one in stability.oracles(rows)}
    assert verdicts == {
        "ef_stability_limit": False,
        "def_stability_limit": False,
        "def_stability_limit_0_1": False,
        "mismatch_identity_error": True,
    }
