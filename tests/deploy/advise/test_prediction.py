"""Predictions: the parts add up, the loaded link counts, and break-even is where two settings meet."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.deploy.advise.known import SPARSE, costs, link, way

from thresher.deploy.advise.delays import Delay
from thresher.deploy.advise.link import given_link
from thresher.deploy.advise.prediction import PARTS, Group, best, break_even, fastest_compressed, predict
from thresher.deploy.advise.samples import exactly
from thresher.deploy.advise.settings import settings_for

sizes = st.integers(1, 10**9)
seconds = st.floats(1e-6, 10.0)


def group(workers: int = 1, here: int = 1, compute: float = 0.0) -> Group:
    return Group(workers, here, exactly(compute))


def test_a_step_is_the_sum_of_its_parts() -> None:
    """Of one worker: 2 s of computing, three parts of 0.5 s, 1000 bytes each way at 1000 and 500 bytes a second."""
    found = predict(costs(seconds=0.5), link("a", up=1000.0, down=500.0, round_trip=0.2), group(compute=2.0))
    assert [getattr(found, part) for part in PARTS] == pytest.approx([2.0, 0.5, 1.1, 0.5, 2.1, 0.5])
    assert found.seconds == pytest.approx(6.7)
    assert found.low == found.high == pytest.approx(6.7)


@pytest.mark.parametrize(
    ("hosts", "workers", "here", "loads"),
    [
        (("a",), 4, 1, 4),  # all pushes come together at the only host of shards
        (("a", "a"), 4, 1, 4),
        (("a", "b"), 4, 1, 2),  # half of each push at each
        (("a", "b"), 2, 2, 2),  # the workers share a link themselves
        (("a", "b", "c", "d"), 2, 1, 1),  # the worker's own link
    ],
)
def test_the_link_that_is_loaded_most_counts(hosts: tuple[str, ...], workers: int, here: int, loads: float) -> None:
    """In units of one worker's whole push."""
    each = 1200 // len(hosts)
    found = predict(costs(push=[each] * len(hosts), pull=[0] * len(hosts)), link(*hosts), group(workers, here))
    assert found.up == pytest.approx(1.2 * loads)
    assert found.down == 0.0


def test_shards_behind_faster_links_are_no_bottleneck_where_that_is_said() -> None:
    known = replace(link("a"), shard_bandwidth=1e9)
    assert predict(costs(), known, group(workers=8)).up == pytest.approx(1.0)


def test_a_spread_of_what_was_measured_is_one_of_the_prediction() -> None:
    """And the wider, the wider; without one there is none."""
    narrow = replace(costs(), compress=np.array([0.9, 1.0, 1.1]))
    wide = replace(costs(), compress=np.array([0.5, 1.0, 1.5]))
    one, other = (predict(each, link(), group()) for each in (narrow, wide))
    assert other.low < one.low < one.seconds < one.high < other.high


def test_a_step_waits_for_the_slowest_worker_and_shard() -> None:
    """Of a second or three, drawn for each alone: with 16 of them one nearly always takes three."""
    uneven = replace(costs(push=[0] * 16, pull=[0] * 16), compress=np.array([1.0, 3.0]), shard=np.array([1.0, 3.0]))
    found = predict(uneven, link(*["a"] * 16), group(workers=16))
    assert (found.compress, found.shard, found.low, found.high) == (3.0, 3.0, 6.0, 6.0)


def test_a_step_has_one_slowest_worker() -> None:
    """Its parts are counted together: nobody computes for long and compresses for long where none does both."""
    either = replace(costs(push=[0], pull=[0]), compress=np.array([0.0, 1.0]), replay=np.array([0.0, 1.0]))
    found = predict(either, link(), group(workers=2, compute=1.0))
    assert found.low <= found.seconds <= found.high <= 3.0
    assert found.low < 3.0


def test_a_message_after_a_pause_takes_its_delay_besides() -> None:
    """A push of 1000 bytes half of the one at 2000; an update all of its own. None is over before it begins."""
    up, down = Delay((0, 2000), (exactly(0.0), exactly(0.5))), Delay((0,), (exactly(0.125),))
    slow = replace(link(round_trip=0.5), up_delay=up, down_delay=down)
    found = predict(costs(), slow, group())
    assert (found.up, found.down) == pytest.approx((1.5, 1.375))
    soon = replace(link(), up_delay=Delay((0,), (exactly(-9.0),)))
    assert predict(costs(), soon, group()).up == 0.0


@given(push=sizes, pull=sizes, saved=st.floats(0.0, 0.99), lost=seconds, workers=st.integers(1, 8))
def test_at_break_even_the_two_take_the_same_time(
    push: int, pull: int, saved: float, lost: float, workers: int
) -> None:
    """And with less bandwidth the sparse one is the faster."""
    dense = costs(push=[push], pull=[pull])
    sparse = costs(SPARSE, push=[int(push * saved)], pull=[int(pull * saved)], seconds=lost)
    bandwidth = break_even(dense, sparse, [[0]], group(workers))
    assert bandwidth is not None
    assert bandwidth > 0
    at, below = (given_link(bandwidth * factor, 0.0, 1, None) for factor in (1.0, 0.5))
    one, other = (predict(each, at, group(workers)).seconds for each in (dense, sparse))
    assert one == pytest.approx(other)
    assert predict(sparse, below, group(workers)).seconds < predict(dense, below, group(workers)).seconds


def test_what_costs_nothing_pays_everywhere_and_what_saves_nothing_nowhere() -> None:
    dense = costs(seconds=0.5)
    assert break_even(dense, costs(SPARSE, push=[10], pull=[10], seconds=0.5), [[0]], group()) is None
    assert break_even(dense, costs(SPARSE, seconds=0.6), [[0]], group()) == 0.0


def test_the_mildest_that_is_about_as_fast_is_the_best() -> None:
    """The fastest only where it is faster by more than a tenth."""
    settings = settings_for([0.1, 0.01])
    found = [
        predict(costs(setting, push=[0], pull=[0], seconds=taken / 3), link(), group())
        for setting, taken in zip(settings, [2.0, 1.5, 1.05, 1.2, 1.3, 1.0, 1.1, 1.2], strict=True)
    ]
    assert best(found).costs.setting.options == "--density 0.1"
    assert fastest_compressed(found).costs.setting.options == "--density 0.01"
    assert best(found[:1]) == found[0]


def test_a_way_has_its_name() -> None:
    assert way("a").host == "a"
