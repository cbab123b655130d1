"""Strom's quantisation: what is sent, what stays, and what it does not promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.strom import Strom
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

gradients = st.lists(st.floats(-8, 8, width=32) | st.sampled_from([0.75, -0.75, 0.0, -0.0]), max_size=20).map(
    torch.tensor
)


@given(gradients, st.floats(2**-10, 4, width=32))
def test_what_reaches_the_threshold_is_sent_as_the_threshold(gradient: torch.Tensor, threshold: float) -> None:
    """+τ, -τ or nothing, coordinate by coordinate; equality is sent."""
    sent = Strom(threshold).compress(gradient)
    sent.validate()
    expected = [threshold if x >= threshold else -threshold if x <= -threshold else 0.0 for x in gradient.tolist()]
    assert sent.densify().tolist() == expected
    assert sent.count == sum(value != 0.0 for value in expected)


def test_a_threshold_between_two_float32_is_the_nearest() -> None:
    """0.1 is no float32: what is compared and what is sent is the one float32 nearest to it."""
    gradient = torch.tensor([0.1, -0.1])
    assert torch.equal(Strom(0.1).compress(gradient).densify(), gradient)


@given(gradients, st.integers(-3, 3))
def test_it_scales(gradient: torch.Tensor, power: int) -> None:
    """C_γ(x) = γ·C(x/γ), exact for powers of two."""
    scale = 2.0**power
    scaled = Strom(0.75).compress(gradient * scale, Round(scale=scale))
    assert torch.equal(scaled.densify(), Strom(0.75).compress(gradient).densify() * scale)


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=8), st.integers(1, 5))
def test_it_conserves(steps: list[list[int]], threshold: int) -> None:
    """Law 1, exact on integers: Σ sent + residual = Σ input."""
    feedback = ErrorFeedback(Strom(threshold), 4)
    inputs = torch.tensor(steps).float()
    sent = torch.stack([feedback.compress(gradient).densify() for gradient in inputs])
    assert torch.equal(sent.sum(dim=0) + feedback.residual, inputs.sum(dim=0))


@given(st.integers(-50, 50))
def test_a_large_coordinate_is_paid_in_instalments(amount: int) -> None:
    """Of 2·τ·m and less than τ more, τ is sent in each of 2·m rounds, and then nothing."""
    feedback = ErrorFeedback(Strom(2.0), 1)
    inputs = [torch.tensor([float(amount)])] + [torch.zeros(1)] * 30
    sent = [feedback.compress(gradient).count for gradient in inputs]
    assert sent == [1] * (abs(amount) // 2) + [0] * (31 - abs(amount) // 2)


def test_it_is_neither_absolute_nor_relative() -> None:
    """Its error has no bound for large vectors, and is all of a small one; so it promises neither."""
    guarantee = Strom(1.0).guarantee
    assert (guarantee.kappa, guarantee.delta, guarantee.omega) == (None, None, None)
    assert float(1e6 - Strom(1.0).compress(torch.tensor([1e6])).values) == 1e6 - 1
    assert Strom(1.0).compress(torch.tensor([0.5])).count == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_is_refused(value: float) -> None:
    """It is not sent as a threshold."""
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        Strom(1.0).compress(torch.tensor([0.0, value]))


@pytest.mark.parametrize("threshold", [0.0, -0.0, -1.0, float("nan"), float("inf"), 1e39, 1e-50])
def test_what_is_no_threshold_is_refused(threshold: float) -> None:
    """It is a positive float32: zero would send nothing, and say it of everything."""
    with pytest.raises(ConfigurationError, match="threshold must be a finite float32 > 0"):
        Strom(threshold)


@pytest.mark.parametrize("scale", [1e-40, 1e30])
def test_a_scale_that_leaves_float32_is_refused(scale: float) -> None:
    """The same holds of the product."""
    with pytest.raises(ConfigurationError, match="threshold must be a finite float32 > 0"):
        Strom(1e-9 if scale < 1 else 1e9).compress(torch.ones(1), Round(scale=scale))


def test_other_shapes_are_refused() -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        Strom(1.0).compress(torch.zeros(2, 2))


def test_description_names_the_threshold() -> None:
    """The text other processes compare; 1 is 1.0."""
    assert Strom(1).describe() == "Strom(1.0)"
    assert Strom(0.01).describe() == "Strom(0.01)"
