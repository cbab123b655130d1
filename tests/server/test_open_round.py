"""The open round: whose pushes it takes and when it is complete, whatever order they came in."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.dialogues import ASYNC, LOCKSTEP, QUORUM, SSP, push

from thresher.protos.consistency import Consistency
from thresher.server.members import Member, Waited
from thresher.server.open_round import OpenRound

EVERYBODY = [Member(rank) for rank in range(4)]


@given(st.permutations(range(4)), st.integers(0, 4), st.sampled_from([LOCKSTEP, QUORUM, SSP, ASYNC]))
def test_what_is_taken_is_in_rank_order_and_was_held_once(order: list[int], count: int, mode: Consistency) -> None:
    """Every push that came is in exactly one round, or still waits."""
    one, taken = OpenRound(), []
    for rank in order[:count]:
        one.hold(push(rank, 0), 1.0)
        one.let_in(mode, EVERYBODY, 1.0)
        while one.is_complete(mode, EVERYBODY, 1.0, 60.0):
            ranks = [found.worker.rank for found in one.take(1.0)]
            assert ranks == sorted(ranks)
            taken += ranks
            one.let_in(mode, EVERYBODY, 1.0)
    assert sorted([*taken, *one.waiting]) == sorted(order[:count])
    complete_without_waiting = mode.mode != "sync"
    assert len(taken) == (count if complete_without_waiting else 4 * (count == 4))


@given(st.lists(st.lists(st.floats(0, 9), min_size=4, max_size=4), min_size=1, max_size=3))
def test_each_push_waits_from_when_it_came_until_the_close(rounds: list[list[float]]) -> None:
    """Of the last round for each by itself; of all rounds added up, in the order in which they were."""
    one, totals, now = OpenRound(), dict.fromkeys(range(4), 0.0), 0.0
    for number, pauses in enumerate(rounds, 1):
        came = {}
        for rank, pause in enumerate(pauses):
            now += pause
            came[rank] = now
            one.hold(push(rank, number - 1), now)
            one.let_in(LOCKSTEP, EVERYBODY, now)
        one.take(now)
        assert one.waits == {rank: now - at for rank, at in came.items()}
        totals = {rank: total + one.waits[rank] for rank, total in totals.items()}
        assert one.waited == {rank: Waited(number, total) for rank, total in totals.items()}


def test_who_is_held_waits_too() -> None:
    """In ssp a push that is far ahead comes long before its round is opened; and a refill forgets what was here."""
    one = OpenRound()
    slow, fast = Member(0), Member(1, settled=2)
    one.hold(push(1, 2), 1.0)
    one.let_in(SSP, [slow, fast], 1.0)
    assert not one.pushes
    assert one.since() == 1.0
    slow.settled = 2
    one.let_in(SSP, [slow, fast], 4.0)
    assert one.opened_at == 4.0
    one.take(5.0)
    assert one.waits == {1: 4.0}
    one.hold(push(0, 2), 6.0)
    one.clear()
    assert one.since() == math.inf


def test_without_pushes_nothing_is_complete() -> None:
    """Also when nobody is awaited."""
    assert not OpenRound().is_complete(LOCKSTEP, [], 0.0, 60.0)
    assert OpenRound().since() == math.inf


@pytest.mark.parametrize(("now", "complete"), [(2.0, False), (2.9, False), (3.0, True)])
def test_a_quorum_waits_for_its_grace(now: float, complete: bool) -> None:
    """From when the quorum was first there; taking the round begins it anew."""
    one = OpenRound()
    for rank in (0, 1):
        one.hold(push(rank, 0), 2.0)
    one.let_in(QUORUM, EVERYBODY, 2.0)
    assert not one.is_complete(QUORUM, EVERYBODY, 2.0, 60.0)
    assert one.is_complete(QUORUM, EVERYBODY, now, 60.0) == complete
    one.clear()
    assert not one.waiting


def test_in_ssp_the_slowest_sets_the_pace() -> None:
    """Who is further ahead than the staleness is held until the slowest has moved; the rest pass it."""
    members = [Member(0, settled=3), Member(1, settled=1)]
    one = OpenRound()
    one.hold(push(0, 3), 1.0)
    one.hold(push(1, 1), 2.0)
    one.let_in(SSP, members, 2.0)
    assert (list(one.pushes), list(one.waiting), one.since()) == ([1], [1, 0], 1.0)
    members[1].settled = 2
    one.take(3.0)
    one.let_in(SSP, members, 3.0)
    assert (list(one.pushes), one.opened_at) == ([0], 3.0)


def test_a_round_below_its_quorum_closes_after_a_lease() -> None:
    """Shards close rounds of different members: who is missed here may be waiting for somebody else's push there."""
    one = OpenRound()
    one.hold(push(0, 0), 1.0)
    one.let_in(QUORUM, EVERYBODY, 1.0)
    assert not one.is_complete(QUORUM, EVERYBODY, 60.9, 60.0)
    assert one.is_complete(QUORUM, EVERYBODY, 61.0, 60.0)
