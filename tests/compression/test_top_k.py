"""Top-k: exact count, ties, optimality, and the two ways to cut the model."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import TopK
from thresher.protos.errors import ConfigurationError

small = st.lists(st.integers(-3, 3), min_size=1, max_size=9).map(lambda values: torch.tensor(values).float())
densities = st.floats(0.01, 1.0)


@given(small, densities)
def test_keeps_exactly_k_with_the_lowest_index_first(gradient: torch.Tensor, density: float) -> None:
    """As by a stable sort by magnitude: k coordinates, and of equal ones the first (few distinct values: many ties)."""
    k = max(1, int(density * gradient.numel()))
    by_magnitude = sorted(range(gradient.numel()), key=lambda j: (-abs(float(gradient[j])), j))
    assert TopK(density).compress(gradient).indices.tolist() == sorted(by_magnitude[:k])


@given(small, densities)
def test_no_support_of_that_size_has_less_error(gradient: torch.Tensor, density: float) -> None:
    """Lemma 1 of arXiv:2108.00951, by brute force: the largest coordinates leave the least error."""
    sent = TopK(density).compress(gradient)
    squares = gradient.square()
    best = max(float(squares[list(support)].sum()) for support in combinations(range(gradient.numel()), sent.count))
    assert float(sent.values.square().sum()) == best


@given(small, small, densities)
def test_layer_wise_is_each_layer_alone(first: torch.Tensor, second: torch.Tensor, density: float) -> None:
    """With sizes, the message is that of each tensor by itself, put together."""
    sent = TopK(density, sizes=[first.numel(), second.numel()]).compress(torch.cat([first, second]))
    assert sent.slice(0, first.numel()).equals(TopK(density).compress(first))
    assert sent.slice(first.numel(), sent.numel).equals(TopK(density).compress(second))


def test_one_dominant_layer_tells_layer_wise_from_entire_model() -> None:
    """The counter-example to law 4: unlike a hard threshold, Top-k depends on the cut (arXiv:2108.00951)."""
    gradient = torch.cat([torch.full((4,), 10.0), torch.full((4,), 0.1)])
    assert TopK(0.5).compress(gradient).indices.tolist() == [0, 1, 2, 3]
    assert TopK(0.5, sizes=[4, 4]).compress(gradient).indices.tolist() == [0, 1, 4, 5]


def test_every_layer_sends_at_least_one() -> None:
    """k_l = max(1, ⌊density · d_l⌋), except for a tensor without elements."""
    assert TopK(0.01, sizes=[2, 0, 3]).compress(torch.ones(5)).indices.tolist() == [0, 2]


def test_density_one_sends_all() -> None:
    """Nothing is dropped at density 1."""
    assert TopK(1.0).compress(torch.tensor([0.0, 1.0, 0.0])).densify().tolist() == [0.0, 1.0, 0.0]


def test_delta_is_the_kept_fraction_of_the_worst_layer() -> None:
    """δ = k / numel, and layer-wise the least k_l / d_l, which rounding down makes smaller than the density."""
    entire, layer_wise = TopK(0.5).guarantee.delta, TopK(0.5, sizes=[4, 3, 0]).guarantee.delta
    assert entire is not None
    assert layer_wise is not None
    assert entire(8) == 0.5
    assert layer_wise(7) == 1 / 3


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    """A density is in (0, 1]."""
    with pytest.raises(ConfigurationError, match=r"density must be in \(0, 1\]"):
        TopK(density)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """They must be the sizes of this very vector."""
    with pytest.raises(ConfigurationError, match="must not be negative, found -1"):
        TopK(0.5, sizes=[3, -1])
    with pytest.raises(ConfigurationError, match="add up to 3, the gradient has numel 4"):
        TopK(0.5, sizes=[1, 2]).compress(torch.zeros(4))


def test_description_names_density_and_sizes() -> None:
    """The text other processes compare."""
    assert TopK(0.001).describe() == "TopK(0.001)"
    assert TopK(0.001, sizes=[864, 32]).describe() == "TopK(0.001, sizes=(864, 32))"
