"""Error feedback: nothing is lost, nothing is half done."""

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import Compressor, ErrorFeedback, Guarantee, HardThreshold, Identity, TopK
from thresher.compression.base import FIRST_ROUND, Quantizer, Round
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient

NUMEL = 6
compressors = st.one_of(
    st.just(Identity()),
    st.floats(0.0, 10.0).map(HardThreshold),
    st.floats(0.1, 1.0).map(TopK),
)
gradients = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
runs = st.lists(gradients, min_size=1, max_size=8)


class Coarse(Quantizer):
    """Sends every value rounded to a multiple of 1/4: what the rounding takes must be fed back too."""

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(conserves=True)

    def describe(self) -> str:
        return "Coarse()"

    def compress(self, gradient: torch.Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        indices = torch.arange(1, gradient.numel())
        return SparseGradient(indices, (gradient[indices] * 4).round() / 4, gradient.numel())


class Forgetful(Coarse):
    """Says that it does not conserve."""

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(conserves=False)


@given(compressors, runs)
def test_each_step_splits_gradient_plus_residual(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """To the bit, and on disjoint supports: sent + residual_after == gradient + residual_before."""
    feedback = ErrorFeedback(compressor, NUMEL)
    for gradient in steps:
        corrected = gradient + feedback.residual
        sent = feedback.compress(gradient)
        assert torch.equal(sent.densify() + feedback.residual, corrected)
        assert not feedback.residual[sent.indices].any()
        assert sent.equals(compressor.compress(corrected))


@given(compressors, runs)
def test_conservation_in_float32(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """Law 1: Σ sent + residual = Σ input within n·eps·Σ|g|."""
    feedback = ErrorFeedback(compressor, NUMEL)
    sent = sum((feedback.compress(gradient).densify().double() for gradient in steps), torch.zeros(NUMEL).double())
    inputs = torch.stack(steps).double()
    bound = len(steps) * torch.finfo(torch.float32).eps * inputs.abs().sum(dim=0)
    assert ((sent + feedback.residual - inputs.sum(dim=0)).abs() <= bound).all()


@given(st.lists(st.lists(st.integers(-64, 64), min_size=NUMEL, max_size=NUMEL), min_size=1, max_size=8))
def test_what_a_quantizer_rounds_off_is_fed_back(steps: list[list[int]]) -> None:
    """Law 1 for values that change on their way: exact on multiples of 1/8 sent as multiples of 1/4."""
    feedback = ErrorFeedback(Coarse(), NUMEL)
    inputs = torch.tensor(steps) / 8
    sent = sum((feedback.compress(gradient).densify() for gradient in inputs), torch.zeros(NUMEL))
    assert torch.equal(sent + feedback.residual, inputs.sum(dim=0))


@given(st.data(), st.integers(1, 4))
def test_virtual_iterate(data: st.DataObject, workers: int) -> None:
    """Law 2 (Lemma 10 of arXiv:2108.00951): Σ sent means + mean residual = Σ mean inputs; exact on integers."""
    integers = st.lists(st.integers(-8, 8), min_size=NUMEL, max_size=NUMEL).map(lambda g: torch.tensor(g).float())
    feedbacks = [ErrorFeedback(HardThreshold(5.0), NUMEL) for _ in range(workers)]
    applied, inputs = torch.zeros(NUMEL), torch.zeros(NUMEL)
    for _ in range(4):
        for feedback in feedbacks:
            gradient = data.draw(integers)
            applied += feedback.compress(gradient).densify()
            inputs += gradient
    # Times the number of workers, so that integers stay integers.
    assert torch.equal(applied + sum(feedback.residual for feedback in feedbacks), inputs)


@given(compressors, gradients)
def test_gradient_is_not_modified_and_not_kept(compressor: Compressor, gradient: torch.Tensor) -> None:
    """The caller may reuse its buffer, and what was sent does not change afterwards."""
    feedback = ErrorFeedback(compressor, NUMEL)
    before = gradient.clone()
    sent = feedback.compress(gradient)
    assert torch.equal(gradient, before)
    dense, residual = sent.densify().clone(), feedback.residual.clone()
    gradient.fill_(7.0)
    assert torch.equal(feedback.residual, residual)
    feedback.compress(gradient)
    assert torch.equal(sent.densify(), dense)


def test_residual_lives_in_one_buffer() -> None:
    """No step replaces the residual by a new tensor."""
    feedback = ErrorFeedback(HardThreshold(1.0), NUMEL)
    residual = feedback.residual
    for _ in range(3):
        feedback.compress(torch.rand(NUMEL))
    assert feedback.residual is residual


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.zeros(NUMEL + 1), "expected a vector of numel 6, found 7"),
        (torch.zeros(2, 3), "one-dimensional float32"),
        (torch.zeros(NUMEL, dtype=torch.bfloat16), "one-dimensional float32"),
        (torch.zeros(NUMEL, device="meta"), "expected a vector on cpu, found one on meta"),
    ],
)
def test_gradient_that_does_not_fit_changes_nothing(gradient: torch.Tensor, message: str) -> None:
    """Shape, dtype and device are checked before the residual is touched."""
    feedback = ErrorFeedback(HardThreshold(1.0), NUMEL)
    feedback.compress(torch.full((NUMEL,), 0.5))
    with pytest.raises(ConfigurationError, match=message):
        feedback.compress(gradient)
    assert feedback.residual.tolist() == [0.5] * NUMEL


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_is_named_and_changes_nothing(value: float) -> None:
    """The first bad index and the count, and the step never happened."""
    feedback = ErrorFeedback(HardThreshold(1.0), NUMEL)
    feedback.compress(torch.full((NUMEL,), 0.5))
    with pytest.raises(NonFiniteGradientError, match=r"2 non-finite of 6 elements, .* at index 2"):
        feedback.compress(torch.tensor([1.0, 1.0, value, 1.0, value, 1.0]))
    assert feedback.residual.tolist() == [0.5] * NUMEL


