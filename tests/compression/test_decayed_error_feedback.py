"""Decayed error feedback: the residual fades, and that is all."""

import io
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Compressor
from thresher.compression.decayed_error_feedback import DecayedErrorFeedback
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

NUMEL = 6
compressors = st.one_of(st.just(Identity()), st.floats(0.0, 10.0).map(HardThreshold), st.floats(0.1, 1.0).map(TopK))
gradients = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
runs = st.lists(gradients, min_size=1, max_size=8)


@given(compressors, st.floats(0.0, 1.0), runs)
def test_each_step_splits_gradient_plus_decayed_residual(
    compressor: Compressor, decay: float, steps: list[torch.Tensor]
) -> None:
    """To the bit: sent + residual_after == gradient + decay · residual_before."""
    feedback = DecayedErrorFeedback(compressor, NUMEL, decay)
    for gradient in steps:
        corrected = feedback.residual * decay + gradient
        before = gradient.clone()
        sent = feedback.compress(gradient)
        assert torch.equal(sent.densify() + feedback.residual, corrected)
        assert torch.equal(gradient, before)


@given(compressors, runs)
def test_without_decay_it_is_error_feedback(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """To the bit, and so it says that it conserves."""
    decayed, plain = DecayedErrorFeedback(compressor, NUMEL, 1), ErrorFeedback(compressor, NUMEL)
    assert decayed.guarantee.conserves
    for gradient in steps:
        assert decayed.compress(gradient).equals(plain.compress(gradient))
        assert torch.equal(decayed.residual, plain.residual)


@given(compressors, runs)
def test_with_decay_zero_nothing_is_remembered(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """Each message is that of its gradient alone."""
    feedback = DecayedErrorFeedback(compressor, NUMEL, 0)
    for gradient in steps:
        assert torch.equal(feedback.compress(gradient).densify(), compressor.compress(gradient).densify())


def test_it_does_not_conserve_and_says_so() -> None:
    """A coordinate that never reaches the threshold fades instead of adding up."""
    feedback = DecayedErrorFeedback(HardThreshold(2.0), 1, 0.5)
    assert not feedback.guarantee.conserves
    sent = sum(feedback.compress(torch.ones(1)).count for _ in range(20))
    assert sent == 0
    assert feedback.residual.item() == pytest.approx(2.0, abs=1e-5)  # Σ 0.5ⁱ, not 20


def test_description_is_the_call() -> None:
    """With the decay by position, as it has no default."""
    assert DecayedErrorFeedback(TopK(0.5), NUMEL, 0.95).describe() == "DecayedErrorFeedback(TopK(0.5), 0.95)"
    assert DecayedErrorFeedback(TopK(0.5), NUMEL, 1).describe() == "DecayedErrorFeedback(TopK(0.5), 1.0)"


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf")])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    """A residual that grows by itself diverges."""
    with pytest.raises(ConfigurationError, match=r"decay of the residual must be in \[0, 1\]"):
        DecayedErrorFeedback(TopK(0.5), NUMEL, decay)


def test_negative_numel_is_refused() -> None:
    """A vector has a length."""
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        DecayedErrorFeedback(TopK(0.5), -1, 0.5)


def test_what_is_no_compressor_is_refused() -> None:
    """A number, and a feedback: that goes around compressors."""
    for wrong in (3, ErrorFeedback(TopK(0.5), 2)):
        with pytest.raises(ConfigurationError, match="takes compressors, not a"):
            DecayedErrorFeedback(cast("Any", wrong), 2, 0.5)


def test_gradient_that_is_refused_does_not_let_the_residual_decay() -> None:
    """Another length, and NaN: that step never happened."""
    feedback = DecayedErrorFeedback(HardThreshold(9.0), 2, 0.5)
    feedback.compress(torch.ones(2))
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3))
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        feedback.compress(torch.tensor([1.0, float("inf")]))
    assert feedback.residual.tolist() == [1.0, 1.0]


def test_state_survives_a_safe_file() -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    original, restored = (DecayedErrorFeedback(TopK(0.3), NUMEL, 0.9) for _ in range(2))
    original.compress(torch.linspace(-1, 2, NUMEL))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    gradient = torch.linspace(2, -1, NUMEL)
    assert restored.compress(gradient).equals(original.compress(gradient))
    assert torch.equal(restored.residual, original.residual)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            DecayedErrorFeedback(TopK(0.3), 2, 0.5).state_dict(),
            r"belongs to DecayedErrorFeedback\(TopK\(0.3\), 0.5\), this is DecayedErrorFeedback\(TopK\(0.3\), 0.9\)",
        ),
        (
            DecayedErrorFeedback(TopK(0.3), 3, 0.9).state_dict(),
            r"shape \(3,\), expected torch.float32 of shape \(2,\)",
        ),
        ({}, "not a state of DecayedErrorFeedback"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = DecayedErrorFeedback(TopK(0.3), 2, 0.9)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert feedback.residual.tolist() == [1.0, 0.0]
