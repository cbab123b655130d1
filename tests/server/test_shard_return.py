"""Workers that come back after rounds were closed without them, at one shard or at all: nobody is refused."""

import pytest
from tests.server.dialogues import (
    CONFIG,
    PAIR,
    close_round,
    hello,
    history_of,
    only,
    part_of_two,
    push,
    say,
    snapshot_of,
    training,
)

from thresher.protos.bookmark import Bookmark
from thresher.server import effects, events
from thresher.server.events import Verdict, Worker

LEASE = CONFIG.lease


def lost(rank: int) -> events.Disconnect:
    return events.Disconnect(Worker(rank, 1))


# --- a push that comes after its round ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "late",
    [push(1, 1, PAIR, version=2), push(1, 0, PAIR, version=2), push(1, 1, None, version=2, lost=True)],
    ids=["later shard", "two later", "lost"],
)
def test_a_worker_that_was_cut_from_one_shard_has_its_pushes_back(late: events.Push) -> None:
    """It follows that shard's rounds, so its next push is of a version beyond its step: RETURNED, and the run goes on.

    The other shard waited for it meanwhile, and its step is the one that is open there.
    """
    shard = part_of_two(1, 2)
    say(shard, lost(1), 0.0)
    for step in (0, 1):
        say(shard, push(0, step, PAIR), LEASE)
        say(shard, events.Tick(), LEASE)
    say(shard, hello(1, history_of(shard)), LEASE)
    judged = only(effects.Judged, say(shard, late, LEASE))
    assert judged.verdict is Verdict.RETURNED
    assert f"round {late.step} was closed without worker 1" in judged.reason
    say(shard, push(0, 2, PAIR), LEASE)
    assert only(effects.Publish, say(shard, push(1, 2, PAIR), LEASE)).sealed.update.contributors == (0, 1)


@pytest.mark.parametrize("others", [[], [push(0, 1)]], ids=["nobody", "a gradient"])
def test_a_push_for_a_mean_that_comes_after_its_round_is_returned(others: list[events.Push]) -> None:
    """Whatever the others push by then: they are in another round."""
    shard = training(3)
    before = history_of(shard)
    say(shard, lost(1), 0.0)
    for rank in (0, 2):
        say(shard, push(rank, 0, only_mean=True))
    say(shard, events.Tick(), LEASE)
    say(shard, hello(1, before), LEASE)
    for one in others:
        say(shard, one, LEASE)
    late = push(1, 0, only_mean=True)
    assert only(effects.Judged, say(shard, late, LEASE)).verdict is Verdict.RETURNED
    assert say(shard, late, LEASE) == [effects.Judged(0, Verdict.RETURNED)]


def test_a_push_for_a_mean_that_nobody_remembers_is_told_its_verdict() -> None:
    """Its worker must not wait for the mean; while it is the newest round, it is told before the verdict."""
    shard = training()
    done = [effect for rank in (0, 1) for effect in say(shard, push(rank, 0, only_mean=True))]
    told = only(effects.Publish, done).sealed
    again = say(shard, push(1, 0, only_mean=True))
    assert again == [effects.Publish(told, (1,)), effects.Judged(0, Verdict.APPLIED)]
    close_round(shard, (0, 1), 1)
    assert shard.statistics().verdicts["applied"] == 4
    say(shard, events.Tick())
    assert say(shard, push(1, 1)) == [effects.Judged(1, Verdict.APPLIED)]
    assert shard.statistics().verdicts == {"applied": 4, "duplicate": 2, "returned": 0, "rejected": 0}


def test_an_update_says_where_the_loops_are() -> None:
    """The furthest place that was told; where nobody tells, as with means, they are where they were."""
    shard = training(2)
    first, second = (Bookmark(step, 1, 1, 0, ((2, step),)) for step in (1, 2))
    for step, told, expected in ((0, (None, first), first), (1, (second, first), second), (2, (None, None), second)):
        say(shard, push(0, step, bookmark=told[0]))
        update = only(effects.Publish, say(shard, push(1, step, bookmark=told[1]))).sealed.update
        assert update.bookmark == snapshot_of(shard).bookmark == expected
