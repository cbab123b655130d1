"""Where thresholds come from: the rule, the quantile, and the calibration."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.thresholds import Calibration, paper_threshold, precision_threshold, quantile_threshold
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

densities = st.floats(0.01, 1.0)
vectors = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30).map(torch.tensor)
tied_vectors = st.lists(st.integers(-2, 2), min_size=1, max_size=12).map(lambda values: torch.tensor(values).float())


def passing(vector: torch.Tensor, threshold: float) -> int:
    return HardThreshold(threshold).compress(vector).count


def float32_below(threshold: float) -> float:
    return float(np.nextafter(np.float32(threshold), np.float32(0)))


@pytest.mark.parametrize(("k", "threshold"), [(1, 0.5), (100, 0.05), (0.25, 1.0), (0.095 * 31_832_577, 2.88e-4)])
def test_paper_threshold(k: float, threshold: float) -> None:
    """λ = 1 / (2 √k), with a value quoted for a published setting (NCF at 9.5 %)."""
    assert math.isclose(paper_threshold(k), threshold, rel_tol=2e-3)


@pytest.mark.parametrize("k", [0.0, -1.0, float("nan"), float("inf")])
def test_paper_threshold_refuses_no_elements(k: float) -> None:
    """It takes at least some element to send."""
    with pytest.raises(ConfigurationError, match="k must be a finite number above 0"):
        paper_threshold(k)


@given(
    st.floats(1e-6, 1e3),
    st.floats(1e-4, 10.0),
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), min_size=1, max_size=6),
)
def test_precision_threshold_keeps_the_residual_below_the_precision(
    precision: float, learning_rate: float, rounds: list[list[float]]
) -> None:
    """‖γe‖² ≤ ε after any sequence of gradients: below ε but for rounding."""
    feedback = ErrorFeedback(HardThreshold(precision_threshold(precision, 5, learning_rate)), numel=5)
    for gradient in rounds:
        feedback.compress(torch.tensor(gradient))
        assert float((learning_rate * feedback.residual.double()).square().sum()) <= precision * (1 + 1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["precision", "numel", "learning_rate"])
def test_precision_threshold_refuses_what_is_not_above_zero(name: str, bad: float) -> None:
    """Each argument by its name."""
    arguments: dict[str, Any] = {"precision": 1.0, "numel": 1, "learning_rate": 1.0, name: bad}
    with pytest.raises(ConfigurationError, match=name.replace("_", " ")):
        precision_threshold(**arguments)


@pytest.mark.parametrize(("precision", "learning_rate"), [(1e300, 1e-300), (1e-300, 1e300)])
def test_precision_threshold_refuses_one_that_is_out_of_range(precision: float, learning_rate: float) -> None:
    """Arguments in range whose threshold is not."""
    with pytest.raises(ConfigurationError, match="no usable threshold"):
        precision_threshold(precision, 1, learning_rate)


@given(vectors | tied_vectors, densities)
@example(torch.tensor([1.0, 1.0, 1.0]), 0.5)
@example(torch.tensor([0.0, 0.0]), 0.5)
def test_quantile_is_the_smallest_threshold_for_at_most_k(vector: torch.Tensor, density: float) -> None:
    """At most k coordinates reach it, and more than k the next smaller one, unless it is the floor."""
    k = max(1, int(density * vector.numel()))
    threshold = quantile_threshold(vector, density)
    assert passing(vector, threshold) <= k
    assert threshold == torch.finfo(torch.float32).tiny or passing(vector, float32_below(threshold)) > k


@given(st.sets(st.integers(1, 1000), min_size=1, max_size=30), densities)
def test_quantile_of_distinct_magnitudes_lets_exactly_k_pass(magnitudes: set[int], density: float) -> None:
    """Without ties, k means k."""
    vector = torch.tensor([(-1.0) ** m * m for m in magnitudes])
    assert passing(vector, quantile_threshold(vector, density)) == max(1, int(density * len(magnitudes)))


@given(tied_vectors, densities)
def test_quantile_is_never_zero(vector: torch.Tensor, density: float) -> None:
    """A threshold of zero would send everything; zeros never pass."""
    threshold = quantile_threshold(vector, density)
    assert threshold > 0.0
    assert passing(vector, threshold) <= int(vector.count_nonzero())


def test_quantile_refuses_bad_input() -> None:
    """Density, dtype and finiteness."""
    with pytest.raises(ConfigurationError, match="density"):
        quantile_threshold(torch.ones(3), 0.0)
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        quantile_threshold(torch.ones(3).double(), 0.5)
    with pytest.raises(NonFiniteGradientError, match="index 1"):
        quantile_threshold(torch.tensor([1.0, float("nan")]), 0.5)


@given(st.lists(vectors, min_size=1, max_size=6), st.integers(1, 4), densities)
def test_calibration_follows_the_quantile_and_then_holds(
    rounds: list[torch.Tensor], steps: int, density: float
) -> None:
    """Each of the first rounds proposes its own quantile; afterwards the last of these stays."""
    calibration = Calibration(density, steps)
    quantiles = [quantile_threshold(vector, density) for vector in rounds]
    assert calibration.threshold is None
    for index, vector in enumerate(rounds):
        assert calibration.finished == (index >= steps)
        assert calibration.observe(vector) == calibration.threshold == quantiles[min(index, steps - 1)]


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_calibrated_density_is_near_the_target_on_steady_gradients(spread: float) -> None:
    """300 steps with error feedback, sizes over orders of magnitude, drift and noise: within a factor of two of 1 %.

    The quantile of the first gradient alone, held for the run, sends more than the calibrated threshold does.
    """
    generator = torch.Generator().manual_seed(3)
    numel, density, steps = 20_000, 0.01, 60
    scale = torch.exp(spread * torch.randn(numel, generator=generator))
    drift = 0.1 * scale * torch.randn(numel, generator=generator)
    gradients = [drift + scale * torch.randn(numel, generator=generator) for _ in range(300)]

    calibration = Calibration(density, steps)
    first = threshold = quantile_threshold(gradients[0], density)
    feedback = ErrorFeedback(HardThreshold(), numel)
    sent = 0
    for gradient in gradients:
        corrected = gradient + feedback.residual
        sent += feedback.compress(gradient, Round(threshold=threshold)).count
        threshold = calibration.observe(corrected)
    uncalibrated = ErrorFeedback(HardThreshold(first), numel)
    sent_uncalibrated = sum(uncalibrated.compress(gradient).count for gradient in gradients)

    assert density / 2 < sent / (300 * numel) < density * 2
    assert sent_uncalibrated > sent


def test_observation_that_is_refused_changes_nothing() -> None:
    """A gradient with NaN is no observation."""
    calibration = Calibration(0.5, 2)
    threshold = calibration.observe(torch.tensor([1.0, 2.0]))
    with pytest.raises(NonFiniteGradientError):
        calibration.observe(torch.tensor([1.0, float("nan")]))
    assert (calibration.threshold, calibration.finished) == (threshold, False)


def test_finished_calibration_does_not_look() -> None:
    """Once final, whatever is shown costs nothing and changes nothing."""
    calibration = Calibration(0.5, 1)
    threshold = calibration.observe(torch.tensor([1.0, 2.0]))
    assert calibration.observe(torch.tensor([float("nan")])) == threshold


@given(st.lists(vectors, min_size=2, max_size=6), st.integers(1, 4), st.data())
def test_calibration_resumes_where_it_was(rounds: list[torch.Tensor], steps: int, data: st.DataObject) -> None:
    """Interrupted anywhere and restored from its state, it proposes the same thresholds."""
    cut = data.draw(st.integers(0, len(rounds)))
    whole, before, after = (Calibration(0.3, steps) for _ in range(3))
    expected = [whole.observe(vector) for vector in rounds]
    found = [before.observe(vector) for vector in rounds[:cut]]
    after.load_state_dict(before.state_dict())
    found += [after.observe(vector) for vector in rounds[cut:]]
    assert found == expected
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (Calibration(0.2, 3).state_dict(), "density 0.2 over 3 steps, this one has density 0.1 over 3"),
        (Calibration(0.1, 4).state_dict(), "density 0.1 over 4 steps, this one has density 0.1 over 3"),
        ({}, "found the keys"),
    ],
)
def test_state_of_another_calibration_is_refused(state: dict[str, Any], message: str) -> None:
    """The settings are part of the state, and the difference is named."""
    calibration = Calibration(0.1, 3)
    with pytest.raises(ConfigurationError, match=message):
        calibration.load_state_dict(state)
    assert calibration.threshold is None


@pytest.mark.parametrize(("density", "steps"), [(0.0, 1), (1.1, 1), (float("nan"), 1), (0.1, 0), (0.1, -1)])
def test_impossible_settings_are_refused(density: float, steps: int) -> None:
    """A density in (0, 1], and at least one step."""
    with pytest.raises(ConfigurationError):
        Calibration(density, steps)
