"""Quorum, ssp, async and the shadow: one rule for all, so each test says when a round closes and by what it divides."""

import math
from dataclasses import replace

import pytest
import torch
from tests.server.dialogues import (
    ASYNC,
    CONFIG,
    NUMEL,
    QUORUM,
    SSP,
    Journaled,
    begin,
    close_round,
    hello,
    history_of,
    leave,
    of,
    only,
    parameters,
    push,
    register,
    say,
    seed,
    snapshot_of,
    training,
)

from thresher.protos.consistency import Consistency
from thresher.protos.errors import BehindError
from thresher.protos.optimizers import Override
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Update
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import Verdict, Worker
from thresher.server.shard import Shard

SHADOW = Consistency(downlink="shadow", shadow_threshold=0.75)
FOLLOWED = Consistency("async", downlink="shadow")


def updates(done: list[Effect]) -> list[Update]:
    return [one.sealed.update for one in of(effects.Publish, done)]


@pytest.mark.parametrize("mode", [Consistency(), QUORUM, SSP, ASYNC], ids=Consistency.describe)
def test_the_divisor_is_the_number_of_members_in_every_mode(mode: Consistency) -> None:
    """No mode changes the learning rate: three workers that push 3.0 once move the model by 3.0."""
    shard = training(3, replace(mode, grace=0.0))
    done = [effect for rank in range(3) for effect in say(shard, push(rank, 0, 3.0, version=0))]
    if mode.quorum:  # the third was late, and is in the round that is open
        assert parameters(shard) == [-2.0] * NUMEL
        done += say(shard, push(0, 1, None))
    assert {update.members for update in updates(done)} == {3}
    total = sum(update.mean.values for update in updates(done) if update.mean is not None)
    assert torch.equal(torch.as_tensor(total), torch.full((NUMEL,), 3.0))


# --- quorum ------------------------------------------------------------------------------------------------


def test_a_quorum_waits_for_its_grace_and_a_late_push_joins_the_next_round() -> None:
    """Two of three are enough after a second; the third is APPLIED one version late, and no weight is lost."""
    shard = training(3, QUORUM)
    say(shard, push(0, 0), 0.0)
    assert not updates(say(shard, push(1, 0), 10.0))
    assert not updates(say(shard, events.Tick(), 10.9))
    (update,) = updates(say(shard, events.Tick(), 11.0))
    assert (update.members, update.arrivals) == (3, ((0, 0), (1, 0)))
    assert not updates(say(shard, push(2, 0, version=0), 12.0))
    done = say(shard, push(1, 1), 12.0)
    (late,) = updates([*done, *say(shard, events.Tick(), 13.0)])
    assert (late.members, late.arrivals) == (3, ((1, 1), (2, 0)))
    assert shard.statistics().last_row is not None
    assert [row.staleness for row in [shard.statistics().last_row] if row] == [1]


def test_a_quorum_does_not_wait_when_all_are_there() -> None:
    """The grace is for those who are missing."""
    shard = training(3, QUORUM)
    assert len(updates(close_round(shard, range(3), 0))) == 1


def test_a_grace_begins_anew_with_each_round() -> None:
    """The time at which the last round had its quorum says nothing about the next."""
    shard = training(3, QUORUM)
    close_round(shard, (0, 1), 0, now=0.0)
    say(shard, events.Tick(), 1.0)
    assert not updates(close_round(shard, (0, 1), 1, now=5.0))
    assert not updates(say(shard, events.Tick(), 5.5))
    assert len(updates(say(shard, events.Tick(), 6.0))) == 1


def test_who_is_late_has_the_schedule_of_its_own_step() -> None:
    """Steps differ in one round, so their rates may; the newest is in force. At one step all must have the same."""
    shard = training(3, replace(QUORUM, grace=0.0))
    close_round(shard, (0, 1), 0)
    say(shard, push(2, 0, version=0))
    (update,) = updates(say(shard, push(0, 1, overrides=(Override(0, "lr", 0.5),))))
    assert update.overrides == (Override(0, "lr", 0.5),)
    say(shard, push(2, 1, version=1))
    refused = only(effects.Judged, say(shard, push(1, 1, version=1, overrides=(Override(0, "lr", 0.25),))))
    assert refused.verdict is Verdict.REJECTED


def test_a_newcomer_that_pushes_at_once_counts_in_the_divisor() -> None:
    """More pushes than members: no gradient gets a weight above 1 over those who were heard, and the update says so."""
    shard = training(2, QUORUM)
    for event in (register(2, consistency=QUORUM), hello(2), push(2, 0, 3.0), push(0, 0, 3.0)):
        say(shard, event)
    (update,) = updates(say(shard, push(1, 0, 3.0)))
    assert (update.members, update.membership) == (3, Membership(1, (0, 1, 2)))
    assert update.mean is not None
    assert update.mean.values.tolist() == [3.0] * NUMEL


# --- ssp and async -----------------------------------------------------------------------------------------


