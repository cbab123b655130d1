"""Settings: each is one that `thresher launch` takes, and unions are what random choices would come to."""

import shlex

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import parse_feedback
from thresher.deploy.advise.settings import (
    EVERYTHING,
    Setting,
    pool_of,
    settings_for,
    update_density,
)
from thresher.protos.errors import ConfigurationError
from thresher.worker import Method

densities = st.floats(1e-4, 1.0)
workers = st.integers(1, 64)


@pytest.mark.parametrize("one", settings_for([0.1, 0.01]), ids=lambda one: one.name)
def test_each_setting_is_one_of_ours(one: Setting) -> None:
    """Its options make a method, and its compressor a feedback for any model."""
    words = shlex.split(one.options)
    given_ = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    threshold, density = (None if given_.get(n) is None else float(given_[n]) for n in ("threshold", "density"))
    Method(given_.get("compressor", "HardThreshold"), threshold, density)
    parse_feedback(one.compressor, [(8,)])


def test_they_come_from_the_mildest_on() -> None:
    """First everything, and no density twice."""
    found = settings_for([0.001, 0.1, 0.1])
    assert found[0] == EVERYTHING
    assert found[0].is_everything
    assert [one.density for one in found] == [1.0, 1.0, *[0.1] * 3, *[0.001] * 3]


def test_densities_that_are_shown_alike_are_one() -> None:
    """As that of a run is, beside the one that was asked for."""
    names = [one.name for one in settings_for([0.01, 0.01003])]
    assert len(names) == len(set(names)) == 5


@given(st.lists(st.floats(1e-6, 1.0), max_size=8))
def test_no_two_settings_have_one_name(many: list[float]) -> None:
    found = settings_for(many)
    assert len({one.name for one in found}) == len({one.options for one in found}) == len(found)


@given(st.floats(0.001, 1.0))
def test_the_threshold_has_the_density(density: float) -> None:
    setting = settings_for([density])[2]
    density = setting.density
    sent = (torch.randn(200_000, generator=torch.Generator().manual_seed(1)).abs() >= setting.threshold).float().mean()
    assert float(sent) == pytest.approx(density, rel=0.25, abs=5e-4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigurationError, match="density"):
        settings_for([density])


@given(densities, workers, st.floats(1e-3, 1.0))
def test_a_union_is_between_one_push_and_all_of_them(density: float, count: int, pool: float) -> None:
    """And no larger than the pool; with one worker it is the push."""
    union = update_density(density, count, pool)
    assert density * (1 - 1e-9) <= union <= min(count * density, max(pool, density)) * (1 + 1e-9)
    assert update_density(density, 1, pool) == pytest.approx(density)


@given(densities, st.integers(2, 16), st.floats(1e-3, 1.0))
def test_the_pool_explains_the_union(density: float, count: int, pool: float) -> None:
    """Whichever pool is found, it has the union that was seen."""
    union = update_density(density, count, pool)
    assert update_density(density, count, pool_of(density, union, count)) == pytest.approx(union, rel=1e-6)
