"""Error reset: nothing is lost between two resets, and a reset each round is SAEF."""

import io
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import FIRST_ROUND, Compressor, Guarantee, Round
from thresher.compression.detached_error_feedback import DetachedErrorFeedback
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.error_reset import ErrorReset
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.random_k import RandomK
from thresher.compression.sidco import SIDCo
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient

NUMEL = 6
compressors: st.SearchStrategy[Compressor] = st.one_of(
    st.just(Identity()), st.floats(0.0, 10.0).map(HardThreshold), st.floats(0.1, 1.0).map(TopK)
)
updates = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
integers = st.lists(st.integers(-64, 64), min_size=NUMEL, max_size=NUMEL).map(
    lambda update: torch.tensor(update).float()
)


class Forgetful(Compressor):
    """Says that it does not conserve."""

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(conserves=False)

    def compress(self, gradient: torch.Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        return SparseGradient.empty(gradient.numel())

    def describe(self) -> str:
        return "Forgetful()"


@given(compressors, st.none() | compressors, st.integers(1, 4), st.lists(integers, min_size=1, max_size=9))
def test_it_conserves(reset: Compressor, update: Compressor | None, period: int, steps: list[torch.Tensor]) -> None:
    """Law 1, exact on integers, wherever the run stops: Σ sent + residual = Σ input."""
    feedback = ErrorReset(reset, NUMEL, period, update)
    assert feedback.guarantee.conserves
    sent = sum(
        (feedback.compress(moved, Round(step)).densify() for step, moved in enumerate(steps)), torch.zeros(NUMEL)
    )
    assert torch.equal(sent + feedback.residual, torch.stack(steps).sum(dim=0))


@given(compressors, st.lists(updates, min_size=1, max_size=6))
def test_a_reset_in_each_round_is_saef(reset: Compressor, steps: list[torch.Tensor]) -> None:
    """With nothing sent of updates alone: detached error feedback with coefficient 1, to the bit."""
    cser, saef = ErrorReset(reset, NUMEL), DetachedErrorFeedback(reset, NUMEL, 1.0)
    assert cser.detached == saef.detached
    for step, moved in enumerate(steps):
        assert cser.compress(moved, Round(step)).equals(saef.compress(moved, Round(step)))
        assert torch.equal(cser.residual, saef.residual)


@given(compressors, compressors, st.integers(1, 4), st.lists(integers, min_size=1, max_size=9))
def test_each_round_follows_the_algorithm(
    reset: Compressor, update: Compressor, period: int, steps: list[torch.Tensor]
) -> None:
    """C2 of the update; every ``period`` rounds also C1 of the error, rest of the update included."""
    feedback, error = ErrorReset(reset, NUMEL, period, update), torch.zeros(NUMEL)
    for step, moved in enumerate(steps):
        expected = update.compress(moved).densify()
        error += moved - expected
        if (step + 1) % period == 0:
            part = reset.compress(error).densify()
            error -= part
            expected = expected + part
        sent = feedback.compress(moved, Round(step))
        sent.validate()
        assert torch.equal(sent.densify(), expected)
        assert torch.equal(feedback.residual, error)


def test_nothing_is_sent_between_two_resets() -> None:
    """Without a compressor for updates, only the last round of each period speaks."""
    feedback = ErrorReset(Identity(), 1, period=3)
    counts = [feedback.compress(torch.ones(1), Round(step)).count for step in range(6)]
    assert counts == [0, 0, 1, 0, 0, 1]


def test_resets_follow_the_number_of_the_round() -> None:
    """A worker that joins late resets with the others."""
    assert ErrorReset(Identity(), 1, period=3).compress(torch.ones(1), Round(2)).count == 1


def test_a_single_message_keeps_what_the_codec_knows() -> None:
    """If nothing is sent of the update, the message is that of the reset, seeds and all."""
    assert ErrorReset(RandomK(0.5), NUMEL).compress(torch.ones(NUMEL)).seeds


def test_update_is_not_modified() -> None:
    """The caller may reuse its buffer."""
    moved = torch.arange(6.0)
    ErrorReset(TopK(0.5), NUMEL, 1, TopK(0.5)).compress(moved)
    assert torch.equal(moved, torch.arange(6.0))


def test_it_runs_on_finished_updates_at_the_local_model() -> None:
    """The model has moved by all of its own updates: x - residual."""
    assert ErrorReset.runs_in == {"update", "simulator"}
    assert ErrorReset(TopK(0.5), 1).detached == 1.0


def test_description_is_the_call_without_defaults() -> None:
    """Both compressors, and the period."""
    assert ErrorReset(TopK(0.5), NUMEL).describe() == "ErrorReset(TopK(0.5))"
    assert (
        ErrorReset(TopK(0.5), NUMEL, 4, Identity()).describe() == "ErrorReset(TopK(0.5), period=4, update=Identity())"
    )


def test_settings_out_of_range_are_refused() -> None:
    """A period is one round or more, and both compressors conserve."""
    with pytest.raises(ConfigurationError, match="period must be a whole number, at least 1, not 0"):
        ErrorReset(TopK(0.5), 2, 0)
    with pytest.raises(ConfigurationError, match=r"Forgetful\(\) does not conserve"):
        ErrorReset(Forgetful(), 2)
    with pytest.raises(ConfigurationError, match=r"Forgetful\(\) does not conserve"):
        ErrorReset(TopK(0.5), 2, 1, Forgetful())
    with pytest.raises(ConfigurationError, match="numel must not be negative"):
        ErrorReset(TopK(0.5), -1)


def test_what_is_no_compressor_is_refused() -> None:
    """A number, and a feedback: that goes around compressors."""
    for wrong in (3, ErrorFeedback(TopK(0.5), 2)):
        with pytest.raises(ConfigurationError, match="takes compressors, not a"):
            ErrorReset(cast("Any", wrong), 2)


def test_update_that_is_no_update_changes_nothing() -> None:
    """Another length, and NaN, in a round without a reset too."""
    feedback = ErrorReset(Identity(), 2, period=3)
    feedback.compress(torch.ones(2))
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3), Round(1))
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        feedback.compress(torch.tensor([1.0, float("nan")]), Round(1))
    assert feedback.residual.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("update", [None, TopK(0.3), SIDCo(0.3)])
