"""Accordion: which regime a tensor is in, what it sees, and that it loses nothing when it switches."""

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.accordion import Accordion
from thresher.compression.base import FIRST_ROUND, Compressor, Guarantee, Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.layer_wise import LayerWise
from thresher.compression.layers import Layers
from thresher.compression.random_k import RandomK
from thresher.compression.sidco import SIDCo
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient

SHAPES = [(2, 2), (3,), (0,)]
NUMEL = 7
LOW, HIGH = TopK(0.01), Identity()

integers = st.lists(st.integers(-64, 64), min_size=NUMEL, max_size=NUMEL).map(
    lambda gradient: torch.tensor(gradient).float()
)
runs = st.lists(integers, min_size=1, max_size=12)
schedules = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())


class Forgetful(Compressor):
    """Says that it does not conserve."""

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(conserves=False)

    def compress(self, gradient: torch.Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        return SparseGradient.empty(gradient.numel())

    def describe(self) -> str:
        return "Forgetful()"


def regimes(feedback: Accordion, sizes: list[float]) -> list[bool]:
    """Whether the first tensor was critical in each round, for gradients of these sizes."""
    found = []
    for step, size in enumerate(sizes):
        feedback.compress(torch.full((feedback.residual.numel(),), float(size)), Round(step))
        found.append(bool(feedback.critical[0]))
    return found


@given(runs, schedules)
def test_it_conserves(steps: list[torch.Tensor], schedule: tuple[int, int, bool]) -> None:
    """Law 1, exact on integers, however often it switches: Σ sent + residual = Σ input."""
    steps_per_epoch, every_epochs, first_only = schedule
    feedback = Accordion(LOW, HIGH, SHAPES, steps_per_epoch, every_epochs, 1 if first_only else None)
    assert feedback.guarantee.conserves
    sent = sum(
        (feedback.compress(gradient, Round(step)).densify() for step, gradient in enumerate(steps)), torch.zeros(NUMEL)
    )
    assert torch.equal(sent + feedback.residual, torch.stack(steps).sum(dim=0))


@given(runs, schedules, st.sampled_from([TopK(0.5), HardThreshold(9.0), RandomK(0.5)]))
def test_between_equals_it_is_layer_wise_error_feedback(
    steps: list[torch.Tensor], schedule: tuple[int, int, bool], compressor: Compressor
) -> None:
    """If low and high are the same, the choice can't be seen; to the bit, random draws included."""
    steps_per_epoch, every_epochs, _ = schedule
    feedback = Accordion(compressor, compressor, SHAPES, steps_per_epoch, every_epochs)
    plain = ErrorFeedback(LayerWise(compressor, SHAPES), NUMEL)
    for step, gradient in enumerate(steps):
        before = gradient.clone()
        assert feedback.compress(gradient, Round(step)).equals(plain.compress(gradient, Round(step)))
        assert torch.equal(gradient, before)
        assert torch.equal(feedback.residual, plain.residual)


@given(runs, schedules, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_regimes_follow_the_rule(steps: list[torch.Tensor], schedule: tuple[int, int, bool], threshold: float) -> None:
    """The rule, written out for each tensor: |N_before - N| / N_before ≥ threshold, of the window's sum."""
    steps_per_epoch, every_epochs, first_only = schedule
    window = 1 if first_only else steps_per_epoch
    feedback = Accordion(LOW, HIGH, SHAPES, steps_per_epoch, every_epochs, window, threshold)
    expected, norms = [True] * len(SHAPES), [0.0] * len(SHAPES)
    for step, gradient in enumerate(steps):
        period = steps_per_epoch * every_epochs
        if step % period == window - 1:
            total = torch.stack(steps[step - window + 1 : step + 1]).sum(dim=0).double()
            now = [float(piece.norm()) for piece in torch.split(total, [4, 3, 0])]
            expected = [
                before == 0.0 or abs(before - norm) / before >= threshold
                for before, norm in zip(norms, now, strict=True)
            ]
            norms = now
        sent = feedback.compress(gradient, Round(step))
        assert feedback.critical.tolist() == expected
        assert sent.slice(0, 4).count == (4 if expected[0] else 1)
        assert sent.slice(4, 7).count == (3 if expected[1] else 1)


def test_it_is_critical_at_first_calm_when_nothing_changes_and_critical_again() -> None:
    """One check a step; a change by exactly the threshold counts, in both directions."""
    feedback = Accordion(LOW, HIGH, [(4,)], 1, 1)
    assert regimes(feedback, [1.0, 1.0, 1.5, 1.5, 0.75, 0.5, 0.0, 0.0]) == [
        True,  # the first
        False,
        True,
        False,
        True,
        False,
        True,
        True,  # after a norm of zero
    ]


def test_it_checks_every_so_many_epochs() -> None:
    """What happens between two windows is not looked at; the regime stays."""
    feedback = Accordion(LOW, HIGH, [(4,)], steps_per_epoch=2, every_epochs=2)
    assert regimes(feedback, [1, 1, 9, 9, 1, 1, 9, 9, 9, 9, 1]) == [True] * 5 + [False] * 4 + [True] * 2


def test_it_sees_raw_gradients_not_residuals() -> None:
    """The residual grows while the gradient stays: a calm regime."""
    feedback = Accordion(HardThreshold(100.0), HardThreshold(50.0), [(1, 1)], 1, 1)
    assert regimes(feedback, [1.0] * 5) == [True] + [False] * 4
    assert feedback.residual.item() == 5.0


def test_gradients_are_summed_before_their_norm_is_taken() -> None:
    """Two that cancel leave nothing, and after nothing everything is critical."""
    feedback = Accordion(LOW, HIGH, [(4,)], steps_per_epoch=2, every_epochs=1)
    assert regimes(feedback, [1, 1, 1, 1, 1, -1, 1, 1]) == [True] * 3 + [False] * 2 + [True] * 3


def test_a_falling_learning_rate_makes_all_critical_until_the_next_check() -> None:
    """Seen in the round's rate; a rising one changes nothing."""
    feedback = Accordion(LOW, HIGH, [(4,), (2,)], steps_per_epoch=2, every_epochs=1)
    found = []
    for step, rate in enumerate([0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1]):
        feedback.compress(torch.ones(6), Round(step, rate=rate))
        found.append(feedback.critical.tolist())
    assert found == [[True] * 2] * 3 + [[False] * 2] * 2 + [[True] * 2] * 2 + [[False] * 2]


def test_description_is_the_call_without_defaults() -> None:
    """Neither shapes nor device."""
    assert Accordion(LOW, HIGH, SHAPES, 98).describe() == "Accordion(TopK(0.01), Identity(), 98)"
    assert Accordion(LOW, HIGH, SHAPES, 98, 5, 1, 1).describe() == (
        "Accordion(TopK(0.01), Identity(), 98, every_epochs=5, window=1, threshold=1.0)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number, at least 1, not 0"),
        ({"every_epochs": 0}, "every_epochs must be a whole number, at least 1, not 0"),
        ({"window": 0}, "window must be a whole number, from 1 to 3, not 0"),
        ({"window": 4}, "window must be a whole number, from 1 to 3, not 4"),
        ({"threshold": -0.1}, "threshold must be a finite number >= 0"),
        ({"threshold": float("nan")}, "threshold must be a finite number >= 0"),
        ({"low": Forgetful()}, "does not conserve"),
        ({"high": Forgetful()}, "does not conserve"),
        ({"low": "TopK"}, "takes compressors, not a str"),
        ({"high": Layers(HIGH, {}, SHAPES, ["a", "b", "c"])}, "is bound to the tensors of a model"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """Each says what is wrong with it."""
    usual: dict[str, Any] = {"low": LOW, "high": HIGH, "shapes": SHAPES, "steps_per_epoch": 3}
    with pytest.raises(ConfigurationError, match=message):
        Accordion(**usual | settings)


def test_gradient_that_is_refused_changes_nothing() -> None:
    """Another length, and NaN, which would stay in the sum."""
    feedback = Accordion(LOW, HIGH, [(2,)], steps_per_epoch=2, every_epochs=1)
    for step in range(3):
        feedback.compress(torch.tensor([1.0, 2.0]), Round(step))
    residual = feedback.residual.clone()
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3), Round(3))
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        feedback.compress(torch.tensor([1.0, float("nan")]), Round(3))
    assert torch.equal(feedback.residual, residual)
    feedback.compress(torch.tensor([1.0, 2.0]), Round(3))
    assert feedback.critical.tolist() == [False]


@pytest.mark.parametrize("taken_after", [1, 2, 3, 4, 8])
def test_state_survives_a_safe_file(taken_after: int) -> None:
    """Saved in or behind a window, read with weights_only and loaded, all further steps are the same to the bit."""
    original, restored = (Accordion(SIDCo(0.3), RandomK(0.6), SHAPES, 3, 1, 2) for _ in range(2))
    steps = [torch.linspace(-1, 1 + step % 4, NUMEL) for step in range(12)]
    for step in range(taken_after):
        original.compress(steps[step], Round(step, rate=1 / (1 + step // 4)))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for step in range(taken_after, 12):
        now = Round(step, rate=1 / (1 + step // 4))
        assert restored.compress(steps[step], now).equals(original.compress(steps[step], now))
        assert torch.equal(restored.residual, original.residual)
        assert torch.equal(restored.critical, original.critical)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            Accordion(LOW, HIGH, [(2,)], 2).state_dict(),
            r"belongs to Accordion\(TopK\(0.01\), Identity\(\), 2\), this is Accordion\(.*, 3\)",
        ),
        (Accordion(LOW, HIGH, [(3,)], 3).state_dict(), r"shape \(3,\), expected torch.float32 of shape \(2,\)"),
        (Accordion(LOW, HIGH, [(1,), (1,)], 3).state_dict(), r"norms .* shape \(2,\), expected .* shape \(1,\)"),
        ({}, "not a state of Accordion"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = Accordion(LOW, HIGH, [(2,)], 3)
    feedback.critical.fill_(False)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert feedback.residual.tolist() == [1.0, 0.0]
    assert feedback.critical.tolist() == [False]
