"""The value type: what it accepts, and that slicing and densifying agree with the plain vector."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.errors import ConfigurationError
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import Levels, Seeded, SparseGradient


@st.composite
def sparse_gradients(draw: st.DrawFn) -> SparseGradient:
    numel = draw(st.integers(0, 40))
    kept = sorted(draw(st.sets(st.integers(0, numel - 1)))) if numel else []
    values = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=len(kept), max_size=len(kept)))
    return SparseGradient(torch.tensor(kept, dtype=torch.int64), torch.tensor(values, dtype=torch.float32), numel)


def sparse(indices: list[int], values: list[float], numel: int) -> SparseGradient:
    return SparseGradient(torch.tensor(indices, dtype=torch.int64), torch.tensor(values), numel)


@st.composite
def hinted(draw: st.DrawFn) -> SparseGradient:
    """A gradient that says how its values and its indices came about."""
    numel = draw(st.integers(1, 60))
    cut = draw(st.integers(0, numel))
    seeds = tuple(
        Seeded(offset, length, draw(st.integers(0, length)), draw(st.integers(0, 2**64 - 1)))
        for offset, length in ((0, cut), (cut, numel - cut))
    )
    kept = drawn(seeds)
    ends = sorted(draw(st.sets(st.integers(1, len(kept)), max_size=4)) | {len(kept)}) if kept else []
    levels = Levels(
        torch.tensor([draw(st.integers(-128, 127)) for _ in kept], dtype=torch.int8),
        torch.tensor([draw(st.sampled_from([0.25, 0.5, 3.0])) for _ in ends], dtype=torch.float32),
        torch.tensor(ends, dtype=torch.int64),
    )
    return SparseGradient(torch.tensor(kept, dtype=torch.int64), products(levels), numel, levels, seeds)


def drawn(seeds: tuple[Seeded, ...]) -> list[int]:
    return [index + s.offset for s in seeds for index in seeded_indices(s.numel, s.count, s.key).tolist()]


def products(levels: Levels) -> Tensor:
    return levels.codes * levels.scales.repeat_interleave(torch.diff(levels.ends, prepend=levels.ends.new_zeros(1)))


def check_hints(gradient: SparseGradient) -> None:
    """They stand for exactly what is beside them."""
    assert gradient.levels is not None
    assert torch.equal(products(gradient.levels), gradient.values)
    assert bool((torch.diff(gradient.levels.ends, prepend=gradient.levels.ends.new_zeros(1)) > 0).all())
    assert [index for index in drawn(gradient.seeds) if 0 <= index < gradient.numel] == gradient.indices.tolist()


@given(sparse_gradients())
def test_densify_puts_each_value_at_its_index(gradient: SparseGradient) -> None:
    """The dense vector holds the values at the indices and zero elsewhere."""
    expected = [0.0] * gradient.numel
    for index, value in zip(gradient.indices.tolist(), gradient.values.tolist(), strict=True):
        expected[index] = value
    assert gradient.densify().tolist() == expected


@given(sparse_gradients(), st.data())
def test_slice_is_the_slice_of_the_dense_vector(gradient: SparseGradient, data: st.DataObject) -> None:
    """Slicing and densifying commute, and every slice is a valid gradient."""
    begin = data.draw(st.integers(0, gradient.numel))
    end = data.draw(st.integers(begin, gradient.numel))
    piece = gradient.slice(begin, end)
    piece.validate()
    assert piece.numel == end - begin
    assert torch.equal(piece.densify(), gradient.densify()[begin:end])


@given(sparse_gradients(), st.data())
def test_slices_partition_the_coordinates(gradient: SparseGradient, data: st.DataObject) -> None:
    """Cut anywhere, the pieces hold every coordinate exactly once."""
    cut = data.draw(st.integers(0, gradient.numel))
    left, right = gradient.slice(0, cut), gradient.slice(cut, gradient.numel)
    assert torch.equal(torch.cat([left.indices, right.indices + cut]), gradient.indices)
    assert torch.equal(torch.cat([left.values, right.values]), gradient.values)


@given(hinted(), st.data())
def test_a_slice_takes_its_levels_and_seeds_along(gradient: SparseGradient, data: st.DataObject) -> None:
    """Cut twice, they still stand for what is kept, and none is left that has no part in it."""
    check_hints(gradient)
    for _ in range(2):
        begin = data.draw(st.integers(0, gradient.numel))
        end = data.draw(st.integers(begin, gradient.numel))
        gradient = gradient.slice(begin, end)
        check_hints(gradient)
        assert all(seed.offset < gradient.numel and seed.offset + seed.numel > 0 for seed in gradient.seeds)


@given(st.lists(sparse_gradients() | hinted(), max_size=5))
def test_concatenation_is_that_of_the_dense_vectors(pieces: list[SparseGradient]) -> None:
    """One vector after the other, and a valid gradient."""
    whole = SparseGradient.concatenate(pieces)
    whole.validate()
    assert torch.equal(whole.densify(), torch.cat([torch.empty(0), *(piece.densify() for piece in pieces)]))


@given(st.lists(hinted(), max_size=4), st.lists(st.integers(0, 3), max_size=4))
def test_concatenation_keeps_levels_and_seeds(pieces: list[SparseGradient], gaps: list[int]) -> None:
    """Pieces that keep nothing don't stand in the way."""
    whole = SparseGradient.concatenate([*(SparseGradient.empty(gap) for gap in gaps), *pieces])
    if whole.count:
        check_hints(whole)


