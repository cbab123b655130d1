"""The contract of a feedback: what its states may hold, and where it may run."""

from typing import get_args

import pytest
import torch

from thresher.compression import ErrorFeedback, HardThreshold
from thresher.compression.catalogue import FEEDBACKS
from thresher.compression.feedback import Where, check_tensor
from thresher.protos.errors import ConfigurationError


def test_places_are_known_ones() -> None:
    """A feedback that runs nowhere, or somewhere unheard of, would never be refused by name."""
    for method in FEEDBACKS.values():
        assert method.runs_in
        assert method.runs_in <= set(get_args(Where))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "is a NoneType, not a tensor"),
        ([0.0, 0.0], "is a list, not a tensor"),
        (torch.zeros(3), r"shape \(3,\), expected torch.float32 of shape \(2,\): it belongs to another model"),
        (torch.zeros(2, dtype=torch.float64), "torch.float64"),
    ],
)
def test_tensors_of_a_state_must_fit(value: object, why: str) -> None:
    """The message has what was found and what fits."""
    with pytest.raises(ConfigurationError, match=f"the residual in the state {why}|{why}"):
        check_tensor("residual", value, torch.zeros(2))


@pytest.mark.parametrize(
    ("vector", "why"),
    [
        (torch.zeros(3), "expected a vector of numel 2, found 3"),
        (torch.zeros(1, 2), "must be a one-dimensional float32 tensor"),
        (torch.zeros(2, dtype=torch.float64), "must be a one-dimensional float32 tensor, not torch.float64"),
        (torch.zeros(2, device="meta"), "expected a vector on cpu, found one on meta"),
    ],
)
def test_gradients_must_fit(vector: torch.Tensor, why: str) -> None:
    """Refused before anything is touched."""
    feedback = ErrorFeedback(HardThreshold(1.0), numel=2)
    with pytest.raises(ConfigurationError, match=why):
        feedback.compress(vector)
    assert not feedback.residual.any()
