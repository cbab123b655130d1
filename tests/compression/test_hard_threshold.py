"""The hard threshold: absolute bound, shape-freedom, no starvation, and optimality on a fixed sequence."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import ErrorFeedback, HardThreshold, TopK
from thresher.protos.errors import ConfigurationError

thresholds = st.floats(1e-6, 1e3)
vectors = st.lists(st.floats(-1e3, 1e3, width=32), max_size=30).map(torch.tensor)


@given(vectors, thresholds)
def test_keeps_exactly_what_reaches_the_threshold(gradient: torch.Tensor, threshold: float) -> None:
    """In real numbers, not rounded ones: |x_j| ≥ λ is kept, |x_j| < λ is not."""
    sent = HardThreshold(threshold).compress(gradient)
    assert sent.indices.tolist() == [j for j, x in enumerate(gradient.tolist()) if abs(x) >= threshold]


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_equality_is_sent_and_the_next_smaller_number_is_not(threshold: float) -> None:
    """Inclusive ≥, on both sides of zero, to the last bit (law 3)."""
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    sent = HardThreshold(threshold).compress(torch.tensor([threshold, -threshold, below, -below]))
    assert sent.indices.tolist() == [0, 1]


@given(st.floats(1e-30, 1e30))
def test_threshold_between_two_float32_splits_them(threshold: float) -> None:
    """A λ that is no float32 is rounded up for the comparison, so a float32 just below it stays."""
    nearest = np.float32(threshold)
    others = [np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(np.inf))]
    sent = HardThreshold(threshold).compress(torch.tensor(np.array(others)))
    assert sent.indices.tolist() == [j for j, x in enumerate(others) if float(x) >= threshold]


@given(st.lists(vectors.filter(lambda v: v.numel() >= 5).map(lambda v: v[:5]), min_size=1, max_size=6), thresholds)
def test_residual_stays_below_and_sent_above(steps: list[torch.Tensor], threshold: float) -> None:
    """Law 3: after each step every |residual| < λ strictly and every |sent| ≥ λ."""
    feedback = ErrorFeedback(HardThreshold(threshold), 5)
    for gradient in steps:
        sent = feedback.compress(gradient)
        assert all(abs(x) < threshold for x in feedback.residual.tolist())
        assert all(abs(x) >= threshold for x in sent.values.tolist())


@given(vectors, thresholds, st.data())
def test_any_cut_gives_the_same_result(gradient: torch.Tensor, threshold: float, data: st.DataObject) -> None:
    """Law 4: layer by layer, shard by shard or entire-model, the same coordinates are sent."""
    compressor, numel = HardThreshold(threshold), gradient.numel()
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, numel), max_size=4))), numel]
    whole = compressor.compress(gradient)
    for begin, end in pairwise(cuts):
        assert compressor.compress(gradient[begin:end]).equals(whole.slice(begin, end))


@given(st.data(), thresholds)
def test_order_of_the_tensors_does_not_matter(data: st.DataObject, threshold: float) -> None:
    """Law 4: a permuted vector is sent as the permuted message."""
    gradient = data.draw(vectors)
    order = torch.tensor(data.draw(st.permutations(range(gradient.numel()))), dtype=torch.int64)
    compressor = HardThreshold(threshold)
    assert torch.equal(compressor.compress(gradient[order]).densify(), compressor.compress(gradient).densify()[order])


@given(st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_constant_gradient_is_sent_every_so_many_steps(threshold: int, size: int, negative: bool) -> None:
    """No starvation: a constant gradient c is sent every ⌈λ / |c|⌉ steps, and only then."""
    feedback = ErrorFeedback(HardThreshold(threshold), 1)
    gradient = torch.tensor([float(-size if negative else size)])
    sent = [feedback.compress(gradient).count for _ in range(500)]
    period = math.ceil(threshold / size)
    assert sent == [int((step + 1) % period == 0) for step in range(500)]


def test_too_large_a_threshold_sends_nothing() -> None:
    """An empty message is a message, and the gradient is in the residual."""
    feedback = ErrorFeedback(HardThreshold(100.0), 3)
    assert feedback.compress(torch.tensor([1.0, -2.0, 3.0])).count == 0
    assert feedback.residual.tolist() == [1.0, -2.0, 3.0]


@given(st.integers(0, 2**31 - 1))
def test_best_threshold_on_a_fixed_sequence(seed: int) -> None:
    """Lemma 3: λ = |A_(K)| sends K in all, with no more total error than Top-k or chance at that budget."""
    generator = torch.Generator().manual_seed(seed)
    steps, numel, per_step = 8, 20, 3
    budget = steps * per_step
    scale = torch.logspace(-1, 1, steps).unsqueeze(1)  # gradients that change size, where a fixed k wastes its budget
    sequence = scale * torch.randn(steps, numel, generator=generator)
    magnitudes = sequence.abs().flatten().sort(descending=True).values
    compressor = HardThreshold(float(magnitudes[budget - 1]))
    hard = [compressor.compress(row) for row in sequence]
    top = [TopK(per_step / numel).compress(row) for row in sequence]
    assert sum(sent.count for sent in hard) == sum(sent.count for sent in top) == budget

    energy = sequence.double().square().sum()
    captured = sum(sent.values.double().square().sum() for sent in hard)
    least_error = energy - captured
    assert least_error <= energy - sum(sent.values.double().square().sum() for sent in top)
    for _ in range(20):
        support = torch.randperm(steps * numel, generator=generator)[:budget]
        assert least_error <= energy - sequence.flatten()[support].double().square().sum()


@pytest.mark.parametrize("threshold", [-1e-9, float("nan"), float("inf"), float("-inf"), 1e39])
def test_impossible_threshold_is_refused(threshold: float) -> None:
    """Negative, NaN, infinite, and more than a float32 can hold."""
    with pytest.raises(ConfigurationError, match="threshold must be a finite number >= 0"):
        HardThreshold(threshold)


def test_description_does_not_depend_on_the_type_of_the_number() -> None:
    """A NumPy or an integer threshold reads as the float it is."""
    assert HardThreshold(np.float64(0.01)).describe() == HardThreshold(0.01).describe() == "HardThreshold(0.01)"
    assert HardThreshold(1).describe() == "HardThreshold(1.0)"
