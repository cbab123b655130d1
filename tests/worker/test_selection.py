"""Selection: error feedback with one threshold for the run."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.layout import Layout, TensorSpec
from thresher.worker import Method
from thresher.worker.method import CALIBRATION_STEPS
from thresher.worker.selection import Selection

NUMEL = 8
LAYOUT = Layout((TensorSpec("a", (NUMEL,), "float32"),))

messages = st.lists(st.floats(-8, 8, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
powers = st.sampled_from([0.25, 0.5, 1.0, 2.0])


@given(st.lists(messages, min_size=1, max_size=6), st.sampled_from([0.125, 1.0, 4.0]), powers)
def test_scaling_the_unit_scales_what_is_sent(inputs: list[Tensor], threshold: float, scale: float) -> None:
    """C_γ(x) = γ·C(x/γ): messages in units of γ gradients, with γλ, select as gradients do with λ."""
    plain, scaled = Selection(Method(threshold=threshold), LAYOUT), Selection(Method(threshold=threshold), LAYOUT)
    for message in inputs:
        expected = plain.select(message.clone(), 1.0)
        found = scaled.select(message * scale, scale)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values * scale)
        assert torch.equal(scaled.residual, plain.residual * scale)


@given(st.lists(messages, min_size=2, max_size=6), st.sampled_from([0.125, 0.5]), powers)
def test_proposals_are_in_units_of_gradients(inputs: list[Tensor], density: float, scale: float) -> None:
    """Rank 0's λ does not depend on the unit of messages, and at λ this worker would have kept the wanted density."""
    plain, scaled = Selection(Method(density=density), LAYOUT), Selection(Method(density=density), LAYOUT)
    for message in inputs:
        corrected = message + plain.residual
        proposal = plain.propose(plain.select(message.clone(), 1.0), 1.0)
        other = scaled.propose(scaled.select(message * scale, scale), scale)
        assert proposal == other
        assert proposal is not None
        assert int((corrected.abs() >= proposal).sum()) <= density * NUMEL
        plain.adopt(proposal)
        scaled.adopt(other)


def test_before_the_first_proposal_each_worker_keeps_its_largest() -> None:
    """The first step of a calibrated run sends the wanted density of the worker's own gradient."""
    selection = Selection(Method(density=0.25), LAYOUT)
    sent = selection.select(torch.arange(1.0, NUMEL + 1), 1.0)
    assert sent.values.tolist() == [7.0, 8.0]


def test_a_calibrated_threshold_is_held() -> None:
    """After the calibration the proposal stays what it is, whatever the gradients become."""
    selection = Selection(Method(density=0.25), LAYOUT)
    for _ in range(CALIBRATION_STEPS):
        selection.adopt(selection.propose(selection.select(torch.arange(1.0, NUMEL + 1), 1.0), 1.0))
    held = selection.threshold
    proposal = selection.propose(selection.select(1000 * torch.ones(NUMEL), 1.0), 1.0)
    assert held is not None
    assert proposal == held


def test_a_skipped_step_proposes_what_was() -> None:
    """Nothing is learned from a step that was not sent."""
    selection = Selection(Method(density=0.25), LAYOUT)
    assert selection.propose(None, 1.0) is None
    selection.adopt(3.0)
    assert selection.propose(None, 1.0) == 3.0


def test_no_news_is_no_new_threshold() -> None:
    """An update without a threshold leaves the one in force."""
    selection = Selection(Method(threshold=2.0), LAYOUT)
    selection.adopt(None)
    assert selection.threshold == 2.0


def test_a_learning_rate_of_zero() -> None:
    """A warm-up that begins at 0 sends updates of zero; it neither fails nor teaches a threshold."""
    selection = Selection(Method(density=0.25, placement="update"), LAYOUT)
    sent = selection.select(torch.zeros(NUMEL), 0.0)
    assert not sent.values.any()
    assert selection.propose(sent, 0.0) is None


def test_methods_without_a_threshold_propose_none() -> None:
    """Top-k and identity have none, from the first step to the last."""
    for method in (Method(compressor="identity"), Method(compressor="top-k", density=0.5)):
        selection = Selection(method, LAYOUT)
        sent = selection.select(torch.arange(1.0, NUMEL + 1), 1.0)
        assert selection.propose(sent, 1.0) is None
        assert sent.count == (NUMEL if method.compressor == "identity" else NUMEL // 2)


def test_a_step_of_size_zero_sends_nothing() -> None:
    """At a learning rate of 0 the threshold γλ is 0 as well; the residual stays where it is."""
    layout = Layout((TensorSpec("w", (4,), "float32"),))
    selection = Selection(Method(threshold=1.0, placement="update"), layout)
    assert selection.select(torch.full((4,), 0.25), scale=0.5).count == 0
    assert selection.select(torch.zeros(4), scale=0.0).count == 0
    assert selection.residual.tolist() == [0.25] * 4
