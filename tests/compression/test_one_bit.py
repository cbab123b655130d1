"""1-bit SGD: two means, and never worse than the scaled sign."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.one_bit import OneBit
from thresher.compression.scaled_sign import ScaledSign

coordinates = st.floats(-1e3, 1e3, width=32, allow_subnormal=False).filter(lambda value: not 0 < abs(value) < 1e-30)
vectors = st.lists(coordinates, min_size=1, max_size=12).map(torch.tensor)


def error_of(method: OneBit | ScaledSign, gradient: torch.Tensor) -> float:
    return float((gradient.double() - method.compress(gradient).densify()).square().sum())


@given(vectors)
def test_each_group_becomes_its_mean(gradient: torch.Tensor) -> None:
    """The negative coordinates, and the others; zero is one of the others."""
    sent = OneBit().compress(gradient).densify()
    for group in (gradient < 0, gradient >= 0):
        if group.any():
            mean = torch.tensor(math.fsum(gradient[group].tolist()) / int(group.sum()))
            torch.testing.assert_close(sent[group], mean.expand(int(group.sum())), rtol=1e-6, atol=0.0)
            assert (sent[group] == sent[group][0]).all()


@given(vectors)
@example(torch.tensor([0.0, 0.0, 5.0]))
def test_declared_delta_holds(gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² ≤ (1 - δ)‖x‖²."""
    delta = OneBit().guarantee.delta
    assert delta is not None
    energy = float(gradient.double().square().sum())
    assert error_of(OneBit(), gradient) <= (1 - delta(gradient.numel())) * energy + 1e-12 * energy


@given(vectors)
def test_never_worse_than_the_scaled_sign(gradient: torch.Tensor) -> None:
    """Two means fit at least as well as one magnitude."""
    slack = 1e-12 * float(gradient.double().square().sum())
    assert error_of(OneBit(), gradient) <= error_of(ScaledSign(), gradient) + slack


@pytest.mark.parametrize("numel", [1, 2, 7])
def test_delta_is_reached_by_a_single_coordinate(numel: int) -> None:
    """1 / d is the least contraction: nothing better holds for every vector."""
    delta = OneBit().guarantee.delta
    assert delta is not None
    gradient = torch.zeros(numel)
    gradient[-1] = 3.0
    assert math.isclose(error_of(OneBit(), gradient), (1 - delta(numel)) * 9.0, rel_tol=1e-6, abs_tol=1e-12)


@given(vectors, st.integers(-6, 6).map(lambda exponent: 2.0**exponent))
def test_a_multiple_has_the_multiple_of_the_message(gradient: torch.Tensor, factor: float) -> None:
    """C(γx) = γC(x): the means carry the unit."""
    assert torch.equal(OneBit().compress(gradient * factor).densify(), OneBit().compress(gradient).densify() * factor)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_feedback_conserves_to_float32(steps: list[list[float]]) -> None:
    """Law 1: Σ sent + residual = Σ input, within what float32 sums lose."""
    feedback = ErrorFeedback(OneBit(), 5)
    inputs = torch.tensor(steps)
    sent = sum((feedback.compress(gradient).densify().double() for gradient in inputs), torch.zeros(5).double())
    # each of the two sums of a step is off by at most half a unit in the last place of what it adds up
    bound = 8 * len(steps) * torch.finfo(torch.float32).eps * float(inputs.abs().sum())
    assert ((sent + feedback.residual - inputs.double().sum(dim=0)).abs() <= bound).all()


def test_largest_numbers_do_not_overflow() -> None:
    """The sum of each group is beyond float32, its mean is not."""
    largest = torch.finfo(torch.float32).max
    gradient = torch.tensor([largest, largest, -largest, -largest])
    assert torch.equal(OneBit().compress(gradient).densify(), gradient)


def test_description() -> None:
    """It has no settings."""
    assert OneBit().describe() == "OneBit()"
