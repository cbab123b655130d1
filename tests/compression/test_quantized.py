"""Sparsify, then quantise; and what every quantizer keeps, alone as well as in here."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.compression.base import FIRST_ROUND, Quantizer, Round, Sparsifier
from thresher.compression.blockwise import Blockwise8Bit
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.float_rounding import BFloat16, Float16
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.integer_rounding import IntegerRounding
from thresher.compression.one_bit import OneBit
from thresher.compression.qsgd import QSGD
from thresher.compression.quantized import Quantized
from thresher.compression.scaled_sign import ScaledSign
from thresher.compression.stochastic_rounding import StochasticRounding
from thresher.compression.tern_grad import TernGrad
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import Seeded, SparseGradient

NUMEL = 8
QUANTIZERS: list[Quantizer] = [
    StochasticRounding(0.25),
    IntegerRounding(4.0),
    QSGD(),
    QSGD(levels=1, bucket=3),
    TernGrad(),
    TernGrad(clip=None),
    ScaledSign(),
    OneBit(),
    BFloat16(),
    Float16(),
    Blockwise8Bit(),
    Blockwise8Bit(block=3),
]
SPARSIFIERS: list[Sparsifier] = [Identity(), HardThreshold(0.7), HardThreshold(0.0), TopK(0.4)]

each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.describe())
sparsifiers = st.sampled_from(SPARSIFIERS)
each_sparsifier = pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=lambda sparsifier: sparsifier.describe())
coordinates = st.floats(-100, 100, width=32).map(lambda value: 0.0 if abs(value) < 1e-30 else value)
gradients = st.lists(coordinates | st.sampled_from([0.0, 0.7, -0.7]), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)


@pytest.mark.parametrize("form", [lambda quantizer: quantizer, lambda quantizer: Quantized(TopK(0.5), quantizer)])
@each_quantizer
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_coordinate_is_refused_by_name(form: Any, quantizer: Quantizer, value: float) -> None:
    """NaN has no nearest level, so nothing is sent; the index is that in the whole gradient."""
    gradient = torch.ones(NUMEL)
    gradient[5] = value
    with pytest.raises(NonFiniteGradientError, match=r"1 non-finite of 8 elements, .* at index 5"):
        form(quantizer).compress(gradient)


@each_quantizer
@pytest.mark.parametrize("gradient", [torch.zeros(3, dtype=torch.float64), torch.zeros(1, 3)])
def test_other_shapes_and_dtypes_are_refused(quantizer: Quantizer, gradient: torch.Tensor) -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        quantizer.compress(gradient)


@each_sparsifier
@each_quantizer
def test_nothing_and_zeros_are_vectors_too(sparsifier: Sparsifier, quantizer: Quantizer) -> None:
    """A vector without elements, and one without anything in it, quantised alone or after a sparsifier."""
    for method in (quantizer, Quantized(sparsifier, quantizer)):
        assert method.compress(torch.empty(0)).count == 0
        assert not method.compress(torch.zeros(5)).densify().any()


@each_quantizer
@settings(max_examples=20)
@given(gradient=gradients, step=st.integers(0, 50))
def test_message_is_valid_and_a_function_of_its_input(quantizer: Quantizer, gradient: torch.Tensor, step: int) -> None:
    """Twice the same, in order, with the input as it was and no memory shared with it."""
    before = gradient.clone()
    sent = quantizer.compress(gradient, Round(step))
    sent.validate()
    assert sent.numel == NUMEL
    assert sent.equals(quantizer.compress(gradient, Round(step)))
    gradient.fill_(7.0)
    assert sent.equals(quantizer.compress(before, Round(step)))


@each_quantizer
def test_generators_of_the_user_are_not_touched(quantizer: Quantizer) -> None:
    """Neither torch's nor numpy's nor Python's."""
    torch.manual_seed(0)
    states = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002
    quantizer.compress(torch.linspace(-1.0, 1.0, 100), Round(3))
    assert [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())] == states  # noqa: NPY002


@each_quantizer
@settings(max_examples=20)
@given(sparsifier=sparsifiers, steps=st.lists(gradients, min_size=1, max_size=5))
def test_feedback_conserves_to_float32(quantizer: Quantizer, sparsifier: Sparsifier, steps: list[torch.Tensor]) -> None:
    """Law 1 for every pair: Σ sent + residual = Σ input, within what the float32 sums lose."""
    method = Quantized(sparsifier, quantizer)
    assert method.guarantee.conserves
    feedback, sent, slack = ErrorFeedback(method, NUMEL), torch.zeros(NUMEL).double(), 0.0
    for step, gradient in enumerate(steps):
        slack += float((feedback.residual.abs() + gradient.abs()).max())  # what is added up, and then ...
        values = feedback.compress(gradient, Round(step)).densify().double()
        slack += float((feedback.residual.abs() + values.abs()).max())  # ... taken apart in float32
        sent += values
    lost = sent + feedback.residual - torch.stack(steps).double().sum(dim=0)
    assert float(lost.abs().max()) <= slack * torch.finfo(torch.float32).eps


