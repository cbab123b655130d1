"""Time-outs: what is accepted keeps the order, what breaks it is refused with both names, and the rest follows."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos import timeouts
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import (
    JOURNAL_SECONDS,
    ORDER,
    check_timeouts,
    latest_answer,
    longest_pause,
    longest_wait,
    patience_with_shards,
)
from thresher.protos.transport import CHANNEL_OPTIONS, SERVER_OPTIONS

NAMES = sorted({name for rule in ORDER for name in (rule.shorter, rule.longer)})
PAGE = Path(__file__).parents[2] / "docs" / "survival.md"
seconds = st.one_of(st.sampled_from([0.0, 1.0, 60.0]), st.floats(0, 1e9))


@given(st.dictionaries(st.sampled_from([*NAMES, "linger"]), seconds))
def test_what_is_accepted_keeps_the_order_and_nothing_else_is_refused(known: dict[str, float]) -> None:
    """Law: accepted exactly where every rule of which both sides are known holds; a refusal names both, and why."""
    broken = [
        rule for rule in ORDER if rule.shorter in known and known[rule.shorter] > known.get(rule.longer, math.inf)
    ]
    if not broken:
        check_timeouts(**known)
        return
    with pytest.raises(ConfigurationError) as caught:
        check_timeouts(**known)
    said, rule = str(caught.value), broken[0]
    assert all(name.replace("_", " ") in said for name in (rule.shorter, rule.longer))
    assert rule.otherwise in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(name: str, value: float) -> None:
    """The message has the name."""
    with pytest.raises(ConfigurationError, match=f"{name.replace('_', ' ')} must be finite and not negative"):
        check_timeouts(**{name: value})


def test_no_rule_contradicts_another() -> None:
    """There is an order of all of them, shortest first, in which every rule holds."""
    left, found = set(NAMES), 0
    while left:
        free = {name for name in left if all(r.shorter not in left for r in ORDER if r.longer == name)}
        assert free, f"in a circle: {left}"
        left, found = left - free, found + len(free)
    assert found == len(NAMES)


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are in the repository")
def test_the_page_has_every_rule() -> None:
    """What is documented is what is checked."""
    lines = PAGE.read_text("utf-8").splitlines()
    rows = {tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in lines}
    assert {(rule.shorter, rule.longer, rule.otherwise) for rule in ORDER} <= rows


def test_the_defaults_keep_the_order() -> None:
    """Whoever sets nothing is refused nowhere."""
    check_timeouts(
        grace=0.0,
        lease=timeouts.LEASE_SECONDS,
        round_timeout=timeouts.ROUND_SECONDS,
        reconnect_timeout=timeouts.RECONNECT_SECONDS,
        restart_delay=timeouts.RESTART_SECONDS,
    )


@given(seconds, seconds, seconds, seconds)
def test_the_shard_speaks_first(start: float, patience: float, lease: float, reconnect: float) -> None:
    """A worker outwaits a round, the lease of who was lost at its end, and a disk that is full then."""
    answer = latest_answer(start_timeout=start, round_timeout=patience, lease=lease)
    assert answer >= max(start, patience)
    assert answer >= lease + patience
    assert longest_wait(answer, reconnect) > answer
    assert longest_wait(answer, reconnect) > reconnect


@given(seconds, seconds)
def test_who_is_started_again_is_in_time(lease: float, delay: float) -> None:
    """Pauses grow to half a lease at most; workers look for a shard until it was started and has read its journal."""
    pause = longest_pause(lease, delay)
    assert pause <= max(delay, lease / 2)
    assert patience_with_shards(lease, delay) >= max(lease, pause + JOURNAL_SECONDS)


def test_the_network_is_given_up_before_a_lease_ends() -> None:
    """Who vanishes without a word is noticed by pings, on both sides, in less than the default lease."""
    for options in (CHANNEL_OPTIONS, SERVER_OPTIONS):
        found = dict(options)
        silence = (found["grpc.keepalive_time_ms"] + found["grpc.keepalive_timeout_ms"]) / 1000
        assert silence == timeouts.PING_SECONDS + timeouts.PONG_SECONDS
        assert silence < timeouts.LEASE_SECONDS
