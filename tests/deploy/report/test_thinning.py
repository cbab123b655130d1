"""Thinning hides nothing: laws first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thresher.deploy.report.rows import Numbers
from thresher.deploy.report.thinning import stretches, thin, thin_growing

values = arrays(np.float64, st.integers(1, 300), elements=st.floats(-1e6, 1e6))
points = st.integers(1, 50)


def places(y: Numbers) -> Numbers:
    return np.arange(1.0, y.size + 1)


@given(values, points)
def test_no_extreme_is_lost(y: Numbers, most: int) -> None:
    """The band reaches from the least value of all to the largest, and the mean lies in it."""
    thinned = thin(places(y), y, most)
    assert thinned.x.size <= most
    assert (thinned.least.min(), thinned.most.max()) == (y.min(), y.max())
    slack = 1e-9 * max(1.0, np.abs(y).max())
    assert (thinned.least <= thinned.mean + slack).all()
    assert (thinned.mean <= thinned.most + slack).all()


@given(values, points)
def test_the_mean_of_all_stays(y: Numbers, most: int) -> None:
    """Each stretch counts by its length; lengths differ by one at most."""
    counts = np.diff([*stretches(y.size, most), y.size])
    assert counts.max() - counts.min() <= 1
    assert np.average(thin(places(y), y, most).mean, weights=counts) == pytest.approx(y.mean(), abs=1e-6)


@given(values)
def test_a_short_series_stays_as_it_is(y: Numbers) -> None:
    """Every value a stretch of its own."""
    thinned = thin(places(y), y, y.size)
    for column in (thinned.mean, thinned.least, thinned.most):
        assert (column == y).all()
    assert (thinned.x == places(y)).all()


@given(values, points, st.data())
def test_what_is_not_finite_is_left_out(y: Numbers, most: int, data: st.DataObject) -> None:
    """As if it had not been there."""
    holes = data.draw(arrays(np.bool_, y.size))
    strange = np.where(holes, data.draw(st.sampled_from([np.nan, np.inf, -np.inf])), y)
    left, right = thin(places(y), strange, most), thin(places(y)[~holes], y[~holes], most)
    assert (left.x == right.x).all()
    assert (left.mean == right.mean).all()


@given(values, points)
def test_a_growing_series_keeps_its_values_and_its_end(y: Numbers, most: int) -> None:
    """Every point is one of the series; the last one is the last."""
    growing = np.cumsum(np.abs(y))
    thinned = thin_growing(places(y), growing, most)
    assert thinned.x.size <= most
    assert (growing[thinned.x.astype(int) - 1] == thinned.mean).all()
    assert thinned.mean[-1] == growing[-1]
