"""The k largest: exactly those of a stable sort, whatever the sample made of the vector."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.largest import _SHORT, _least_counted, _least_selected, largest
from thresher.compression.one_pass import sampled

LARGE = 1_300_001  # the sample is a part of it
numbers = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1e-45, 1.0, -1.0]))
vectors = st.lists(numbers, max_size=60).map(lambda some: torch.tensor(some, dtype=torch.float32))


def by_sorting(vector: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest by a stable sort, ascending; NaN is as large as infinity."""
    magnitude = vector.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return magnitude.sort(descending=True, stable=True).indices[:k].sort().values


def expect_largest(vector: torch.Tensor, k: int) -> None:
    indices, values = largest(vector, k)
    assert torch.equal(indices, by_sorting(vector, k))
    assert torch.equal(values.view(torch.int32), vector[indices].view(torch.int32))


@given(vectors, st.data())
def test_it_is_the_stable_sort(vector: torch.Tensor, data: st.DataObject) -> None:
    """Every k from none to all, with ties, both zeros, denormals, infinities and NaN."""
    k = data.draw(st.integers(0, vector.numel()))
    expect_largest(vector, k)
    strided = torch.stack([vector, vector], dim=1)[:, 0]
    assert torch.equal(largest(strided, k)[0], by_sorting(vector, k))


@pytest.mark.parametrize("numel", [_SHORT - 1, _SHORT, _SHORT + 1])
@pytest.mark.parametrize("levels", [2, 100, 1_000_000])
def test_selecting_and_counting_agree(numel: int, levels: int) -> None:
    """On both sides of the length from which on the vector is sampled."""
    vector = torch.randint(-levels, levels, (numel,), generator=torch.Generator().manual_seed(numel)).float()
    for k in (0, 1, 5, numel // 100, numel // 2, numel):
        expect_largest(vector, k)
        if k:
            assert _least_selected(vector.numpy(), k) == _least_counted(vector.numpy(), k)


@pytest.mark.parametrize("k", [1, 130, 13_000, 130_000, LARGE - 1, LARGE])
def test_large_vectors_are_guessed_right(k: int) -> None:
    """Here the sample says where to look."""
    expect_largest(torch.randn(LARGE, generator=torch.Generator().manual_seed(k)), k)


@pytest.mark.parametrize("k", [1, 5_000, 200_000])
@pytest.mark.parametrize("levels", [1, 2, 9])
def test_large_vectors_of_few_values(k: int, levels: int) -> None:
    """Many ties: the first ones are taken."""
    expect_largest(torch.randint(0, levels, (LARGE,), generator=torch.Generator().manual_seed(k)).float(), k)


def test_more_wanted_than_differ_from_zero() -> None:
    """Zeros make up the number, the first of them."""
    vector = torch.zeros(LARGE)
    vector[::1000] = -1.0
    expect_largest(vector, 100_000)


@pytest.mark.parametrize("seen", [5.0, 0.0])
def test_sample_that_misjudges_is_no_loss(seen: float) -> None:
    """The sampled lines are all larger, or all smaller, than what lies between them."""
    vector = torch.rand(LARGE, generator=torch.Generator().manual_seed(0))
    sampled(vector, 4096).fill_(seen)
    for k in (10, 10_000, 400_000):
        expect_largest(vector, k)
