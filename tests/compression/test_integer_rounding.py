"""Integer rounding: nearest multiples, exact sums, and no sum beyond an int32."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.integer_rounding import IntegerRounding
from thresher.protos.errors import ConfigurationError

vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12).map(torch.tensor)
powers_of_two = st.integers(-10, 20).map(lambda exponent: 2.0**exponent)
factors = st.floats(1e-3, 1e5)


@given(vectors, powers_of_two | factors)
@example(torch.tensor([0.5]), 3.0)
def test_declared_kappa_bounds_each_coordinate(gradient: torch.Tensor, factor: float) -> None:
    """‖x - C(x)‖² ≤ κ², and no coordinate has more than its share of it."""
    method = IntegerRounding(factor)
    kappa = method.guarantee.kappa
    assert kappa is not None
    error = method.compress(gradient).densify().double() - gradient.double()
    assert float(error.abs().max()) <= kappa(1)
    assert float(error.square().sum()) <= kappa(gradient.numel()) ** 2


def test_kappa_is_half_a_step_where_float32_holds_the_grid() -> None:
    """√d / (2 f) for a power of two, and twice that where q / f is rounded once more."""
    exact, rounded = IntegerRounding(8.0).guarantee.kappa, IntegerRounding(10.0).guarantee.kappa
    assert exact is not None
    assert rounded is not None
    assert exact(4) == 2 / 16
    assert rounded(4) == 2 / 10


@given(vectors, powers_of_two)
def test_sends_the_nearest_multiple(gradient: torch.Tensor, factor: float) -> None:
    """rint(f · x) / f with ties to even, as Python's own round() has it."""
    expected = [round(value * factor) / factor for value in gradient.tolist()]
    sent = IntegerRounding(factor).compress(gradient)
    assert sent.densify().tolist() == expected
    assert (sent.values != 0).all()


@given(st.lists(vectors.filter(lambda vector: vector.numel() >= 3), min_size=2, max_size=5))
def test_sums_are_those_of_the_integers(gradients: list[torch.Tensor]) -> None:
    """In any order, to the bit: what float32 sums rarely are."""
    sent = [IntegerRounding(64.0).compress(gradient[:3]).densify() for gradient in gradients]
    forwards, backwards = sum(sent, torch.zeros(3)), sum(reversed(sent), torch.zeros(3))
    assert torch.equal(forwards, backwards)


@given(vectors, powers_of_two, st.integers(-6, 6).map(lambda exponent: 2.0**exponent))
def test_scale_law(gradient: torch.Tensor, factor: float, scale: float) -> None:
    """C_γ(x) = γ · C(x / γ), exact for powers of two (Algorithm 1 of arXiv:2108.00951)."""
    method = IntegerRounding(factor)
    scaled = method.compress(gradient * scale, Round(scale=scale)).densify()
    assert torch.equal(scaled, method.compress(gradient).densify() * scale)


@given(st.lists(st.lists(st.integers(-999, 999), min_size=4, max_size=4), min_size=1, max_size=6))
def test_feedback_conserves_exactly_on_a_finer_grid(steps: list[list[int]]) -> None:
    """Law 1 on multiples of 1/32 sent as multiples of 1/4: Σ sent + residual = Σ input."""
    inputs = torch.tensor(steps) / 32
    feedback = ErrorFeedback(IntegerRounding(4.0), 4)
    sent = sum((feedback.compress(gradient).densify() for gradient in inputs), torch.zeros(4))
    assert torch.equal(sent + feedback.residual, inputs.sum(dim=0))
    assert (feedback.residual.abs() <= 1 / 8).all()


@pytest.mark.parametrize(("largest", "workers", "fits"), [(2**31 - 128, 1, True), (2**31, 1, False), (2**29, 4, False)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sum_beyond_an_int32_is_refused(largest: int, workers: int, fits: bool, sign: float) -> None:
    """The largest sum, workers · f · max|x|, must be below 2³¹."""
    method, gradient = IntegerRounding(2.0, workers=workers), torch.tensor([1.0, sign * largest / 2])
    if fits:
        assert torch.equal(method.compress(gradient).densify(), gradient)
        return
    with pytest.raises(ConfigurationError, match=rf"{largest} steps of 1 / 2.0, .* of {workers} such .* lower the"):
        method.compress(gradient)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e-31, 1e39])
def test_impossible_factors_are_refused(factor: float) -> None:
    """A number above 0 that leaves float32 room."""
    with pytest.raises(ConfigurationError, match="factor must be a number"):
        IntegerRounding(factor)


@pytest.mark.parametrize("workers", [0, -1, 1.5])
def test_impossible_numbers_of_workers_are_refused(workers: int) -> None:
    """At least one adds its vector."""
    with pytest.raises(ConfigurationError, match="workers must be a whole number, at least 1"):
        IntegerRounding(1.0, workers=workers)


def test_scale_that_takes_the_step_out_of_range_is_refused() -> None:
    """The step of a round is scale / factor."""
    with pytest.raises(ConfigurationError, match="scale / factor"):
        IntegerRounding(2.0**100).compress(torch.ones(1), Round(scale=2.0**-100))


def test_description_names_what_differs_from_the_defaults() -> None:
    """And is the same for 8 and 8.0."""
    assert IntegerRounding(8).describe() == "IntegerRounding(8.0)"
    assert IntegerRounding(8.0, workers=4).describe() == "IntegerRounding(8.0, workers=4)"