def test_in_async_each_push_is_a_round() -> None:
    """Nobody waits, and each row tells the push's age in versions."""
    shard = training(2, ASYNC)
    for step in range(3):
        (update,) = updates(say(shard, push(0, step)))
        assert update.arrivals == ((0, step),)
    done = say(shard, push(1, 0, version=0))
    assert only(effects.WriteRow, done).row.staleness == 3
    assert shard.statistics().version == 4


def test_in_ssp_who_is_too_far_ahead_waits_for_the_slowest() -> None:
    """Staleness 1: step 2 of one waits for step 0 of the other, and is a round of its own then."""
    shard = training(2, SSP)
    for step in (0, 1):
        assert len(updates(say(shard, push(0, step)))) == 1
    assert not updates(say(shard, push(0, 2)))
    arrivals = [update.arrivals for update in updates(say(shard, push(1, 0, version=0)))]
    assert arrivals == [((1, 0),), ((0, 2),)]


@pytest.mark.parametrize("crashed", [False, True])
def test_in_ssp_a_newcomer_begins_at_the_pace_of_the_slowest(crashed: bool) -> None:
    """Its first step holds nobody up, and from there it is waited for like the others, also after a restart."""
    journal = Journaled(CONFIG)
    journal.keep(begin(journal.shard, 2, SSP))
    for step in range(10):
        for rank in (0, 1):
            journal.say(push(rank, step))
    here = history_of(journal.shard)
    for event in (register(2, consistency=SSP), hello(2, here), push(0, 10, version=20)):
        journal.say(event)
    if crashed:
        journal.crash()
        for rank in range(3):
            journal.say(hello(rank, history_of(journal.shard)))
    assert journal.shard._state.members.counted[2].pace == 10
    assert len(updates(journal.say(push(0, 11, version=20)))) == 1
    assert not updates(journal.say(push(0, 12, version=20)))
    assert len(updates(journal.say(push(1, 10, version=20)))) == 1
    assert [one.arrivals for one in updates(journal.say(push(2, 0, version=20)))] == [((2, 0),), ((0, 12),)]
    journal.check_replay()


def test_in_ssp_nobody_waits_for_who_has_gone() -> None:
    """Whether it left, or was away for longer than its lease."""
    for event, now in ((leave(1), 0.0), (events.Disconnect(Worker(1, 1)), CONFIG.lease)):
        shard = training(2, SSP)
        for step in range(3):
            say(shard, push(0, step))
        done = [*say(shard, event), *say(shard, events.Tick(), now)]
        assert [update.arrivals for update in updates(done)] == [((0, 2),)]


def test_steps_follow_each_other_where_there_is_no_lockstep() -> None:
    """A step that was left out was never pushed, or is lost: it is told, not guessed."""
    shard = training(2, ASYNC)
    refused = only(effects.Judged, say(shard, push(0, 1, version=0)))
    assert (refused.verdict, refused.reason) == (
        Verdict.REJECTED, "worker 0 (host:0) pushed step 1; its step 0 is next",
    )  # fmt: skip


def test_a_push_that_is_too_old_is_returned_and_again_when_it_is_repeated() -> None:
    """It consumes its step, it is appended before it is told, it never counts, and the next one is welcome."""
    journal = Journaled(CONFIG)
    begin(journal.shard, 2, replace(ASYNC, max_staleness=1))
    for step in (0, 1):
        say(journal.shard, push(0, step))
    done = say(journal.shard, push(1, 0, version=0))
    assert isinstance(done[0], effects.Append)
    judged = only(effects.Judged, done)
    assert (judged.verdict, judged.reason) == (
        Verdict.RETURNED, "it was computed 2 versions ago, 1 are allowed",
    )  # fmt: skip
    assert say(journal.shard, push(1, 0, version=0)) == [effects.Judged(0, Verdict.RETURNED)]
    conflict = only(effects.Judged, say(journal.shard, push(1, 0, 2.0, version=2)))
    assert conflict.verdict is Verdict.REJECTED
    assert len(updates(say(journal.shard, push(1, 1, version=2)))) == 1
    assert parameters(journal.shard) != [0.0] * NUMEL
    assert journal.shard.statistics().members[1].steps == 1


def test_a_returned_push_lets_those_go_on_who_waited_for_its_step() -> None:
    """In ssp the slowest has moved, although nothing was applied."""
    shard = training(2, Consistency("ssp", staleness=1, max_staleness=1))
    for step in range(2):
        say(shard, push(0, step))
    assert not updates(say(shard, push(0, 2)))
    assert len(updates(say(shard, push(1, 0, version=0)))) == 1


# --- the shadow --------------------------------------------------------------------------------------------


