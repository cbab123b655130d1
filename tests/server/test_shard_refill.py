"""A shard that has lost what workers were told goes on from the replica of one of them, also after a leave."""

from dataclasses import replace
from typing import Any

import pytest
from tests.server.dialogues import (
    ASYNC,
    CONFIG,
    PAIR,
    Journaled,
    begin,
    close_round,
    hello,
    history_of,
    lasting,
    leave,
    of,
    only,
    parameters,
    part_of_two,
    push,
    register,
    say,
    snapshot_of,
    training,
)

from thresher.protos.bookmark import Bookmark
from thresher.protos.consistency import Consistency
from thresher.protos.errors import DataLossError, LostHistoryError, ProtocolError
from thresher.protos.update import Membership
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import Verdict, Worker
from thresher.server.shard import Shard

LEASE = CONFIG.lease


def journaled() -> Journaled:
    journal = Journaled(CONFIG)
    journal.keep(begin(journal.shard, 2, Consistency()))
    return journal


def refill_of(shard: Shard, **changes: Any) -> events.Refill:
    """What the replica of worker 0 holds when it has followed ``shard``."""
    found = snapshot_of(shard)
    state = {name: value for name, value in found.tensors.items() if not name.startswith("untrained.")}
    return replace(events.Refill(Worker(0, 1), found.history, state, {}, (), None, found.membership), **changes)


@pytest.mark.parametrize("forgotten", ["everything", "the tail"])
def test_a_worker_refills_a_shard_that_has_lost_what_it_was_told(forgotten: str) -> None:
    """It goes on from there as if nothing had been; the others are told to find out; it is on disk before that."""
    undisturbed = training()
    for step in range(3):
        close_round(undisturbed, (0, 1), step, value=float(step))
    journal = journaled()
    if forgotten == "the tail":
        close_round(journal.shard, (0, 1), 0, value=0.0)
    refill = refill_of(undisturbed)
    with pytest.raises(LostHistoryError, match="lost the end of its log"):
        journal.say(hello(0, refill.history))
    done = journal.say(refill)
    assert isinstance(done[0], effects.Checkpoint)
    assert done[0].wait
    assert only(effects.Seeded, done).accepted
    assert only(effects.Restart, done).ranks == (1,)
    assert "refilled from the replica of worker 0" in only(effects.Notice, done).text
    assert only(effects.Seeded, journal.say(refill)).accepted is False
    assert journal.say(push(1, 2, 2.0)) == [effects.Judged(2, Verdict.APPLIED)]
    assert lasting(journal.replayed()) == lasting(journal.shard._state)  # its checkpoint is where replay begins
    for shard in (undisturbed, journal.shard):
        close_round(shard, (0, 1), 3)
    assert parameters(journal.shard) == parameters(undisturbed)
    assert history_of(journal.shard) == history_of(undisturbed)


def test_a_refilled_shard_knows_where_the_loops_are() -> None:
    """As the worker has heard that: whoever comes without a memory goes on there."""
    told, shard = training(), training()
    places = [Bookmark(step, 1, 1, 0, ((2, step),)) for step in (1, 2, 3)]
    for one, steps in ((told, 2), (shard, 1)):
        for step in range(steps):
            for rank in (0, 1):
                say(one, push(rank, step, bookmark=places[step]))
    assert snapshot_of(shard).bookmark == places[0]
    say(shard, refill_of(told, bookmark=places[1]))
    assert snapshot_of(shard).bookmark == places[1]
    for rank in (0, 1):
        say(shard, hello(rank, history_of(told)))
        say(shard, push(rank, 2, bookmark=places[2]))
    assert snapshot_of(shard).bookmark == places[2]


def test_a_refilled_shard_knows_how_many_agreements_there_have_been() -> None:
    """The numbers are gone, how many there were is told with the place of the loops: the next one is made as ever."""
    told, journal = training(), journaled()
    close_round(told, (0, 1), 0)
    journal.say(refill_of(told, bookmark=Bookmark(1, 1, 1, 0, ((2, 1),), agreements=2)))
    for rank in (0, 1):
        journal.say(hello(rank, history_of(told)))
    with pytest.raises(ProtocolError, match="asks for agreement 1, which is forgotten; 2 is next"):
        journal.say(events.Agree(Worker(0, 1), 1, {"loss": 1.0}))
    journal.say(events.Agree(Worker(0, 1), 2, {"loss": 1.0}))
    agreed = only(effects.Tell, journal.say(events.Agree(Worker(1, 1), 2, {"loss": 3.0}))).agreed
    assert (agreed.number, agreed.values) == (2, {"loss": 2.0})
    assert lasting(journal.replayed()) == lasting(journal.shard._state)


