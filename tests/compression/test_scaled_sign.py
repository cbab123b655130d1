"""Scaled sign: two values, and the contraction of its lemma."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.scaled_sign import ScaledSign

coordinates = st.floats(-1e3, 1e3, width=32, allow_subnormal=False).filter(lambda value: not 0 < abs(value) < 1e-30)
vectors = st.lists(coordinates, min_size=1, max_size=12).map(torch.tensor)


@given(vectors)
def test_every_coordinate_becomes_plus_or_minus_the_mean_magnitude(gradient: torch.Tensor) -> None:
    """One magnitude, ‖x‖₁ / d to float32, and the signs of the gradient; zero counts as positive."""
    sent = ScaledSign().compress(gradient).densify()
    mean = torch.tensor(math.fsum(abs(value) for value in gradient.tolist()) / gradient.numel())
    assert torch.equal(sent, torch.where(gradient < 0, -mean, mean))


@given(vectors)
def test_error_is_that_of_the_lemma(gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² = (1 - ‖x‖₁² / (d‖x‖²))‖x‖² (Lemma 8 of arXiv:1901.09847), within the declared δ."""
    delta = ScaledSign().guarantee.delta
    assert delta is not None
    energy = float(gradient.double().square().sum())
    error = float((gradient.double() - ScaledSign().compress(gradient).densify()).square().sum())
    fraction = float(gradient.double().abs().sum()) ** 2 / gradient.numel()
    assert math.isclose(error, energy - fraction, rel_tol=1e-9, abs_tol=1e-12 * energy)
    assert error <= (1 - delta(gradient.numel())) * energy + 1e-12 * energy


@pytest.mark.parametrize("numel", [1, 2, 7])
def test_delta_is_reached_by_a_single_coordinate(numel: int) -> None:
    """1 / d is the least contraction: nothing better holds for every vector."""
    delta = ScaledSign().guarantee.delta
    assert delta is not None
    gradient = torch.zeros(numel)
    gradient[-1] = 3.0
    error = float((gradient - ScaledSign().compress(gradient).densify()).double().square().sum())
    assert math.isclose(error, (1 - delta(numel)) * 9.0, rel_tol=1e-6)


def test_delta_of_nothing_is_one() -> None:
    """A vector without elements loses nothing."""
    delta = ScaledSign().guarantee.delta
    assert delta is not None
    assert delta(0) == 1.0


@given(vectors, st.integers(-6, 6).map(lambda exponent: 2.0**exponent))
def test_a_multiple_has_the_multiple_of_the_message(gradient: torch.Tensor, factor: float) -> None:
    """C(γx) = γC(x): the mean magnitude carries the unit."""
    multiple = ScaledSign().compress(gradient * factor).densify()
    assert torch.equal(multiple, ScaledSign().compress(gradient).densify() * factor)


@given(st.lists(st.lists(st.integers(-8, 8), min_size=4, max_size=4), min_size=1, max_size=6))
def test_feedback_conserves_exactly_on_a_grid(steps: list[list[int]]) -> None:
    """Law 1: for four integers the mean magnitude is a multiple of 1/4, later of finer powers, so sums are exact."""
    feedback = ErrorFeedback(ScaledSign(), 4)
    inputs = torch.tensor(steps).float()
    sent = sum((feedback.compress(gradient).densify() for gradient in inputs), torch.zeros(4))
    assert torch.equal(sent + feedback.residual, inputs.sum(dim=0))


def test_largest_numbers_do_not_overflow() -> None:
    """Their sum is beyond float32, their mean is not."""
    largest = torch.full((8,), torch.finfo(torch.float32).max)
    assert torch.equal(ScaledSign().compress(-largest).densify(), -largest)


def test_description() -> None:
    """It has no settings."""
    assert ScaledSign().describe() == "ScaledSign()"
