"""λ* makes the mismatch least, and is used one round after it is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.papers import adaptive
from benchmarks.papers.adaptive import FIXED, Adaptive, Spread, spread_of

squares = st.floats(0.0, 1e6)


@given(squares, squares, st.floats(0.0, 1.0))
def test_no_coefficient_has_a_smaller_mismatch_than_the_best(second: float, variance: float, other: float) -> None:
    spread = Spread(second, variance)
    assert 0.0 <= spread.best <= 1.0
    assert spread.mismatch(spread.best) <= spread.mismatch(other) * (1 + 1e-9) + 1e-12


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_the_mismatch_is_how_far_gradients_are_from_where_x_would_be(seed: int, coefficient: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    residuals = [torch.randn(20, generator=generator) + 0.5 for _ in range(4)]
    mean = torch.stack(residuals).double().mean(dim=0)
    squared = [float((coefficient * residual.double() - mean).square().sum()) for residual in residuals]
    assert spread_of(residuals).mismatch(coefficient) == pytest.approx(sum(squared) / 4, rel=1e-9)


def test_known_residuals() -> None:
    assert spread_of([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]) == Spread(4.0, 1.0)
    assert Spread(4.0, 1.0).best == 0.8
    assert Spread(0.0, 0.0).best == 0.0


@pytest.mark.usefixtures("tiny_tasks")
def test_the_best_coefficient_of_a_round_is_used_in_the_next() -> None:
    rows = adaptive.run(Adaptive("DEF, λ*", 0, "short"))
    assert rows[0]["used"] == FIXED
    # The point of the next round is made at the end of this one, before its residuals are known to all.
    assert [row["used"] for row in rows[1:]] == [row["best"] for row in rows[:-1]]


@pytest.mark.usefixtures("tiny_tasks")
def test_the_fixed_coefficient_stays() -> None:
    assert {row["used"] for row in adaptive.run(Adaptive("DEF", 0, "short"))} == {FIXED}


@pytest.mark.usefixtures("tiny_tasks")
def test_it_is_drawn() -> None:
    rows = [row for cell in adaptive.cells("short") for row in adaptive.run(cell)]
    figure = adaptive.draw(rows)
    assert isinstance(figure, Figure)
    assert [len(panel.lines) for panel in figure.axes] == [4, 3, 2]