@given(hinted(), st.data())
def test_slices_concatenate_to_the_whole(gradient: SparseGradient, data: st.DataObject) -> None:
    """Cut and joined again it is equal, and says nothing wrong of where it came from."""
    cut = data.draw(st.integers(0, gradient.numel))
    whole = SparseGradient.concatenate([gradient.slice(0, cut), gradient.slice(cut, gradient.numel)])
    assert whole.equals(gradient)
    if whole.seeds:
        check_hints(whole)


def test_concatenation_drops_what_not_all_have() -> None:
    """One piece that knows nothing shorter decides for all."""
    levels = Levels(torch.tensor([2], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([1]))
    one = SparseGradient(torch.tensor([0]), torch.tensor([1.0]), 1, levels, (Seeded(0, 1, 1, 7),))
    assert SparseGradient.concatenate([one, one]).levels is not None
    assert len(SparseGradient.concatenate([one, one]).seeds) == 2
    mixed = SparseGradient.concatenate([one, sparse([1], [0.1], 3)])
    assert (mixed.levels, mixed.seeds) == (None, ())


def test_concatenated_dense_gradients_share_their_indices() -> None:
    """Everything of everything is everything."""
    one = SparseGradient.dense(torch.rand(4))
    whole, other = SparseGradient.concatenate([one, one]), SparseGradient.dense(torch.rand(8))
    assert whole.indices.data_ptr() == other.indices.data_ptr()


def test_slice_of_values_is_a_view() -> None:
    """A slice copies no values, kept by a few coordinates or by all."""
    for gradient in (sparse([1, 3, 4], [1.0, 2.0, 3.0], 6), SparseGradient.dense(torch.rand(6))):
        piece = gradient.slice(3, 5)
        assert piece.values.untyped_storage().data_ptr() == gradient.values.untyped_storage().data_ptr()


def test_dense_gradients_of_one_size_share_their_indices() -> None:
    """Two dense gradients alive together hold one index tensor, and a slice of one holds a view of it."""
    first, second = SparseGradient.dense(torch.rand(9)), SparseGradient.dense(torch.rand(9))
    assert first.indices.data_ptr() == second.indices.data_ptr() == first.slice(4, 8).indices.data_ptr()
    assert first.slice(4, 8).indices.tolist() == [0, 1, 2, 3]


def test_dense_keeps_and_returns_the_values_without_a_copy() -> None:
    """A dense gradient is its values, both ways."""
    values = torch.rand(5)
    assert SparseGradient.dense(values).densify().data_ptr() == values.data_ptr()


def test_count_and_density() -> None:
    """Density is count over numel, and 0 for a vector without elements."""
    assert (sparse([0, 2], [1.0, 2.0], 8).count, sparse([0, 2], [1.0, 2.0], 8).density) == (2, 0.25)
    assert SparseGradient.dense(torch.zeros(3)).density == 1.0
    assert SparseGradient.empty(0).density == SparseGradient.empty(7).density == 0.0


def test_empty_is_all_zero() -> None:
    """No coordinate kept, no element different from zero."""
    assert SparseGradient.empty(3).densify().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("indices", "values", "numel", "message"),
    [
        (torch.tensor([0], dtype=torch.int32), torch.zeros(1), 2, "indices must be"),
        (torch.tensor([[0]]), torch.zeros(1), 2, "indices must be"),
        (torch.tensor([0]), torch.zeros(1, dtype=torch.float64), 2, "values must be"),
        (torch.tensor([0]), torch.zeros(1, 1), 2, "values must be"),
        (torch.tensor([0, 1]), torch.zeros(1), 2, "2 indices for 1 values"),
        (torch.tensor([0, 1]), torch.zeros(2), 1, "2 coordinates in a vector of numel 1"),
        (torch.empty(0, dtype=torch.int64), torch.empty(0), -1, "numel -1"),
        (torch.tensor([0]), torch.zeros(1, device="meta"), 2, "indices are on cpu, values on meta"),
    ],
)
def test_parts_that_do_not_fit_are_refused(indices: Tensor, values: Tensor, numel: int, message: str) -> None:
    """A wrong dtype, shape, device or length never becomes a gradient."""
    with pytest.raises(ConfigurationError, match=message):
        SparseGradient(indices, values, numel)


