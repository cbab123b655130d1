"""Rates from counters: laws first."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.watching_rates import KEPT, Pace, Rates, sparkline, total
from thresher.v1 import aggregation_pb2 as pb

counts = st.integers(0, 2**40)


def counters(version: int, up: int = 0, down: int = 0) -> pb.StatisticsResponse:
    half = up // 2
    workers = [
        pb.WorkerStatistics(rank=0, push_bytes=half, pull_bytes=down),
        pb.WorkerStatistics(rank=1, push_bytes=up - half),
    ]
    return pb.StatisticsResponse(version=version, workers=workers)


looks = st.none() | st.builds(counters, counts, counts, counts)


@given(st.lists(st.tuples(looks, st.floats(0, 1000)), max_size=30))
def test_no_rate_is_negative_or_infinite_whatever_is_seen(
    seen: list[tuple[pb.StatisticsResponse | None, float]],
) -> None:
    """Counters that jump either way, shards that are silent, a clock that stands still."""
    pace, now = Pace(), 0.0
    for shard, seconds in seen:
        now += seconds
        rates = pace.see(shard, now)
        for value in (rates.up, rates.down, rates.per_second, rates.age, *pace.history):
            assert value is None or (math.isfinite(value) and value >= 0)


@given(st.lists(st.tuples(st.integers(1, 1000), counts, counts), min_size=1, max_size=30))
def test_bytes_per_iteration_add_up_to_what_was_counted(steps: list[tuple[int, int, int]]) -> None:
    """Times the iterations they are of, they are the difference between the last look and the first."""
    pace, version, up, down = Pace(), 0, 0, 0
    pace.see(counters(0), 0.0)
    for index, (iterations, more_up, more_down) in enumerate(steps):
        version, up, down = version + iterations, up + more_up, down + more_down
        rates = pace.see(counters(version, up, down), index + 1.0)
        assert rates.up == pytest.approx(more_up / iterations)
        assert rates.down == pytest.approx(more_down / iterations)
    found = sum(each * iterations for each, (iterations, _, _) in zip(pace.history, steps, strict=True))
    assert found == pytest.approx(up + down)


@given(st.floats(0.01, 100), st.integers(1, 50), st.integers(2, 20))
def test_a_steady_run_has_its_own_pace(seconds: float, iterations: int, number: int) -> None:
    pace = Pace()
    *_, rates = [pace.see(counters(look * iterations), look * seconds) for look in range(number + 1)]
    assert rates.per_second == pytest.approx(iterations / seconds)
    assert not rates.is_late


def test_slow_iterations_are_measured_over_many_looks() -> None:
    """One in ten seconds, looked at each second: the pace does not fall to zero in between."""
    pace = Pace()
    found = [pace.see(counters(second // 10), float(second)) for second in range(60)]
    assert found[9].per_second is None
    assert {rates.per_second for rates in found[20:]} == {0.1}
    assert [rates.age for rates in found[20:30]] == [float(age) for age in range(10)]


def test_an_iteration_is_late_after_ten_times_the_usual() -> None:
    pace = Pace()
    for second in range(10):
        pace.see(counters(second), float(second))
    assert not pace.see(counters(9), 19.0).is_late
    late = pace.see(None, 19.5)
    assert (late.is_late, late.per_second, late.age) == (True, 0.0, 10.5)
    assert not pace.see(counters(10), 20.0).is_late


def test_counters_that_begin_anew_are_a_new_beginning() -> None:
    """A shard that has lost what it counted: nothing is known of the time between, and then its pace again."""
    pace = Pace()
    pace.see(counters(100, 1000, 2000), 0.0)
    assert pace.see(counters(110, 1100, 2200), 1.0).up == 10
    assert pace.see(counters(112, 0, 0), 2.0).up == 10  # the model goes on, the bytes begin anew
    assert pace.see(counters(122, 50, 60), 3.0).up == 5
    assert list(pace.history) == [30.0, 11.0]


def test_only_so_much_is_remembered() -> None:
    pace = Pace()
    for look in range(3 * KEPT):
        pace.see(counters(look, look), float(look))
    assert len(pace.history) == KEPT


def test_a_run_moves_what_its_shards_move_at_the_pace_of_the_last() -> None:
    one, other = Rates(10.0, 20.0, 5.0, 0.5), Rates(1.0, 2.0, 4.0, 2.0, is_late=True)
    assert total([one, other]) == Rates(11.0, 22.0, 4.0, 2.0, is_late=True)
    assert total([one, Rates()]) == one
    assert total([]) == Rates()


@given(st.lists(st.floats(0, 1e12), max_size=40), st.integers(1, 30))
def test_a_sparkline_has_a_bar_for_each_value_and_a_full_one_for_the_largest(values: list[float], width: int) -> None:
    drawn, shown = sparkline(values, width), values[-width:]
    assert len(drawn) == len(shown)
    assert set(drawn) <= set("▁▂▃▄▅▆▇█")
    if max(shown, default=0) > 0:
        assert drawn[shown.index(max(shown))] == "█"
