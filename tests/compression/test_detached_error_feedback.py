"""Detached error feedback: sends and keeps what error feedback does, and says where the model stands."""

import io
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Compressor
from thresher.compression.detached_error_feedback import DetachedErrorFeedback
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

NUMEL = 6
compressors = st.one_of(st.just(Identity()), st.floats(0.0, 10.0).map(HardThreshold), st.floats(0.1, 1.0).map(TopK))
updates = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)


@given(compressors, st.floats(0.0, 1.0), st.lists(updates, min_size=1, max_size=8))
def test_sends_and_keeps_what_error_feedback_does(
    compressor: Compressor, coefficient: float, steps: list[torch.Tensor]
) -> None:
    """To the bit, whatever the coefficient, which moves only the model; so it conserves as error feedback does."""
    detached, plain = DetachedErrorFeedback(compressor, NUMEL, coefficient), ErrorFeedback(compressor, NUMEL)
    assert detached.guarantee == plain.guarantee
    for update in steps:
        assert detached.compress(update).equals(plain.compress(update))
        assert torch.equal(detached.residual, plain.residual)


def test_says_where_the_model_stands() -> None:
    """At x - coefficient · residual; plain error feedback stands at x."""
    assert DetachedErrorFeedback(TopK(0.5), NUMEL).detached == 0.3
    assert DetachedErrorFeedback(TopK(0.5), NUMEL, 1).detached == 1.0
    assert ErrorFeedback(TopK(0.5), NUMEL).detached == 0.0


def test_runs_on_finished_updates_only() -> None:
    """A residual in the unit of gradients can't be taken from x."""
    assert DetachedErrorFeedback.runs_in == {"update", "simulator"}


def test_description_is_the_call_without_defaults() -> None:
    """Neither numel nor device, and the coefficient if it is not the usual one."""
    assert DetachedErrorFeedback(TopK(0.5), NUMEL).describe() == "DetachedErrorFeedback(TopK(0.5))"
    assert DetachedErrorFeedback(TopK(0.5), 2, 1).describe() == "DetachedErrorFeedback(TopK(0.5), coefficient=1.0)"


@pytest.mark.parametrize("coefficient", [-0.1, 1.1, float("nan"), float("inf")])
def test_coefficient_outside_its_range_is_refused(coefficient: float) -> None:
    """Between not at all and wholly."""
    with pytest.raises(ConfigurationError, match=r"coefficient of the residual must be in \[0, 1\]"):
        DetachedErrorFeedback(TopK(0.5), NUMEL, coefficient)


def test_negative_numel_is_refused() -> None:
    """A vector has a length."""
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        DetachedErrorFeedback(TopK(0.5), -1)


def test_what_is_no_compressor_is_refused() -> None:
    """A number, and a feedback: that goes around compressors."""
    for wrong in (3, ErrorFeedback(TopK(0.5), 2)):
        with pytest.raises(ConfigurationError, match="takes compressors, not a"):
            DetachedErrorFeedback(cast("Any", wrong), 2)


def test_update_that_is_no_update_changes_nothing() -> None:
    """Another length, and NaN."""
    feedback = DetachedErrorFeedback(HardThreshold(9.0), 2)
    feedback.compress(torch.ones(2))
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3))
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        feedback.compress(torch.tensor([1.0, float("nan")]))
    assert feedback.residual.tolist() == [1.0, 1.0]


def test_state_survives_a_safe_file() -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    original, restored = (DetachedErrorFeedback(TopK(0.3), NUMEL) for _ in range(2))
    original.compress(torch.linspace(-1, 2, NUMEL))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    update = torch.linspace(2, -1, NUMEL)
    assert restored.compress(update).equals(original.compress(update))
    assert torch.equal(restored.residual, original.residual)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            DetachedErrorFeedback(TopK(0.3), 2, 0.5).state_dict(),
            r"belongs to DetachedErrorFeedback\(TopK\(0.3\), coefficient=0.5\), this is Detached",
        ),
        (ErrorFeedback(TopK(0.3), 2).state_dict(), r"belongs to ErrorFeedback\(TopK\(0.3\)\), this is Detached"),
        (DetachedErrorFeedback(TopK(0.3), 3).state_dict(), r"shape \(3,\), expected torch.float32 of shape \(2,\)"),
        ({}, "not a state of DetachedErrorFeedback"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = DetachedErrorFeedback(TopK(0.3), 2)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert feedback.residual.tolist() == [1.0, 0.0]