def test_a_refilled_shard_knows_its_history() -> None:
    """Its log is empty, yet who comes with another past is told so."""
    journal = journaled()
    undisturbed = training()
    close_round(undisturbed, (0, 1), 0)
    journal.say(refill_of(undisturbed))
    with pytest.raises(DataLossError, match="different histories"):
        journal.say(hello(1, replace(history_of(undisturbed), digest=b"x" * 16)))


@pytest.mark.parametrize("mode", [ASYNC, Consistency(downlink="shadow")], ids=Consistency.describe)
def test_no_replica_replaces_what_was_lost_outside_of_lockstep(mode: Consistency) -> None:
    """A worker does not know what the others' pushes were, or has no optimizer state: DATA_LOSS, not a guess."""
    told = training(2)
    close_round(told, (0, 1), 0)
    with pytest.raises(DataLossError, match="Restore the state folder"):
        say(training(2, mode), refill_of(told))
    fresh = Shard(CONFIG)
    say(fresh, register(0, consistency=mode))
    with pytest.raises(DataLossError, match="Restore the state folder"):
        say(fresh, refill_of(told))


def test_a_replica_of_another_run_is_refused() -> None:
    """Two runs are never mixed."""
    told, shard = training(run=8), training()
    for one in (told, shard):
        close_round(one, (0, 1), 0)
    close_round(told, (0, 1), 1)
    with pytest.raises(DataLossError, match="is in run 8, this shard in run 7"):
        say(shard, refill_of(told))


# --- after a leave -----------------------------------------------------------------------------------------


def fresh(shard: int, workers: int, *ranks: int) -> Shard:
    """A shard without its folder, at which these ranks have registered again."""
    one = Shard(replace(CONFIG, shard=shard, shards=2, workers=workers))
    for rank in ranks:
        say(one, register(rank, workers=workers, shard=shard, shards=2))
    return one


def test_a_leave_is_told_with_the_next_round_so_that_a_refill_knows_of_it() -> None:
    """What workers believe comes back to a shard that has lost everything: it must not wait for who has left."""
    first, second = part_of_two(0, 3), part_of_two(1, 3)
    for shard in (first, second):
        say(shard, leave(2))
    update = only(effects.Publish, close_pair(first, 0)).sealed.update
    assert update.membership == Membership(1, (0, 1))
    assert only(effects.Publish, close_pair(first, 1)).sealed.update.membership is None
    close_pair(second, 0, update.membership)
    lost_all = fresh(1, 3, 0, 1)
    say(lost_all, refill_of(second))
    for rank in (0, 1):
        say(lost_all, hello(rank, history_of(second)))
    assert only(effects.Publish, close_pair(lost_all, 1)).sealed.update.members == 2


def close_pair(shard: Shard, step: int, membership: Membership | None = None) -> list[Effect]:
    presence = (True,) * len(shard._state.slice.segments)
    both = [push(rank, step, PAIR, presence=presence, membership=membership) for rank in (0, 1)]
    return [effect for one in both for effect in say(shard, one)]


def test_a_refill_brings_nobody_back_of_whom_the_shard_knows_that_it_has_left() -> None:
    """The replica's worker has not heard of it yet; the shard has lost the end of its log only."""
    told, shard = part_of_two(1, 3), part_of_two(1, 3)
    for rank in range(3):
        say(told, push(rank, 0, PAIR))
    say(shard, leave(2))
    refill = refill_of(told)
    assert refill.membership == Membership(0, (0, 1, 2))
    say(shard, refill)
    assert shard._state.members.membership == Membership(0, (0, 1))


def test_a_refilled_shard_waits_for_who_does_not_come_as_long_as_its_lease() -> None:
    """Whoever was a member has been here before: it is lost, and not awaited since the beginning of the run."""
    told = part_of_two(1, 3)
    for rank in range(3):
        say(told, push(rank, 0, PAIR))
    shard = fresh(1, 3, 0, 1)
    say(shard, refill_of(told), 10.0)
    for rank in (0, 1):
        say(shard, hello(rank, history_of(told)), 10.0)
        assert not of(effects.Publish, say(shard, push(rank, 1, PAIR), 10.0))
    assert not of(effects.Publish, say(shard, events.Tick(), 10.0 + LEASE - 0.1))
    assert only(effects.Publish, say(shard, events.Tick(), 10.0 + LEASE)).sealed.update.contributors == (0, 1)


def test_a_refill_with_an_absurd_membership_changes_nothing() -> None:
    """A shard keeps a record of each rank that it hears of."""
    told, shard = part_of_two(1, 2), fresh(1, 2, 0, 1)
    close_pair(told, 0)
    before = shard.statistics()
    with pytest.raises(ProtocolError, match="rank 70000 in a membership"):
        say(shard, refill_of(told, membership=Membership(1, (0, 70_000))))
    assert shard.statistics() == before
