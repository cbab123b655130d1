"""Momentum correction: the recursion, its two limits, and what it conserves instead of gradients."""

import io
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.compression.base import Compressor
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.momentum_correction import MomentumCorrection
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

NUMEL = 6
compressors: st.SearchStrategy[Compressor] = st.one_of(
    st.just(Identity()), st.floats(0.0, 10.0).map(HardThreshold), st.floats(0.1, 1.0).map(TopK)
)
gradients = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
runs = st.lists(gradients, min_size=1, max_size=8)
integer_runs = st.lists(
    st.lists(st.integers(-64, 64), min_size=NUMEL, max_size=NUMEL).map(lambda gradient: torch.tensor(gradient).float()),
    min_size=1,
    max_size=8,
)


@given(compressors, integer_runs, st.booleans(), st.booleans())
def test_each_step_follows_the_algorithm(
    compressor: Compressor, steps: list[torch.Tensor], nesterov: bool, masking: bool
) -> None:
    """Algorithm 3 of arXiv:2108.00951 in DGC's notation, exact with momentum 1/2 on integers."""
    feedback = MomentumCorrection(compressor, NUMEL, 0.5, nesterov=nesterov, masking=masking)
    u, v = torch.zeros(NUMEL), torch.zeros(NUMEL)
    for gradient in steps:
        if nesterov:
            u = (u + gradient) / 2
            v += u + gradient
        else:
            u = u / 2 + gradient
            v += u
        expected = compressor.compress(v)
        v[expected.indices] = 0
        if masking:
            u[expected.indices] = 0
        assert feedback.compress(gradient).equals(expected)
        assert torch.equal(feedback.velocity, u)
        assert torch.equal(feedback.residual, v)


@given(compressors, runs, st.booleans(), st.booleans())
def test_without_momentum_it_is_error_feedback(
    compressor: Compressor, steps: list[torch.Tensor], nesterov: bool, masking: bool
) -> None:
    """Then the velocity is the gradient."""
    corrected = MomentumCorrection(compressor, NUMEL, 0.0, nesterov=nesterov, masking=masking)
    plain = ErrorFeedback(compressor, NUMEL)
    for gradient in steps:
        assert torch.equal(corrected.compress(gradient).densify(), plain.compress(gradient).densify())
        assert torch.equal(corrected.residual, plain.residual)


@settings(max_examples=30)  # a torch optimizer for each
@given(runs, st.floats(0.0, 0.99), st.booleans())
def test_with_everything_sent_it_is_sgd_with_momentum(
    steps: list[torch.Tensor], momentum: float, nesterov: bool
) -> None:
    """Without masking; torch writes Nesterov's form with another buffer, and makes the same steps."""
    feedback = MomentumCorrection(Identity(), NUMEL, momentum, nesterov=nesterov, masking=False)
    x, reference = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    optimizer = torch.optim.SGD([reference], lr=1.0, momentum=momentum, nesterov=nesterov and momentum > 0)
    for gradient in steps:
        x -= feedback.compress(gradient).densify()
        reference.grad = gradient.double()
        optimizer.step()
    size = float(torch.stack(steps).abs().max()) * len(steps) / (1 - momentum)
    torch.testing.assert_close(x, reference, rtol=0, atol=1e-6 * size)


@given(runs)
def test_with_everything_sent_and_masked_no_momentum_is_left(steps: list[torch.Tensor]) -> None:
    """Each coordinate forgets its velocity as soon as it is sent: plain SGD."""
    feedback = MomentumCorrection(Identity(), NUMEL, 0.9)
    for gradient in steps:
        assert torch.equal(feedback.compress(gradient).densify(), gradient)


@given(compressors, integer_runs, st.booleans())
def test_without_masking_it_conserves_velocities(
    compressor: Compressor, steps: list[torch.Tensor], nesterov: bool
) -> None:
    """Σ sent + residual = Σ what an uncompressed run would have moved by; exact with momentum 1/2 on integers."""
    feedback = MomentumCorrection(compressor, NUMEL, 0.5, nesterov=nesterov, masking=False)
    whole = MomentumCorrection(Identity(), NUMEL, 0.5, nesterov=nesterov, masking=False)
    sent, moved = torch.zeros(NUMEL), torch.zeros(NUMEL)
    for gradient in steps:
        sent += feedback.compress(gradient).densify()
        moved += whole.compress(gradient).densify()
    assert torch.equal(sent + feedback.residual, moved)


@pytest.mark.parametrize("masking", [True, False])
def test_it_does_not_conserve_its_input_and_says_so(masking: bool) -> None:
    """Put in 1, get out more."""
    feedback = MomentumCorrection(HardThreshold(1.5), 1, 0.5, masking=masking)
    assert not feedback.guarantee.conserves
    sent = sum(feedback.compress(torch.tensor([gradient])).densify().item() for gradient in [1.0, 0.0, 0.0, 0.0])
    assert sent + feedback.residual.item() > 1.0


