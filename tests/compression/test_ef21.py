"""EF21: the estimate follows the gradient, and the residual is what it still lacks."""

import io
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Compressor
from thresher.compression.ef21 import EF21
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

NUMEL = 6
compressors: st.SearchStrategy[Compressor] = st.one_of(
    st.just(Identity()), st.floats(0.0, 10.0).map(HardThreshold), st.floats(0.1, 1.0).map(TopK)
)
integers = st.lists(st.integers(-64, 64), min_size=NUMEL, max_size=NUMEL).map(
    lambda gradient: torch.tensor(gradient).float()
)


@given(compressors, st.lists(integers, min_size=1, max_size=8))
def test_each_step_follows_the_algorithm(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """The estimate moves by C(gradient - estimate), which is what the server hears of it; exact on integers."""
    feedback, server = EF21(compressor, NUMEL), torch.zeros(NUMEL)
    for gradient in steps:
        before = gradient.clone()
        expected = compressor.compress(gradient - server)
        sent = feedback.compress(gradient)
        assert sent.equals(expected)
        server += sent.densify()
        assert torch.equal(feedback.estimate, server)
        assert torch.equal(feedback.residual, gradient - server)
        assert torch.equal(gradient, before)


@given(st.floats(0.1, 1.0), integers)
def test_a_contraction_finds_a_constant_gradient(density: float, gradient: torch.Tensor) -> None:
    """‖residual‖² falls by 1 - δ each step (arXiv:2106.05203, with a gradient that stays); Top-k ends at zero."""
    feedback, error = EF21(TopK(density), NUMEL), float(gradient.square().sum())
    delta = TopK(density).guarantee.delta
    assert delta is not None
    for _ in range(NUMEL):
        feedback.compress(gradient)
        now = float(feedback.residual.square().sum())
        assert now <= (1 - delta(NUMEL)) * error * (1 + 1e-12)
        error = now
    assert torch.equal(feedback.estimate, gradient)


def test_it_does_not_conserve_and_says_so() -> None:
    """The second of two equal gradients adds nothing: the server knows it already."""
    feedback = EF21(Identity(), 1)
    assert not feedback.guarantee.conserves
    sent = sum(feedback.compress(torch.ones(1)).densify().item() for _ in range(2))
    assert sent + feedback.residual.item() == 1.0


def test_it_runs_in_the_simulator_only() -> None:
    """No shard has a memory for it."""
    assert EF21.runs_in == {"simulator"}


def test_description_is_the_call() -> None:
    """Without numel."""
    assert EF21(TopK(0.5), NUMEL).describe() == "EF21(TopK(0.5))"


def test_negative_numel_is_refused() -> None:
    """A vector has a length."""
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        EF21(TopK(0.5), -1)


def test_what_is_no_compressor_is_refused() -> None:
    """A number, and a feedback: that goes around compressors."""
    for wrong in (3, ErrorFeedback(TopK(0.5), 2)):
        with pytest.raises(ConfigurationError, match="takes compressors, not a"):
            EF21(cast("Any", wrong), 2)


def test_gradient_that_is_refused_changes_nothing() -> None:
    """Another length, and NaN."""
    feedback = EF21(TopK(0.5), 2)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3))
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        feedback.compress(torch.tensor([1.0, float("nan")]))
    assert feedback.estimate.tolist() == [0.0, 2.0]
    assert feedback.residual.tolist() == [1.0, 0.0]


def test_state_survives_a_safe_file() -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    original, restored = (EF21(TopK(0.3), NUMEL) for _ in range(2))
    original.compress(torch.linspace(-1, 2, NUMEL))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(restored.residual, original.residual)
    gradient = torch.linspace(2, -1, NUMEL)
    assert restored.compress(gradient).equals(original.compress(gradient))
    assert torch.equal(restored.estimate, original.estimate)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (EF21(TopK(0.5), 2).state_dict(), r"belongs to EF21\(TopK\(0.5\)\), this is EF21\(TopK\(0.3\)\)"),
        (EF21(TopK(0.3), 3).state_dict(), r"shape \(3,\), expected torch.float32 of shape \(2,\)"),
        ({}, "not a state of EF21"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = EF21(TopK(0.3), 2)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert feedback.estimate.tolist() == [0.0, 2.0]
