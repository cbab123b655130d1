"""Top-k: exact count, ties and optimality."""

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


def test_density_one_sends_all() -> None:
    """Nothing is dropped at density 1."""
    assert TopK(1.0).compress(torch.tensor([0.0, 1.0, 0.0])).densify().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    """A density is in (0, 1]."""
    with pytest.raises(ConfigurationError, match=r"density must be in \(0, 1\]"):
        TopK(density)


def test_delta_is_the_kept_fraction() -> None:
    """δ = k / numel, which rounding down makes smaller than the density; a vector without elements loses nothing."""
    delta = TopK(0.5).guarantee.delta
    assert delta is not None
    assert [delta(8), delta(7), delta(1), delta(0)] == [0.5, 3 / 7, 1.0, 1.0]


@given(small, densities)
def test_error_is_within_the_declared_bound(gradient: torch.Tensor, density: float) -> None:
    """A δ-contraction, from its own word: ‖x - C(x)‖² ≤ (1 - δ)‖x‖²; exact on small integers but for the last bit."""
    compressor = TopK(density)
    assert compressor.guarantee.delta is not None
    error = (gradient - compressor.compress(gradient).densify()).double().square().sum()
    bound = (1.0 - compressor.guarantee.delta(gradient.numel())) * gradient.double().square().sum()
    assert float(error) <= float(bound) * (1 + 1e-12)


def test_vector_without_elements_has_no_largest() -> None:
    """Nothing in, nothing out."""
    assert TopK(0.5).compress(torch.empty(0)).count == 0


def test_what_is_no_flat_float32_vector_is_refused() -> None:
    """A gradient is [numel] float32."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        TopK(0.5).compress(torch.zeros(2, 2))


def test_description_names_the_density() -> None:
    """The text other processes compare."""
    assert TopK(0.001).describe() == "TopK(0.001)"