@given(compressors, gradients)
def test_gradient_is_not_modified_and_not_kept(compressor: Compressor, gradient: torch.Tensor) -> None:
    """The caller may reuse its buffer, and what was sent does not change afterwards."""
    feedback = MomentumCorrection(compressor, NUMEL)
    before = gradient.clone()
    sent = feedback.compress(gradient)
    assert torch.equal(gradient, before)
    dense, velocity = sent.densify().clone(), feedback.velocity.clone()
    gradient.fill_(7.0)
    assert torch.equal(feedback.velocity, velocity)
    feedback.compress(gradient)
    assert torch.equal(sent.densify(), dense)


def test_it_stands_before_plain_sgd_on_gradients() -> None:
    """It has the momentum, and works on gradients."""
    assert MomentumCorrection(TopK(0.5), 1).momentum == 0.9
    assert MomentumCorrection.runs_in == {"gradient", "hook", "simulator"}


def test_description_is_the_call_without_defaults() -> None:
    """Neither numel nor device."""
    assert MomentumCorrection(TopK(0.5), NUMEL).describe() == "MomentumCorrection(TopK(0.5))"
    assert (
        MomentumCorrection(TopK(0.5), NUMEL, 0, nesterov=True, masking=False).describe()
        == "MomentumCorrection(TopK(0.5), momentum=0.0, nesterov=True, masking=False)"
    )


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan"), float("inf")])
def test_momentum_outside_its_range_is_refused(momentum: float) -> None:
    """A velocity that does not fade diverges."""
    with pytest.raises(ConfigurationError, match=r"momentum must be in \[0, 1\)"):
        MomentumCorrection(TopK(0.5), NUMEL, momentum)


def test_negative_numel_is_refused() -> None:
    """A vector has a length."""
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        MomentumCorrection(TopK(0.5), -1)


def test_what_is_no_compressor_is_refused() -> None:
    """A number, and a feedback: that goes around compressors."""
    for wrong in (3, ErrorFeedback(TopK(0.5), 2)):
        with pytest.raises(ConfigurationError, match="takes compressors, not a"):
            MomentumCorrection(cast("Any", wrong), 2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradient_that_is_refused_changes_nothing(nesterov: bool) -> None:
    """Another length, NaN, and a velocity that outgrows float32."""
    feedback = MomentumCorrection(HardThreshold(1e38), 2, nesterov=nesterov)
    feedback.compress(torch.tensor([0.0, 5e37]))
    velocity, residual = feedback.velocity.clone(), feedback.residual.clone()
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3))
    for bad in [float("nan"), 3.4e38]:
        with pytest.raises(NonFiniteGradientError, match=r"has 1 non-finite of 2 elements, .* at index 1"):
            feedback.compress(torch.tensor([1.0, bad]))
    assert torch.equal(feedback.velocity, velocity)
    assert torch.equal(feedback.residual, residual)


def test_state_survives_a_safe_file() -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    original, restored = (MomentumCorrection(TopK(0.3), NUMEL) for _ in range(2))
    original.compress(torch.linspace(-1, 2, NUMEL))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    gradient = torch.linspace(2, -1, NUMEL)
    assert restored.compress(gradient).equals(original.compress(gradient))
    assert torch.equal(restored.residual, original.residual)
    assert torch.equal(restored.velocity, original.velocity)


def test_state_is_a_copy() -> None:
    """Later steps don't reach into a state that was taken, nor into one that was loaded."""
    feedback = MomentumCorrection(HardThreshold(9.0), 1, masking=False)
    feedback.compress(torch.tensor([1.0]))
    state = feedback.state_dict()
    feedback.compress(torch.tensor([1.0]))
    feedback.load_state_dict(state)
    feedback.compress(torch.tensor([20.0]))
    assert state["velocity"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            MomentumCorrection(TopK(0.3), 2, 0.5).state_dict(),
            r"belongs to MomentumCorrection\(TopK\(0.3\), momentum=0.5\), this is MomentumCorrection\(TopK\(0.3\)\)",
        ),
        (ErrorFeedback(TopK(0.3), 2).state_dict(), r"belongs to ErrorFeedback\(TopK\(0.3\)\), this is Momentum"),
        (MomentumCorrection(TopK(0.3), 3).state_dict(), r"shape \(3,\), expected torch.float32 of shape \(2,\)"),
        ({}, "not a state of MomentumCorrection"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = MomentumCorrection(TopK(0.3), 2)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert feedback.residual.tolist() == [1.0, 0.0]
    assert feedback.velocity.tolist() == [1.0, 0.0]
