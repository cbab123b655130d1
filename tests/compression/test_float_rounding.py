"""Sixteen bits a value: nearest numbers, no infinities, and honest bounds."""

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.float_rounding import BFloat16, Float16

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(finite, min_size=1, max_size=12).map(torch.tensor)
LARGEST = torch.finfo(torch.float32).max


def nearest_bfloat16(value: float) -> float:
    """By hand, in integers: add half a unit in the last place, or a bit less where the last bit is even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    if rounded & 0x7F800000 == 0x7F800000:  # rounded to infinity: the number before that
        rounded -= 0x10000
    return float(struct.unpack("<f", struct.pack("<I", rounded))[0])


@given(vectors)
@example(torch.tensor([LARGEST, -LARGEST, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8]))
def test_bfloat16_is_the_nearest_with_ties_to_even(gradient: torch.Tensor) -> None:
    """Every float32 number, subnormal ones and the largest included."""
    assert BFloat16().compress(gradient).densify().tolist() == [nearest_bfloat16(value) for value in gradient.tolist()]


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=12))
@example([1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 2.0**-25, 65503.9])
def test_float16_is_the_nearest_with_ties_to_even(values: list[float]) -> None:
    """As the standard library packs IEEE binary16."""
    expected = [struct.unpack("<e", struct.pack("<e", value))[0] for value in values]
    assert Float16().compress(torch.tensor(values)).densify().tolist() == expected


@given(vectors)
@example(torch.tensor([1.0 + 2.0**-8]))
def test_declared_delta_of_bfloat16_holds(gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² ≤ (1 - δ)‖x‖², but for the 2⁻¹³⁴ that a subnormal coordinate can lose."""
    delta = BFloat16().guarantee.delta
    assert delta is not None
    exact = gradient.double()
    error = (exact - BFloat16().compress(gradient).densify()).square()
    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    assert float(error[normal].sum()) <= (1 - delta(gradient.numel())) * float(exact[normal].square().sum())
    assert (error[~normal] <= 2.0**-268).all()


@given(vectors)
def test_float16_is_as_near_as_it_says(gradient: torch.Tensor) -> None:
    """Off by 2⁻¹¹ of the coordinate, or by 2⁻²⁵ if that is more, up to 65504; 65504 beyond."""
    sent, exact = Float16().compress(gradient).densify().double(), gradient.double()
    inside = exact.abs() <= 65504
    error = (exact - sent)[inside].abs()
    assert (error <= (exact[inside].abs() * 2.0**-11).clamp(min=2.0**-25)).all()
    assert torch.equal(sent[~inside], 65504 * exact[~inside].sign())


def test_float16_declares_no_bound_for_every_vector() -> None:
    """Neither absolute (large coordinates) nor relative (small ones), and both can be seen."""
    guarantee = Float16().guarantee
    assert (guarantee.kappa, guarantee.delta, guarantee.omega) == (None, None, None)
    assert Float16().compress(torch.tensor([1e9, 1e-9])).densify().tolist() == [65504.0, 0.0]


@pytest.mark.parametrize("method", [BFloat16(), Float16()], ids=lambda method: method.describe())
@given(gradient=vectors)
def test_every_coordinate_is_sent_and_none_becomes_infinite(method: BFloat16 | Float16, gradient: torch.Tensor) -> None:
    """Dense, finite, with the signs of the gradient; rounding again changes nothing."""
    sent = method.compress(gradient)
    assert sent.count == sent.numel
    assert sent.values.isfinite().all()
    assert torch.equal(sent.values.signbit(), gradient.signbit())
    assert method.compress(sent.values).equals(sent)


@given(st.lists(st.lists(st.integers(-(2**20), 2**20), min_size=4, max_size=4), min_size=1, max_size=6))
def test_feedback_sends_the_rest_later_exactly(steps: list[list[int]]) -> None:
    """Law 1, exact on integers, far above the largest binary16 too: Σ sent + residual = Σ input."""
    inputs = torch.tensor(steps).float()
    for method in (BFloat16(), Float16()):
        feedback = ErrorFeedback(method, 4)
        sent = sum((feedback.compress(gradient).densify() for gradient in inputs), torch.zeros(4))
        assert torch.equal(sent + feedback.residual, inputs.sum(dim=0))


def test_what_float16_cannot_hold_arrives_in_parts() -> None:
    """100,000 takes two rounds."""
    feedback = ErrorFeedback(Float16(), 1)
    assert feedback.compress(torch.tensor([100_000.0])).values.tolist() == [65504.0]
    assert feedback.compress(torch.zeros(1)).values.tolist() == [34496.0]


def test_descriptions() -> None:
    """They have no settings."""
    assert (BFloat16().describe(), Float16().describe()) == ("BFloat16()", "Float16()")