@pytest.mark.parametrize(
    ("codes", "scales", "ends", "message"),
    [
        (torch.zeros(2), torch.ones(1), torch.tensor([2]), "codes must be"),
        (torch.zeros(2, dtype=torch.int8), torch.ones(1, dtype=torch.float64), torch.tensor([2]), "scales must be"),
        (torch.zeros(2, dtype=torch.int8), torch.ones(1), torch.tensor([2.0]), "ends must be"),
        (torch.zeros(2, dtype=torch.int8), torch.ones(2), torch.tensor([2]), "2 scales for 1 blocks"),
    ],
)
def test_levels_that_do_not_fit_are_refused(codes: Tensor, scales: Tensor, ends: Tensor, message: str) -> None:
    """Neither a wrong dtype nor a wrong length becomes levels."""
    with pytest.raises(ConfigurationError, match=message):
        Levels(codes, scales, ends)


def test_levels_of_another_count_are_refused() -> None:
    """One code for each value."""
    levels = Levels(torch.zeros(2, dtype=torch.int8), torch.ones(1), torch.tensor([2]))
    with pytest.raises(ConfigurationError, match="levels of 2 values for 1 values"):
        SparseGradient(torch.tensor([0]), torch.zeros(1), 4, levels)


@pytest.mark.parametrize(
    ("offset", "numel", "count", "key", "message"),
    [
        (0, 3, 4, 0, "no 4 of 3 coordinates"),
        (0, 3, -1, 0, "no -1 of 3 coordinates"),
        (2**62 + 1, 3, 1, 0, "can be drawn at"),
        (0, 2**62 + 1, 1, 0, "coordinates can be drawn"),
        (0, 3, 1, 2**64, "a key has 64 bits"),
        (0, 3, 1, -1, "a key has 64 bits"),
    ],
)
def test_seeds_of_no_range_are_refused(offset: int, numel: int, count: int, key: int, message: str) -> None:
    """What could not be drawn is no seed."""
    with pytest.raises(ConfigurationError, match=message):
        Seeded(offset, numel, count, key)


@pytest.mark.parametrize("indices", [[0, 0], [2, 1], [-1, 1], [1, 4]])
def test_validate_refuses_indices_out_of_order_or_range(indices: list[int]) -> None:
    """Repeated, descending, negative and too large indices are found."""
    with pytest.raises(ConfigurationError):
        sparse(indices, [1.0, 2.0], 4).validate()


@given(sparse_gradients())
def test_validate_accepts_every_gradient_in_order(gradient: SparseGradient) -> None:
    """A strictly increasing support in range is valid."""
    gradient.validate()


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (2, 1), (0, 5)])
def test_slice_outside_the_vector_is_refused(begin: int, end: int) -> None:
    """Bounds are not clipped in silence as Python's own slices are."""
    with pytest.raises(ConfigurationError, match=r"is not inside a vector of numel 4"):
        sparse([1], [1.0], 4).slice(begin, end)


def test_equals_compares_bits() -> None:
    """NaN equals itself, zero differs from minus zero, and numel and indices count."""
    assert sparse([1], [float("nan")], 4).equals(sparse([1], [float("nan")], 4))
    assert not sparse([1], [0.0], 4).equals(sparse([1], [-0.0], 4))
    assert not sparse([1], [1.0], 4).equals(sparse([1], [1.0], 5))
    assert not sparse([1], [1.0], 4).equals(sparse([2], [1.0], 4))
    assert not sparse([1], [1.0], 4).equals(SparseGradient.empty(4))


def test_gradient_cannot_be_reassigned() -> None:
    """It is a value: its fields stay what they were."""
    with pytest.raises(AttributeError):
        SparseGradient.empty(3).numel = 4  # type: ignore[misc]