def test_state_survives_a_safe_file(update: Compressor | None) -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    original, restored = (ErrorReset(TopK(0.5), NUMEL, 2, update) for _ in range(2))
    original.compress(torch.linspace(-1, 2, NUMEL), Round(0))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    moved = torch.linspace(2, -1, NUMEL)
    assert restored.compress(moved, Round(1)).equals(original.compress(moved, Round(1)))
    assert torch.equal(restored.residual, original.residual)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            ErrorReset(TopK(0.3), 2, 2).state_dict(),
            r"belongs to ErrorReset\(TopK\(0.3\), period=2\), this is ErrorReset\(TopK\(0.3\), period=2, update=",
        ),
        (
            ErrorReset(TopK(0.3), 3, 2, Identity()).state_dict(),
            r"shape \(3,\), expected torch.float32 of shape \(2,\)",
        ),
        ({}, "not a state of ErrorReset"),
        (
            ErrorReset(TopK(0.3), 2, 2, Identity()).state_dict() | {"update": TopK(0.1).state_dict()},
            r"belongs to TopK\(0.1\), this is Identity\(\)",
        ),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = ErrorReset(TopK(0.3), 2, 2, Identity())
    feedback.compress(torch.tensor([1.0, 2.0]), Round(0))
    before = feedback.residual.clone()
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert torch.equal(feedback.residual, before)


def test_a_state_that_is_refused_leaves_the_compressor_of_updates_alone() -> None:
    """Its part of the state would have fitted; the residual's did not."""
    feedback = ErrorReset(TopK(0.3), 50, 2, SIDCo(0.1))
    for step in range(3):
        feedback.compress(torch.linspace(-1, 2, 50).pow(3), Round(step))
    before = feedback.state_dict()
    with pytest.raises(ConfigurationError, match="belongs to another model"):
        feedback.load_state_dict(ErrorReset(TopK(0.3), 40, 2, SIDCo(0.1)).state_dict())
    assert feedback.state_dict()["update"] == before["update"] != SIDCo(0.1).state_dict()
