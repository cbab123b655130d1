"""The baseline sends everything."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import ErrorFeedback, HardThreshold, Identity

vectors = st.lists(st.floats(-1e6, 1e6, width=32), max_size=20).map(torch.tensor)


@given(vectors)
def test_identity_sends_every_bit(gradient: torch.Tensor) -> None:
    """All coordinates, bit for bit, -0.0 included."""
    sent = Identity().compress(gradient)
    assert torch.equal(sent.densify().view(torch.int32), gradient.view(torch.int32))
    assert sent.density == (1.0 if gradient.numel() else 0.0)


@given(vectors)
def test_threshold_zero_is_the_identity(gradient: torch.Tensor) -> None:
    """Law 5: λ = 0 compresses nothing (arXiv:2108.00951: the uncompressed method is the limit λ → 0)."""
    assert HardThreshold(0.0).compress(gradient).equals(Identity().compress(gradient))


@given(vectors)
def test_nothing_is_left_to_feed_back(gradient: torch.Tensor) -> None:
    """Under error feedback the residual of a dense send is exactly zero."""
    feedback = ErrorFeedback(Identity(), gradient.numel())
    assert torch.equal(feedback.compress(gradient).densify(), gradient)
    assert not feedback.residual.any()


def test_description() -> None:
    """The text other processes compare."""
    assert Identity().describe() == "Identity()"
