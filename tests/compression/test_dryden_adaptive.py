"""Dryden's adaptive quantisation: the share of each sign, its mean, and the bound derived for it."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.compression.dryden_adaptive import DrydenAdaptive
from thresher.compression.error_feedback import ErrorFeedback
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

floats = st.floats(-1e3, 1e3, width=32) | st.integers(-3, 3).map(float)
gradients = st.lists(floats, max_size=24).map(torch.tensor)
densities = st.floats(0.01, 1.0)


@given(gradients, densities)
def test_the_largest_of_each_sign_are_sent_as_their_mean(gradient: torch.Tensor, density: float) -> None:
    """As by a stable sort of each sign; of equal ones the first, and of zeros none."""
    expected = torch.zeros(gradient.numel())
    for sign in (1.0, -1.0):
        ours = [j for j in range(gradient.numel()) if sign * float(gradient[j]) > 0]
        k = max(1, int(density * len(ours)))
        chosen = sorted(ours, key=lambda j: (-abs(float(gradient[j])), j))[:k]
        if chosen:
            expected[chosen] = gradient[chosen].double().mean().float()
    sent = DrydenAdaptive(density).compress(gradient)
    sent.validate()
    assert torch.equal(sent.densify(), expected)
    assert sent.count == int(expected.count_nonzero())


@given(gradients, densities)
@example(torch.ones(24), 0.1)
@example(torch.tensor([1.0] + [0.001] * 23), 0.9)
def test_delta_holds(gradient: torch.Tensor, density: float) -> None:
    """‖x - C(x)‖² ≤ (1 - δ)‖x‖², up to the rounding of a mean to float32."""
    delta = DrydenAdaptive(density).guarantee.delta
    assert delta is not None
    error = float((gradient - DrydenAdaptive(density).compress(gradient).densify()).double().square().sum())
    energy = float(gradient.double().square().sum())
    assert error <= (1 - delta(gradient.numel()) + 1e-6) * energy


@pytest.mark.parametrize(
    ("density", "gradient"),
    [
        (0.1, [1.0] + [0.0] * 19),  # of one positive coordinate all is sent: nothing is lost, δ is no more than a bound
        (1.0, [1.0] + [1e-6] * 19),  # k = numel: the mean of all is a twentieth of the one that counts
    ],
)
def test_delta_is_not_far_below_the_truth(density: float, gradient: list[float]) -> None:
    """Where one large coordinate is sent as the mean of k, 1/k is what is left of it; a single one is sent whole."""
    x = torch.tensor(gradient)
    error = float((x - DrydenAdaptive(density).compress(x).densify()).double().square().sum())
    delta = DrydenAdaptive(density).guarantee.delta
    assert delta is not None
    assert error == pytest.approx(0.0 if density < 1 else 1 - delta(20), abs=1e-4)


@given(st.lists(st.lists(floats, min_size=6, max_size=6), min_size=1, max_size=6))
def test_it_conserves(steps: list[list[float]]) -> None:
    """Law 1: Σ sent + residual = Σ input, to the precision of float32."""
    feedback = ErrorFeedback(DrydenAdaptive(0.5), 6)
    inputs = torch.tensor(steps)
    sent = torch.stack([feedback.compress(gradient).densify() for gradient in inputs]).double()
    difference = sent.sum(dim=0) + feedback.residual - inputs.double().sum(dim=0)
    largest = float(inputs.abs().sum() + sent.abs().sum())
    assert float(difference.abs().max()) <= len(steps) * 2.0**-22 * largest


def test_a_mean_near_the_largest_float32_does_not_overflow() -> None:
    """The sum would."""
    assert DrydenAdaptive(1.0).compress(torch.full((4,), 3e38)).values.tolist() == pytest.approx([3e38] * 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_is_refused(value: float) -> None:
    """It would be in everybody's mean."""
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        DrydenAdaptive().compress(torch.tensor([0.0, value]))


@pytest.mark.parametrize("numel", [0, 3])
def test_of_nothing_nothing_is_sent(numel: int) -> None:
    """Neither an empty vector nor zeros are special cases."""
    assert DrydenAdaptive(1.0).compress(torch.zeros(numel)).count == 0
    delta = DrydenAdaptive(1.0).guarantee.delta
    assert delta is not None
    assert delta(0) == 1.0


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    """A density is in (0, 1]."""
    with pytest.raises(ConfigurationError, match=r"density must be in \(0, 1\]"):
        DrydenAdaptive(density)


def test_other_shapes_are_refused() -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        DrydenAdaptive().compress(torch.zeros(2, 2))


def test_description_names_the_density() -> None:
    """The text other processes compare; 1/64 is the default."""
    assert DrydenAdaptive().describe() == DrydenAdaptive(1 / 64).describe() == "DrydenAdaptive()"
    assert DrydenAdaptive(0.25).describe() == "DrydenAdaptive(density=0.25)"
