"""Eight bits a value: each block on its own scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.blockwise import Blockwise8Bit, block_in, block_scales
from thresher.compression.error_feedback import ErrorFeedback
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

coordinates = st.floats(-1e3, 1e3, width=32, allow_subnormal=False).filter(lambda value: not 0 < abs(value) < 1e-30)
vectors = st.lists(coordinates, min_size=1, max_size=14).map(torch.tensor)
blocks = st.integers(1, 17)


def cut(vector: torch.Tensor, block: int) -> list[torch.Tensor]:
    return [vector[begin : begin + block] for begin in range(0, vector.numel(), block)]


@given(vectors, blocks)
def test_off_by_at_most_half_a_step_of_its_block(gradient: torch.Tensor, block: int) -> None:
    """And no more than its own size, with the largest of each block in place to float32."""
    sent = Blockwise8Bit(block).compress(gradient)
    sent.validate()
    assert (sent.values != 0).all()
    for piece, values in zip(cut(gradient.double(), block), cut(sent.densify().double(), block), strict=True):
        largest = piece.abs().max()
        error = (piece - values).abs()
        assert (error <= largest / 254 * (1 + 1e-4)).all()
        assert (error <= piece.abs()).all()
        assert float(error[piece.abs().argmax()]) <= float(largest) * 2.0**-22


@given(vectors, blocks)
def test_declared_delta_holds(gradient: torch.Tensor, block: int) -> None:
    """‖x - C(x)‖² ≤ (1 - δ)‖x‖²."""
    delta = Blockwise8Bit(block).guarantee.delta
    assert delta is not None
    exact = gradient.double()
    error = float((exact - Blockwise8Bit(block).compress(gradient).densify()).square().sum())
    assert error <= (1 - delta(gradient.numel())) * float(exact.square().sum())


@pytest.mark.parametrize("numel", [2, 256, 100_000])
def test_delta_is_nearly_reached(numel: int) -> None:
    """One coordinate 1 and all others just below half a step: all but the first are lost, as the bound says."""
    delta = Blockwise8Bit(numel).guarantee.delta
    assert delta is not None
    gradient = torch.full((numel,), 0.9999 / 254)
    gradient[0] = 1.0
    sent = Blockwise8Bit(numel).compress(gradient)
    assert sent.indices.tolist() == [0]
    lost = float((gradient.double() - sent.densify()).square().sum()) / float(gradient.double().square().sum())
    assert (1 - delta(numel)) * (numel - 1) / numel * 0.999 <= lost <= 1 - delta(numel)


@given(vectors, blocks)
def test_values_are_scale_times_code_to_the_bit(gradient: torch.Tensor, block: int) -> None:
    """What the wire sends instead of the values makes the same values, block by block."""
    sent = Blockwise8Bit(block).compress(gradient)
    assert sent.levels is not None
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), sent.levels.ends])
    assert (begins.diff() > 0).all()
    assert int(begins[-1]) == sent.count
    scales = sent.levels.scales.repeat_interleave(begins.diff())
    assert torch.equal(scales * sent.levels.codes.float(), sent.values)


@given(vectors, blocks)
def test_blocks_are_each_alone(gradient: torch.Tensor, block: int) -> None:
    """The message of a vector is that of its blocks, put together."""
    sent = Blockwise8Bit(block).compress(gradient).densify()
    pieces = [Blockwise8Bit(block).compress(piece).densify() for piece in cut(gradient, block)]
    assert torch.equal(sent, torch.cat(pieces))


@given(vectors, blocks, st.integers(-6, 6).map(lambda exponent: 2.0**exponent))
def test_a_multiple_has_the_multiple_of_the_message(gradient: torch.Tensor, block: int, factor: float) -> None:
    """C(γx) = γC(x): the scales carry the unit, so a round's scale changes nothing."""
    multiple = Blockwise8Bit(block).compress(gradient * factor, Round(scale=factor)).densify()
    assert torch.equal(multiple, Blockwise8Bit(block).compress(gradient).densify() * factor)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_feedback_conserves_to_float32(steps: list[list[float]]) -> None:
    """Law 1: Σ sent + residual = Σ input, within what float32 sums lose."""
    feedback = ErrorFeedback(Blockwise8Bit(2), 5)
    inputs = torch.tensor(steps)
    sent = sum((feedback.compress(gradient).densify().double() for gradient in inputs), torch.zeros(5).double())
    bound = 4 * len(steps) * torch.finfo(torch.float32).eps * float(inputs.abs().sum())
    assert ((sent + feedback.residual - inputs.double().sum(dim=0)).abs() <= bound).all()


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=12).filter(lambda codes: max(map(abs, codes)) == 127))
def test_integers_up_to_127_are_exact(codes: list[int]) -> None:
    """With 127 among them the scale is 1."""
    sent = Blockwise8Bit().compress(torch.tensor(codes).float())
    assert sent.densify().tolist() == codes


@given(vectors, blocks, st.sampled_from([2.0, math.inf]), st.integers(1, 127))
def test_scales_are_rounded_up(gradient: torch.Tensor, block: int, order: float, levels: int) -> None:
    """No coordinate is more than ``levels`` steps, and no scale larger than it must be."""
    scales = block_scales(gradient, block_in(gradient, block), order, levels)
    for scale, piece in zip(scales.double(), cut(gradient.double(), block_in(gradient, block)), strict=True):
        exact = float(torch.linalg.vector_norm(piece, ord=order)) / levels
        assert exact * (1 - 1e-15) <= float(scale) <= exact * (1 + 2.0**-23)
        assert float(piece.abs().max()) <= levels * float(scale)


def test_smallest_numbers_survive() -> None:
    """Where a 127th of the largest is no float32 number, the smallest one is the step, and all is exact."""
    smallest = torch.tensor([1e-45, -3e-45, 0.0])
    assert torch.equal(Blockwise8Bit().compress(smallest).densify(), smallest)


def test_block_longer_than_the_vector_costs_nothing() -> None:
    """It is the vector, however long it was declared."""
    gradient = torch.tensor([1.0, -0.25])
    assert Blockwise8Bit(2**40).compress(gradient).equals(Blockwise8Bit(2).compress(gradient))


def test_magnitude_that_rounds_beyond_float32_is_refused() -> None:
    """The largest float32 numbers, whose 127th times 127 is more."""
    largest = torch.finfo(torch.float32).max
    beyond = next(
        value
        for value in (largest * (1 - step * 2.0**-24) for step in range(0, 400, 2))
        if math.isinf(float(block_rounded_up(value) * 127))
    )
    with pytest.raises(NonFiniteGradientError, match=r"block 0 .* is beyond float32: scale the loss down"):
        Blockwise8Bit().compress(torch.tensor([beyond]))


def block_rounded_up(value: float) -> torch.Tensor:
    """The least float32 number that is not below value / 127."""
    nearest = torch.tensor(value / 127)
    return nearest if float(nearest) >= value / 127 else nearest.nextafter(torch.tensor(math.inf))


@pytest.mark.parametrize("block", [0, -1, 2.5, float("nan"), float("inf")])
def test_impossible_blocks_are_refused(block: int) -> None:
    """At least one coordinate."""
    with pytest.raises(ConfigurationError, match="block must be a whole number, at least 1"):
        Blockwise8Bit(block)


def test_description_names_what_differs_from_the_default() -> None:
    """Also for a number that a description wrote as 2**10."""
    assert Blockwise8Bit().describe() == "Blockwise8Bit()"
    assert Blockwise8Bit(2.0**10).describe() == "Blockwise8Bit(block=1024)"  # type: ignore[arg-type]
