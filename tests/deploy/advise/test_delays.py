"""Delays of small messages: what was measured at its sizes, in between on a line, and beyond constant."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.advise.delays import NO_DELAY, Delay
from thresher.deploy.advise.samples import exactly

DELAY = Delay((0, 100, 300), (exactly(1.0), exactly(3.0), exactly(2.0)))


@pytest.mark.parametrize(("size", "seconds"), [(0, 1.0), (50, 2.0), (100, 3.0), (200, 2.5), (300, 2.0), (10**9, 2.0)])
def test_a_size_between_two_is_between_their_seconds(size: int, seconds: float) -> None:
    assert DELAY.drawn(size, 3, np.random.default_rng(0)).tolist() == pytest.approx([seconds] * 3)


@given(st.integers(0, 400), st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=5), st.integers(0, 99))
def test_what_is_drawn_is_within_what_was_measured(size: int, found: list[float], seed: int) -> None:
    delay = Delay((0, 100, 300), (np.array(found),) * 3)
    many = delay.drawn(size, 20, np.random.default_rng(seed))
    assert many.shape == (20,)
    assert min(found) - 1e-12 <= many.min() <= many.max() <= max(found) + 1e-12


@given(st.integers(0, 1 << 40))
def test_a_described_link_has_none(size: int) -> None:
    assert not NO_DELAY.drawn(size, 5, np.random.default_rng(0)).any()
