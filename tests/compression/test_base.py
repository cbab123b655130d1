"""The contract: what every compressor of the package keeps, and the checks they share."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import (
    Compressor,
    ErrorFeedback,
    HardThreshold,
    Identity,
    LayerWise,
    Quantized,
    StochasticRounding,
    TopK,
)
from thresher.compression.base import check_compressor, check_density, check_finite, check_state, described, kept
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

NUMEL = 12
COMPRESSORS: list[Compressor] = [
    Identity(),
    HardThreshold(0.0),
    HardThreshold(0.7),
    TopK(0.25),
    LayerWise(TopK(0.5), [(1,), (2, 4), (3,)]),
]

each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda compressor: compressor.describe())
gradients = st.lists(
    st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 0.7, -0.7]), min_size=NUMEL, max_size=NUMEL
).map(torch.tensor)


@each_compressor
@given(gradient=gradients)
def test_declared_bounds_hold(compressor: Compressor, gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² ≤ κ² and ≤ (1 - δ)‖x‖², as far as the compressor says so itself."""
    guarantee = compressor.guarantee
    assert guarantee.kappa or guarantee.delta
    error = float((gradient - compressor.compress(gradient).densify()).double().square().sum())
    if guarantee.kappa:
        assert error <= guarantee.kappa(NUMEL) ** 2
    if guarantee.delta:
        energy = float(gradient.double().square().sum())
        assert error <= (1 - guarantee.delta(NUMEL)) * energy * (1 + 1e-12)


@each_compressor
@given(gradient=gradients)
def test_compress_splits_and_leaves_its_input_alone(compressor: Compressor, gradient: torch.Tensor) -> None:
    """What is sent is valid, holds the values untouched, and shares no memory with the input."""
    before = gradient.clone()
    sent = compressor.compress(gradient)
    sent.validate()
    assert sent.numel == NUMEL
    assert torch.equal(sent.values, before[sent.indices])
    sent.values.fill_(5.0)
    assert torch.equal(gradient, before)


@each_compressor
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_coordinate_is_never_dropped(compressor: Compressor, value: float) -> None:
    """NaN fails every comparison, and what chooses by magnitude still sends it; it is never lost in silence."""
    gradient = torch.ones(NUMEL)
    gradient[4] = value
    assert 4 in compressor.compress(gradient).indices.tolist()


@each_compressor
@pytest.mark.parametrize(
    "gradient", [torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(1, NUMEL), torch.zeros(NUMEL, dtype=torch.int64)]
)
def test_other_shapes_and_dtypes_are_refused(compressor: Compressor, gradient: torch.Tensor) -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        compressor.compress(gradient)


def test_descriptions_tell_all_settings_apart() -> None:
    """Equal text means equal behaviour, so different settings have different texts."""
    assert len({compressor.describe() for compressor in COMPRESSORS}) == len(COMPRESSORS)


@each_compressor
def test_empty_gradient_has_an_empty_message(compressor: Compressor) -> None:
    """A vector without elements is no special case."""
    if isinstance(compressor, LayerWise):
        compressor = LayerWise(compressor.compressor, [])
    assert compressor.compress(torch.empty(0)).count == 0


@each_compressor
@given(st.lists(st.lists(st.integers(-4, 4), min_size=NUMEL, max_size=NUMEL), min_size=1, max_size=6))
def test_what_declares_it_conserves_does(compressor: Compressor, steps: list[list[int]]) -> None:
    """Law 1, exact on integer gradients: Σ sent + residual = Σ input."""
    assert compressor.guarantee.conserves
    feedback = ErrorFeedback(compressor, NUMEL)
    inputs = torch.tensor(steps, dtype=torch.float32)
    sent = sum((feedback.compress(gradient).densify() for gradient in inputs), torch.zeros(NUMEL))
    assert torch.equal(sent + feedback.residual, inputs.sum(dim=0))


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_check_finite_refuses_exactly_the_non_finite(values: list[float]) -> None:
    """The first bad index and the number of bad ones are named; finite vectors pass even if their sum overflows."""
    vector = torch.tensor(values)
    bad = [index for index, value in enumerate(vector.tolist()) if not abs(value) < float("inf")]
    if not bad:
        check_finite(vector)
        return
    with pytest.raises(NonFiniteGradientError, match=rf"has {len(bad)} non-finite of .* at index {bad[0]}$"):
        check_finite(vector)


def test_check_finite_survives_overflow_and_cancellation() -> None:
    """A sum that overflows convicts nobody, and infinities of both signs don't cancel."""
    check_finite(torch.full((4,), torch.finfo(torch.float32).max))
    with pytest.raises(NonFiniteGradientError, match=r"2 non-finite of 3 elements, the first is inf at index 1"):
        check_finite(torch.tensor([0.0, float("inf"), float("-inf")]))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    """(0, 1], and NaN is in no range."""
    with pytest.raises(ConfigurationError, match=re.escape(f"not {density}")):
        check_density(density)


@given(st.floats(1e-6, 1.0), st.integers(0, 10_000))
def test_kept_is_at_least_one_and_at_most_all(density: float, numel: int) -> None:
    """Rounded down, but never to nothing, and never above what there is."""
    k = kept(density, numel)
    assert k == (0 if numel == 0 else max(1, int(density * numel)))
    assert k <= numel


def test_a_description_is_the_call() -> None:
    """Fields without a default by position, others by name where they differ, methods inside as calls."""
    assert described(TopK(0.5)) == "TopK(0.5)"
    assert described(StochasticRounding(0.25)) == "StochasticRounding(0.25)"
    assert described(StochasticRounding(0.25, seed=3)) == "StochasticRounding(0.25, seed=3)"
    assert described(Quantized(TopK(0.5), StochasticRounding(0.25))) == "Quantized(TopK(0.5), StochasticRounding(0.25))"


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"method": "TopK(0.25)"}, r"belongs to TopK\(0\.25\), this is TopK\(0\.5\)"),
        ({}, r"not a state of TopK\(0\.5\): expected the keys \['method'\], found \[\]"),
        ({"method": "TopK(0.5)", "more": 1}, "found \\['method', 'more'\\]"),
    ],
)
def test_states_of_something_else_are_refused(state: dict[str, object], why: str) -> None:
    """What differs is named."""
    with pytest.raises(ConfigurationError, match=why):
        check_state("TopK(0.5)", state, {"method"})
    check_state("TopK(0.5)", {"method": "TopK(0.5)"}, {"method"})


def test_what_is_no_compressor_is_refused() -> None:
    """A feedback goes around compressors, never into them."""
    check_compressor("LayerWise", TopK(0.5))
    with pytest.raises(ConfigurationError, match="LayerWise takes compressors, not a ErrorFeedback"):
        check_compressor("LayerWise", ErrorFeedback(TopK(0.5), 3))