def test_state_survives_a_safe_file() -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    torch.manual_seed(0)
    original, restored = (ErrorFeedback(TopK(0.3), NUMEL) for _ in range(2))
    original.compress(torch.randn(NUMEL))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    gradient = torch.randn(NUMEL)
    assert restored.compress(gradient).equals(original.compress(gradient))
    assert torch.equal(restored.residual, original.residual)


def test_state_is_a_copy() -> None:
    """Later steps don't reach into a state that was taken, nor into one that was loaded."""
    feedback = ErrorFeedback(HardThreshold(9.0), 1)
    feedback.compress(torch.tensor([1.0]))
    state = feedback.state_dict()
    feedback.compress(torch.tensor([1.0]))
    feedback.load_state_dict(state)
    feedback.compress(torch.tensor([2.0]))
    assert state["residual"].tolist() == [1.0]
    assert feedback.residual.tolist() == [3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressor": {"method": "TopK(0.5)"}}, r"belongs to TopK\(0.5\), this is HardThreshold\(9.0\)"),
        ({"residual": torch.zeros(3)}, r"of shape \(3,\), expected torch.float32 of shape \(2,\)"),
        ({"residual": torch.zeros(2, dtype=torch.float64)}, "is torch.float64 of shape"),
        ({"residual": torch.zeros(1, 2)}, r"of shape \(1, 2\), expected"),
        ({"residual": [0.0, 0.0]}, "is a list, not a tensor"),
        ({"extra": 1}, "found .*'extra'"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = ErrorFeedback(HardThreshold(9.0), 2)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(feedback.state_dict() | change)
    assert feedback.residual.tolist() == [1.0, 2.0]


def test_state_without_its_parts_is_refused() -> None:
    """An empty mapping is no state."""
    with pytest.raises(ConfigurationError, match="expected the keys"):
        ErrorFeedback(Identity(), 2).load_state_dict({})


def test_compressor_that_does_not_conserve_is_refused() -> None:
    """Error feedback is no use to one that says so."""
    with pytest.raises(ConfigurationError, match="does not conserve"):
        ErrorFeedback(Forgetful(), 2)


def test_negative_numel_is_refused() -> None:
    """A vector has a length."""
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        ErrorFeedback(Identity(), -1)


@given(st.floats(0.0, 10.0), runs)
def test_one_pass_is_what_three_steps_are(threshold: float, steps: list[torch.Tensor]) -> None:
    """The hard threshold's single pass gives the bits of adding, compressing and subtracting one after the other."""
    feedback, residual = ErrorFeedback(HardThreshold(threshold), NUMEL), torch.zeros(NUMEL)
    for gradient in steps:
        residual += gradient
        sent = HardThreshold(threshold).compress(residual)
        residual[sent.indices] -= sent.values
        assert feedback.compress(gradient).equals(sent)
        assert torch.equal(feedback.residual.view(torch.int32), residual.view(torch.int32))


@given(compressors, runs)
def test_finite_gradients_need_no_second_look(compressor: Compressor, steps: list[torch.Tensor]) -> None:
    """A caller that has looked itself gets the same from the method that does not look."""
    looking, trusting = ErrorFeedback(compressor, NUMEL), ErrorFeedback(compressor, NUMEL)
    for gradient in steps:
        assert trusting.compress_finite(gradient).equals(looking.compress(gradient))
        assert torch.equal(trusting.residual, looking.residual)


def test_nan_that_is_let_in_is_sent_and_seen() -> None:
    """A caller that has not looked after all loses nothing in silence: NaN goes out, and does not stay."""
    feedback = ErrorFeedback(HardThreshold(1.0), 2)
    sent = feedback.compress_finite(torch.tensor([float("nan"), 0.5]))
    assert sent.indices.tolist() == [0]
    assert bool(sent.values.isnan().all())
    assert feedback.residual.tolist() == [0.0, 0.5]


def test_run_without_a_threshold_changes_nothing() -> None:
    """Where neither compressor nor round has a threshold, the gradient is refused before it is added."""
    feedback = ErrorFeedback(HardThreshold(), 2)
    with pytest.raises(ConfigurationError, match="the run has none"):
        feedback.compress(torch.ones(2))
    assert feedback.residual.tolist() == [0.0, 0.0]
