"""The value type: what it accepts, and that slicing and densifying agree with the plain vector."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@st.composite
def sparse_gradients(draw: st.DrawFn) -> SparseGradient:
    numel = draw(st.integers(0, 40))
    kept = sorted(draw(st.sets(st.integers(0, numel - 1)))) if numel else []
    values = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=len(kept), max_size=len(kept)))
    return SparseGradient(torch.tensor(kept, dtype=torch.int64), torch.tensor(values, dtype=torch.float32), numel)


def sparse(indices: list[int], values: list[float], numel: int) -> SparseGradient:
    return SparseGradient(torch.tensor(indices, dtype=torch.int64), torch.tensor(values), numel)


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