def test_workers_that_copy_the_shadow_are_told_of_assignments() -> None:
    """What moved by the threshold, as values; the mean stays here. In lockstep everybody hears of each round."""
    shard = training(2, SHADOW)
    say(shard, push(0, 0, [2.0, 0.5, 0.0, 0.0]))
    publish = only(effects.Publish, say(shard, push(1, 0, [0.0, 0.5, 0.0, 0.0])))
    told = publish.sealed.update
    assert (publish.ranks, told.mean, told.assigned_versions) == ((0, 1), None, 1)
    assert told.assignments is not None
    assert told.assignments.densify().tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert parameters(shard) == [-1.0, -0.5, 0.0, 0.0]
    assert snapshot_of(shard).tensors["shadow"].tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_in_async_a_worker_is_told_of_the_shadow_when_its_push_is_answered() -> None:
    """Everything since the last time in one, each coordinate once; a worker that only waits hears nothing."""
    shard = training(2, Consistency("async", downlink="shadow", shadow_threshold=0.5))
    for step in range(2):
        assert only(effects.Publish, say(shard, push(0, step, 2.0))).ranks == (0,)
    publish = only(effects.Publish, say(shard, push(1, 0, None, version=0)))
    assert (publish.ranks, publish.sealed.update.assigned_versions) == ((1,), 3)
    assert publish.sealed.update.assignments is not None
    assert publish.sealed.update.assignments.densify().tolist() == parameters(shard)


def test_a_worker_that_copies_the_shadow_hears_of_the_members_whichever_round_it_is_told_of() -> None:
    """It hears of rounds that its push was in, and of the newest when it comes back: who left in between is told."""
    shard = training(3, FOLLOWED)
    before = history_of(shard)
    say(shard, leave(2))
    assert [update.membership for update in updates(say(shard, push(0, 0)))] == [Membership(1, (0, 1))]
    say(shard, push(0, 1))
    assert [update.membership for update in updates(say(shard, push(1, 0, version=0)))] == [Membership(1, (0, 1))]
    (missed,) = only(effects.Backlog, say(shard, hello(1, before))).updates
    assert missed.update.membership == Membership(1, (0, 1))


def test_other_shards_do_not_say_who_belongs_to_the_run() -> None:
    """Theirs may be older than what the first shard says."""
    shard = Shard(replace(CONFIG, shard=1, shards=2))
    for rank in (0, 1):
        say(shard, register(rank, consistency=FOLLOWED, shard=1, shards=2))
    for event in (seed(numel=2), hello(0)):
        say(shard, event)
    assert [update.membership for update in updates(say(shard, push(0, 0, [1.0, 1.0])))] == [None]


def test_a_push_that_was_applied_while_its_worker_was_away_is_told_so() -> None:
    """Its update went where nobody read it, and the newest, which tells all of the shadow, is of another's push."""
    shard = training(2, FOLLOWED)
    before = history_of(shard)
    say(shard, push(1, 0))
    say(shard, events.Disconnect(Worker(1, 1)))
    say(shard, push(0, 0, version=0))
    (missed,) = only(effects.Backlog, say(shard, hello(1, before))).updates
    assert missed.update.arrivals == ((0, 0),)
    assert say(shard, push(1, 0)) == [effects.Judged(0, Verdict.APPLIED)]


def test_who_comes_back_gets_what_the_shadow_has_assigned_since() -> None:
    """Within what is kept; behind it there is the snapshot."""
    shard = training(2, SHADOW)
    say(shard, events.Disconnect(Worker(1, 1)))
    before = history_of(shard)
    for rank in (0, 1):
        say(shard, hello(rank, before)) if rank else None
        say(shard, push(rank, 0, 4.0))
    say(shard, events.Disconnect(Worker(1, 1)))
    (missed,) = only(effects.Backlog, say(shard, hello(1, before))).updates
    assert missed.update.assignments is not None
    assert missed.update.assignments.densify().tolist() == [-4.0] * NUMEL
    now = history_of(shard)
    assert only(effects.Backlog, say(shard, hello(1, now))).updates == ()


def test_who_was_told_too_long_ago_is_told_all_of_the_shadow() -> None:
    """A round that has been closed is appended and told whatever the shadow has forgotten."""
    shard = training(2, Consistency("async", downlink="shadow"))
    shadow = shard._state.shadow
    assert shadow is not None
    shadow._cap_bytes = 0
    for step in range(3):
        say(shard, push(0, step, [1.0, 0.0, 0.0, 0.0]))
    with pytest.raises(BehindError):
        shadow.since(0)
    done = say(shard, push(1, 0, [0.0, 1.0, 0.0, 0.0], version=0))
    told = only(effects.Publish, done).sealed.update
    assert isinstance(done[0], effects.Append)
    assert told.assignments is not None
    assert told.assignments.count == NUMEL
    assert told.assignments.densify().tolist() == parameters(shard)


@pytest.mark.parametrize("gradient", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("mode", [Consistency(), ASYNC], ids=Consistency.describe)
def test_what_is_not_finite_is_rejected_in_every_mode(gradient: float, mode: Consistency) -> None:
    """One worker's overflow spoils nobody's model."""
    wrong = SparseGradient.dense(torch.tensor([0.0, gradient, 0.0, 0.0]))
    refused = only(effects.Judged, say(training(2, mode), push(0, 0, wrong)))
    assert (refused.verdict, refused.reason) == (
        Verdict.REJECTED, "worker 0 (host:0) pushed NaN or infinity in step 0",
    )  # fmt: skip
