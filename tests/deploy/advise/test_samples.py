"""Samples: drawing from one gives back what was measured, and nothing else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.advise.samples import drawn, exactly, middle

numbers = st.lists(st.floats(0, 1e9), min_size=1, max_size=9)


@given(numbers, st.integers(0, 99))
def test_what_is_drawn_was_measured(found: list[float], seed: int) -> None:
    many = drawn(np.array(found), 50, np.random.default_rng(seed))
    assert many.shape == (50,)
    assert set(many) <= set(found)
    assert min(found) <= middle(many) <= max(found)


def test_what_is_known_has_no_spread() -> None:
    assert set(drawn(exactly(0.25), 20, np.random.default_rng(0))) == {0.25}
