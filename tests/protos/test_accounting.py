"""Dense bytes and the compression ratio."""

from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.accounting import compression_ratio, dense_bytes


@given(st.integers(0, 2**50), st.integers(1, 2**50))
def test_the_ratio_times_what_was_moved_is_what_dense_would_be(elements: int, moved: int) -> None:
    """Four bytes an element, up and down."""
    assert dense_bytes(elements) == 8 * elements
    assert abs(compression_ratio(elements, moved) * moved - dense_bytes(elements)) <= 1e-9 * dense_bytes(elements)


def test_before_anything_moved_nothing_is_saved() -> None:
    """No division by zero at the start of a run."""
    assert compression_ratio(0, 0) == 1.0