@given(
    sparsifier=sparsifiers,
    steps=st.lists(st.lists(st.integers(-99, 99), min_size=NUMEL, max_size=NUMEL), min_size=1, max_size=5),
)
def test_feedback_conserves_exactly_on_a_grid(sparsifier: Sparsifier, steps: list[list[int]]) -> None:
    """Law 1 on multiples of 1/16, sent as multiples of 1/4: to the bit."""
    inputs = torch.tensor(steps) / 16
    for quantizer in (StochasticRounding(0.25), IntegerRounding(4.0)):
        feedback = ErrorFeedback(Quantized(sparsifier, quantizer), NUMEL)
        messages = [feedback.compress(gradient, Round(step)).densify() for step, gradient in enumerate(inputs)]
        assert torch.equal(torch.stack(messages).sum(dim=0) + feedback.residual, inputs.sum(dim=0))


@each_quantizer
@settings(max_examples=20)
@given(sparsifier=sparsifiers, gradient=gradients)
def test_it_is_the_quantizer_on_what_the_sparsifier_keeps(
    quantizer: Quantizer, sparsifier: Sparsifier, gradient: torch.Tensor
) -> None:
    """The values kept, as one vector, in the same round; put back where they were; levels included."""
    at = Round(step=3, tensor=2)
    sent = Quantized(sparsifier, quantizer).compress(gradient, at)
    sent.validate()
    kept = sparsifier.compress(gradient, at)
    rounded = quantizer.compress(kept.values, at)
    assert torch.equal(sent.indices, kept.indices[rounded.indices])
    assert torch.equal(sent.values, rounded.values)
    assert sent.numel == NUMEL
    assert (sent.levels is None) == (rounded.levels is None)
    if sent.levels is not None:
        begins = torch.cat([torch.zeros(1, dtype=torch.int64), sent.levels.ends])
        scales = sent.levels.scales.repeat_interleave(begins.diff())
        assert torch.equal(scales * sent.levels.codes.float(), sent.values)


def test_identity_adds_nothing() -> None:
    """Everything kept and rounded is the quantizer alone."""
    gradient = torch.linspace(-1.0, 1.0, 9)
    for quantizer in QUANTIZERS:
        assert Quantized(Identity(), quantizer).compress(gradient).equals(quantizer.compress(gradient))


@given(
    gradients,
    st.floats(0.0, 50.0),
    st.sampled_from([0.25, 1.0, 2.0]),
    st.sampled_from([0.25, 1.0, 8.0]),
    st.integers(0, 20),
)
def test_absolute_bound_of_a_threshold_and_a_grid(
    gradient: torch.Tensor, threshold: float, step_size: float, scale: float, step: int
) -> None:
    """‖x - C(x)‖² ≤ γ²κ² for κ² = d · max(λ, ε)², in each coordinate and whatever is drawn."""
    at = Round(step, scale=scale)
    for quantizer, error in (
        (StochasticRounding(step_size), step_size),
        (IntegerRounding(1 / step_size), step_size / 2),
    ):
        method = Quantized(HardThreshold(threshold), quantizer)
        kappa = method.guarantee.kappa
        assert kappa is not None
        assert kappa(NUMEL) == max(threshold, error) * NUMEL**0.5
        lost = method.compress(gradient, at).densify().double() - gradient.double()
        assert float(lost.abs().max()) <= scale * max(threshold, error)
        assert float(lost.square().sum()) <= scale**2 * kappa(NUMEL) ** 2 * (1 + 1e-12)


