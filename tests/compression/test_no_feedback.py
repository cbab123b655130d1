"""No feedback: each gradient alone."""

import io
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import FIRST_ROUND, Compressor, Guarantee, Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.no_feedback import NoFeedback
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient

NUMEL = 6
compressors = st.one_of(st.just(Identity()), st.floats(0.0, 10.0).map(HardThreshold), st.floats(0.1, 1.0).map(TopK))
gradients = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)


class Doubling(Compressor):
    """Sends twice what it gets, and says that it does not conserve."""

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(conserves=False)

    def compress(self, gradient: torch.Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        return SparseGradient.dense(gradient * 2)

    def describe(self) -> str:
        return "Doubling()"


@given(compressors, st.lists(gradients, min_size=1, max_size=4))
def test_every_message_is_that_of_its_gradient_alone(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """Nothing of one step is seen in the next, and nothing is left over."""
    feedback = NoFeedback(compressor, NUMEL)
    for step, gradient in enumerate(steps):
        assert feedback.compress(gradient, Round(step)).equals(compressor.compress(gradient, Round(step)))
        assert torch.equal(feedback.residual, torch.zeros(NUMEL))


@given(gradients, st.floats(0.1, 1.0))
def test_bounds_of_the_compressor_hold_for_each_input(gradient: torch.Tensor, density: float) -> None:
    """As nothing is remembered, the compressor's own δ holds for whatever comes; it does not conserve."""
    feedback = NoFeedback(TopK(density), NUMEL)
    assert feedback.guarantee.delta is not None
    assert not feedback.guarantee.conserves
    error = float((gradient - feedback.compress(gradient).densify()).double().square().sum())
    energy = float(gradient.double().square().sum())
    assert error <= (1 - feedback.guarantee.delta(NUMEL)) * energy * (1 + 1e-12)


def test_the_residual_is_zero_and_stays_so() -> None:
    """It takes no memory, and nobody can put anything there."""
    residual = NoFeedback(TopK(0.5), NUMEL).residual
    assert residual.untyped_storage().nbytes() == 4
    with pytest.raises(RuntimeError, match="single memory location"):
        residual.add_(1.0)


def test_any_compressor_will_do() -> None:
    """Also one that does not conserve, and vectors without elements."""
    assert NoFeedback(Doubling(), 1).compress(torch.ones(1)).densify().tolist() == [2.0]
    assert NoFeedback(TopK(0.5), 0).compress(torch.empty(0)).count == 0


def test_description_is_the_call() -> None:
    """Without numel."""
    assert NoFeedback(TopK(0.5), NUMEL).describe() == "NoFeedback(TopK(0.5))"


def test_negative_numel_is_refused() -> None:
    """A vector has a length."""
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        NoFeedback(TopK(0.5), -1)


def test_what_is_no_compressor_is_refused() -> None:
    """A number, and a feedback: that goes around compressors."""
    for wrong in (3, ErrorFeedback(TopK(0.5), 2)):
        with pytest.raises(ConfigurationError, match="takes compressors, not a"):
            NoFeedback(cast("Any", wrong), 2)


def test_gradient_that_is_no_gradient_is_refused() -> None:
    """Another length, another dtype, and NaN, which a sparsifier alone would pass on."""
    feedback = NoFeedback(HardThreshold(1.0), 2)
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3))
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        feedback.compress(torch.ones(2, dtype=torch.float64))
    with pytest.raises(NonFiniteGradientError, match="at index 0"):
        feedback.compress(torch.tensor([float("nan"), 1.0]))


def test_state_survives_a_safe_file() -> None:
    """That of the compressor, and what it belongs to."""
    original, restored = (NoFeedback(TopK(0.3), NUMEL) for _ in range(2))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert restored.state_dict() == original.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            NoFeedback(TopK(0.5), 2).state_dict(),
            r"belongs to NoFeedback\(TopK\(0.5\)\), this is NoFeedback\(TopK\(0.3\)\)",
        ),
        (NoFeedback(TopK(0.3), 3).state_dict(), "belongs to vectors of numel 3, these have 2"),
        ({}, "not a state of NoFeedback"),
    ],
)
def test_state_of_another_is_refused(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    with pytest.raises(ConfigurationError, match=message):
        NoFeedback(TopK(0.3), 2).load_state_dict(state)
