"""One pass over memory: the same bits as plain torch, however the vector is cut, and room that turns out too small."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.one_pass import correct, reaching, sampled

LARGE = 3 * (1 << 20) + 5  # enough for three threads, and no multiple of anything

# Every sort of float32: both zeros, denormals, infinities, NaN, and a few that are equal to each other or a threshold.
numbers = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 0.5, -0.5]))
thresholds = st.one_of(st.sampled_from([0.0, 1e-45, 0.5, 1.0, 2.0]), st.floats(0.0, 2.0**127, width=32))


@st.composite
def vectors(draw: st.DrawFn, count: int) -> list[torch.Tensor]:
    """``count`` vectors of one length, often around a multiple of the loops' blocks."""
    numel = draw(st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 513])))
    drawn = [draw(st.lists(numbers, min_size=1, max_size=12)) for _ in range(count)]
    return [torch.tensor((some * numel)[:numel], dtype=torch.float32) for some in drawn]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal to the bit, which NaN is to itself and -0.0 is not to 0.0."""
    return torch.equal(first.contiguous().view(torch.int32), second.contiguous().view(torch.int32))


def plainly(gradient: torch.Tensor, residual: torch.Tensor, threshold: float) -> list[torch.Tensor]:
    """Indices, values and what is left, in plain torch."""
    corrected = gradient + residual
    indices = (~(corrected.abs() < threshold)).nonzero().squeeze(1)
    values = corrected[indices]
    corrected[indices] = 0.0
    return [indices, values, corrected]


def expect(taken: tuple[torch.Tensor, torch.Tensor], left: torch.Tensor, expected: list[torch.Tensor]) -> None:
    assert torch.equal(taken[0], expected[0])
    assert same_bits(taken[1], expected[1])
    assert same_bits(left, expected[2])


@given(vectors(2), thresholds)
def test_in_place_it_is_plain_torch_to_the_bit(pair: list[torch.Tensor], threshold: float) -> None:
    """Equality with the threshold, NaN, infinities, denormals and both zeros included."""
    gradient, residual = pair
    expected = plainly(gradient, residual, threshold)
    before = gradient.clone()
    expect(correct(gradient, residual, threshold, out=residual), residual, expected)
    assert same_bits(gradient, before)


@given(vectors(2), thresholds)
def test_into_a_second_buffer_it_is_plain_torch_to_the_bit(pair: list[torch.Tensor], threshold: float) -> None:
    """The first buffer stays as it was."""
    gradient, residual = pair
    before, out = residual.clone(), torch.empty_like(residual)
    expect(correct(gradient, residual, threshold, out=out), out, plainly(gradient, before, threshold))
    assert same_bits(residual, before)


@given(vectors(1), thresholds)
def test_reaching_is_plain_torch_to_the_bit(one: list[torch.Tensor], threshold: float) -> None:
    """Without a residual nothing is changed."""
    (vector,) = one
    before = vector.clone()
    indices, values = reaching(vector, threshold)
    expected = (~(vector.abs() < threshold)).nonzero().squeeze(1)
    assert torch.equal(indices, expected)
    assert same_bits(values, vector[expected])
    assert same_bits(vector, before)


@given(vectors(2), thresholds)
def test_strided_vectors_give_the_same(pair: list[torch.Tensor], threshold: float) -> None:
    """A vector that is not contiguous takes the plain path, to the same result."""
    gradient, residual = pair
    wide = torch.stack([gradient, gradient], dim=1)[:, 0]
    expected = plainly(gradient, residual, threshold)
    expect(correct(wide, residual, threshold, out=residual), residual, expected)
    assert torch.equal(reaching(wide, threshold)[0], reaching(gradient, threshold)[0])


@pytest.mark.parametrize("density", [0.0, 1e-4, 1e-2, 0.3, 1.0])
def test_threads_do_not_show(threads: int, density: float) -> None:
    """A vector large enough to be shared out, in place and into a second buffer."""
    generator = torch.Generator().manual_seed(1)
    gradient, residual = (torch.rand(LARGE, generator=generator) for _ in range(2))
    threshold = 2.0 - (2.0 * density) ** 0.5 if density < 0.5 else 0.0
    expected, out = plainly(gradient, residual, threshold), torch.empty(LARGE)
    expect(correct(gradient, residual, threshold, out=out), out, expected)
    expect(correct(gradient, residual, threshold, out=residual), residual, expected)


@pytest.mark.parametrize("begin", [0, LARGE // 2, LARGE - 300_000])
def test_finds_that_no_sample_saw_are_not_lost(threads: int, begin: int) -> None:
    """A cluster between the sampled lines overflows the room made for it, and all of it is there."""
    gradient, residual = torch.zeros(LARGE), torch.zeros(LARGE)
    gradient[begin : begin + 300_000] = 1.0
    for span in torch.arange(LARGE).chunk(threads):  # what the samples of all parts look at
        sampled(gradient[int(span[0]) : int(span[-1]) + 1], 1024).zero_()
    expected, out = plainly(gradient, residual, 1.0), torch.empty(LARGE)
    expect(correct(gradient, residual, 1.0, out=out), out, expected)
    expect(correct(gradient, residual, 1.0, out=residual), residual, expected)
    assert torch.equal(reaching(gradient, 1.0)[0], expected[0])


def test_few_finds_keep_no_large_memory_alive() -> None:
    """What was made room for and not needed is given back."""
    vector = torch.zeros(LARGE)
    sampled(vector, 1024)[:, 0] = 1.0  # only where the sample looks
    indices, values = reaching(vector, 1.0)
    assert indices.numel() == 1024
    assert indices.untyped_storage().nbytes() + values.untyped_storage().nbytes() < 40 * 1024


def test_sample_is_spread_over_the_vector_and_meets_all_columns() -> None:
    """Lines of sixteen from one end to the other, not at the same places of the rows of a matrix."""
    lines = sampled(torch.arange(1 << 20), 1024)
    assert lines.shape == (1024, 16)
    assert int(lines[-1, 0]) > (1 << 20) * 0.99
    assert len(set((lines[:, 0] % 1024).tolist())) == 1024
    assert sampled(torch.arange(100), 1024).tolist() == [list(range(100))]


def test_gradient_that_requires_grad_is_read() -> None:
    """As it comes from a parameter."""
    indices, _ = reaching(torch.ones(3, requires_grad=True), 1.0)
    assert indices.tolist() == [0, 1, 2]