@given(gradients)
def test_relative_bound_is_the_product(gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² ≤ (1 - δ_S δ_Q)‖x‖² for Top-k with every deterministic quantizer that has a δ."""
    for quantizer in (ScaledSign(), OneBit(), BFloat16(), Blockwise8Bit(), Blockwise8Bit(2)):
        method = Quantized(TopK(0.4), quantizer)
        delta, of_quantizer = method.guarantee.delta, quantizer.guarantee.delta
        assert delta is not None
        assert of_quantizer is not None
        assert delta(NUMEL) == 3 / 8 * of_quantizer(NUMEL)
        energy = float(gradient.double().square().sum())
        error = float((gradient.double() - method.compress(gradient).densify()).square().sum())
        assert error <= (1 - delta(NUMEL)) * energy * (1 + 1e-9)


def test_relative_bound_holds_on_average_over_the_draws() -> None:
    """For QSGD in buckets after Top-k: the mean error of 500 rounds is below the bound."""
    gradient, method = (
        torch.tensor([3.0, -0.2, 1.0, 0.7, -0.9, 0.1, 0.0, -2.0]),
        Quantized(TopK(0.5), QSGD(3, bucket=4)),
    )
    delta = method.guarantee.delta
    assert delta is not None
    sent = torch.stack([method.compress(gradient, Round(step)).densify() for step in range(500)])
    error = float((sent - gradient).square().sum(dim=1).mean())
    assert error <= (1 - delta(NUMEL)) * float(gradient.square().sum())


def test_bounds_need_both() -> None:
    """A bound on one kind of error is none on the other."""
    mixed = [
        Quantized(TopK(0.1), StochasticRounding(0.5)),  # relative, absolute
        Quantized(HardThreshold(0.5), ScaledSign()),  # absolute, relative
        Quantized(HardThreshold(), StochasticRounding(0.5)),  # the threshold is the run's
        Quantized(TopK(0.1), Float16()),  # neither
    ]
    for method in mixed:
        guarantee = method.guarantee
        assert (guarantee.kappa, guarantee.delta, guarantee.omega) == (None, None, None)


def test_unbiased_where_nothing_is_dropped() -> None:
    """Among sparsifiers, which leave values as they are, only the identity is unbiased: then ω is the quantizer's."""
    omega, alone = Quantized(Identity(), QSGD(4)).guarantee.omega, QSGD(4).guarantee.omega
    assert omega is not None
    assert alone is not None
    assert omega(100) == pytest.approx(alone(100))
    assert Quantized(TopK(0.5), QSGD(4)).guarantee.omega is None


class SeededHalf(Sparsifier):
    """Half of the coordinates, by a key."""

    @property
    def guarantee(self) -> Any:
        return Identity().guarantee

    def describe(self) -> str:
        return "SeededHalf()"

    def compress(self, gradient: torch.Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        count = gradient.numel() // 2
        indices = torch.from_numpy(seeded_indices(gradient.numel(), count, key=9))
        seeds = (Seeded(0, gradient.numel(), count, 9),)
        return SparseGradient(indices, gradient[indices], gradient.numel(), seeds=seeds)


def test_seeds_stand_for_all_that_were_chosen_or_are_not_sent() -> None:
    """A coordinate that rounds away is missing from the indices, so they follow from the key no longer."""
    method, gradient = Quantized(SeededHalf(), IntegerRounding(1.0)), torch.full((NUMEL,), 2.0)
    assert method.compress(gradient).seeds == (Seeded(0, NUMEL, NUMEL // 2, 9),)
    gradient[SeededHalf().compress(gradient).indices[0]] = 0.1
    assert method.compress(gradient).seeds == ()
    assert method.compress(gradient).count == NUMEL // 2 - 1


@pytest.mark.parametrize("wrong", [ScaledSign(), Quantized(TopK(0.5), QSGD()), "TopK(0.5)", None])
def test_only_a_sparsifier_chooses(wrong: Any) -> None:
    """Values that are rounded already would be rounded twice."""
    with pytest.raises(ConfigurationError, match=r"chooses with a sparsifier such as .* is none"):
        Quantized(wrong, QSGD())


@pytest.mark.parametrize(("wrong", "name"), [(HardThreshold(0.5), "HardThreshold(0.5)"), (8, "8")])
def test_only_a_quantizer_rounds(wrong: Any, name: str) -> None:
    """And what was given is named."""
    with pytest.raises(ConfigurationError) as refused:
        Quantized(TopK(0.5), wrong)
    assert f"{name} is none: give it as the first argument" in str(refused.value)


class Counting(SeededHalf):
    """A sparsifier with a state: how often it was asked."""

    def __init__(self) -> None:
        self.calls = torch.zeros(1, dtype=torch.int64)

    def describe(self) -> str:
        return "Counting()"

    def compress(self, gradient: torch.Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        self.calls += 1
        return super().compress(gradient, round)

    def state_dict(self) -> dict[str, Any]:
        return {"method": "Counting()", "calls": self.calls.clone()}

    def load_state_dict(self, state: Any) -> None:
        if set(state) != {"method", "calls"}:
            raise ConfigurationError("not a state of Counting()")
        self.calls.copy_(state["calls"])


def test_state_is_that_of_both() -> None:
    """Taken and loaded, a sparsifier with a memory goes on where it was."""
    original, restored = Quantized(Counting(), QSGD()), Quantized(Counting(), QSGD())
    original.compress(torch.ones(4))
    state = original.state_dict()
    original.compress(torch.ones(4))
    restored.load_state_dict(state)
    assert restored.state_dict()["sparsifier"]["calls"].tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "Quantized(Counting(), OneBit())"}, r"belongs to Quantized\(Counting\(\), OneBit\(\)\), this is"),
        ({"quantizer": {"method": "OneBit()"}}, r"belongs to OneBit\(\), this is QSGD\(\)"),
        ({"sparsifier": {}}, r"not a state of Counting\(\)"),
        ({"extra": 1}, "expected the keys"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    """The difference is named."""
    method = Quantized(Counting(), QSGD())
    method.compress(torch.ones(4))
    state = Quantized(Counting(), QSGD()).state_dict() | change
    with pytest.raises(ConfigurationError, match=message):
        method.load_state_dict(state)
    assert method.state_dict()["sparsifier"]["calls"].tolist() == [1]


def test_description_is_the_call_that_makes_it() -> None:
    """With the settings of both."""
    method = Quantized(TopK(0.01), QSGD(levels=7, bucket=512))
    assert method.describe() == "Quantized(TopK(0.01), QSGD(levels=7, bucket=512))"
    assert len({quantizer.describe() for quantizer in QUANTIZERS}) == len(QUANTIZERS)
