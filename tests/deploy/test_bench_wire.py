"""The bench of the wire: it measures every coding, and what it says of sizes is true."""

import math
from itertools import combinations

import pytest

from thresher.deploy.bench_wire import entropy_bits_per_element, measure
from thresher.protos.errors import ConfigurationError

ROWS = measure(elements=200_000, densities=(1e-3, 1e-1), repetitions=1)


def row(coding: str, density: float, support: str = "") -> dict[str, float | int | str]:
    key = (coding + support, density)
    (found,) = (row for row in ROWS if (row["coding"], row["density"]) == key)
    return found


def test_each_coding_is_measured_once_at_each_density() -> None:
    """Ours with each kind of values, and what they are held against; speeds are positive."""
    ours = [f"thresher {values}" for values in ("f32", "bf16", "f16", "int8 levels", "signs")]
    for coding in (*ours, "raw int32 + f32", "delta varint + f32", "bitmap + f32"):
        for density in (1e-3, 1e-1):
            for support in ("", ", clustered"):
                found = row(coding, density, support)
                assert float(found["encode_elements_per_second"]) > 0
                assert float(found["decode_elements_per_second"]) > 0


def test_sizes_are_those_of_the_codings() -> None:
    """Where they follow from the definition they are exact."""
    assert row("raw int32 + f32", 1e-1)["index_bits_per_element"] == 32
    assert row("raw int32 + f32", 1e-1)["bytes_per_element"] == 8
    assert row("bitmap + f32", 1e-1)["index_bits_per_element"] == 10
    header = 44 / 20_000
    for coding, bits in (("f32", 32), ("bf16", 16), ("f16", 16)):
        found = row(f"thresher {coding}", 1e-1)
        expected = (bits + float(found["index_bits_per_element"])) / 8 + header
        assert found["bytes_per_element"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("density", [1e-3, 1e-1])
def test_random_supports_come_near_their_entropy(density: float) -> None:
    """Never below it, and for ours at most 2 % above."""
    found = row("thresher f32", density)
    entropy = float(found["entropy_bits_per_element"])
    assert entropy <= float(found["index_bits_per_element"]) <= 1.02 * entropy


def test_neighbours_cost_almost_nothing() -> None:
    """Clusters of 64 take a byte or two each."""
    assert float(row("thresher f32", 1e-1, ", clustered")["index_bits_per_element"]) < 0.5


@pytest.mark.parametrize(("elements", "count"), [(5, 2), (9, 8), (12, 6)])
def test_entropy_is_that_of_equally_likely_supports(elements: int, count: int) -> None:
    """As many as there are, counted."""
    supports = sum(1 for _ in combinations(range(elements), count))
    assert entropy_bits_per_element(elements, count) == pytest.approx(math.log2(supports) / count)


@pytest.mark.parametrize("density", [1e-9, 1.0])
def test_a_density_that_keeps_none_or_all_is_refused(density: float) -> None:
    """There would be nothing to divide by, or no index."""
    with pytest.raises(ConfigurationError, match="nothing to code"):
        measure(elements=1000, densities=(density,), repetitions=1)
