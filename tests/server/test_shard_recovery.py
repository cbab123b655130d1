"""A shard that was killed, workers that go and come back, and what is said when nothing more can be done."""

from dataclasses import replace

import pytest
import torch
from tests.server.dialogues import (
    ASYNC,
    CONFIG,
    LOCKSTEP,
    NUMEL,
    PAIR,
    QUORUM,
    SSP,
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
    seed,
    snapshot_of,
    training,
)

from thresher.protos.consistency import Consistency, Downlink
from thresher.protos.errors import (
    BehindError,
    DataLossError,
    FencedError,
    LostHistoryError,
)
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.update import Membership
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import Verdict, Worker
from thresher.server.facts import Returned
from thresher.server.shard import Shard

LEASE = CONFIG.lease


def journaled(workers: int = 2, consistency: Consistency = LOCKSTEP, **config: int) -> Journaled:
    journal = Journaled(replace(CONFIG, workers=workers, **config))
    journal.keep(begin(journal.shard, workers, consistency))
    return journal


def lost(rank: int) -> events.Disconnect:
    return events.Disconnect(Worker(rank, 1))


# --- members that go and come ------------------------------------------------------------------------------


def test_the_others_go_on_without_a_member_that_is_away_for_longer_than_its_lease() -> None:
    """It counts in the divisor of the round that waited for it, and the next one is without it; all are told."""
    shard = training(3)
    close_round(shard, (0, 1), 0)
    say(shard, lost(2), 1.0)
    assert say(shard, events.Tick(), 1.0 + LEASE - 0.1) == []
    assert [member.counts for member in shard.statistics().members] == [True, True, True]
    update = only(effects.Publish, say(shard, events.Tick(), 1.0 + LEASE)).sealed.update
    assert (update.members, update.contributors, update.membership) == (3, (0, 1), Membership(1, (0, 1)))
    assert [member.counts for member in shard.statistics().members] == [True, True, False]
    update = only(effects.Publish, close_round(shard, (0, 1), 1, now=7.0)).sealed.update
    assert (update.members, update.membership) == (2, None)


def test_a_member_that_comes_back_within_its_lease_goes_on() -> None:
    """The same life on a new stream takes part again."""
    shard = training()
    say(shard, lost(1), 1.0)
    say(shard, hello(1), 4.0)
    close_round(shard, [0], 0)
    assert not of(effects.Publish, say(shard, events.Tick(), 20.0))
    assert shard.statistics().members[1].state == "exchanging"


def test_a_push_whose_round_was_closed_without_it_is_returned() -> None:
    """Its worker was away for longer than its lease; it hears of the round, and it is let in again at a close."""
    shard = training()
    before = history_of(shard)
    close_round(shard, [0], 0)
    say(shard, lost(1), 0.0)
    say(shard, events.Tick(), LEASE)
    backlog = only(effects.Backlog, say(shard, hello(1, before), LEASE)).updates
    assert [one.update.membership for one in backlog] == [Membership(1, (0,))]
    append, judged = say(shard, push(1, 0), LEASE)
    assert append == effects.Append(Returned(1, 0, push(1, 0).content))
    assert isinstance(judged, effects.Judged)
    assert judged.verdict is Verdict.RETURNED
    assert "round 0 was closed without worker 1" in judged.reason
    update = only(effects.Publish, close_round(shard, [0], 1, now=LEASE)).sealed.update
    assert update.membership == Membership(2, (0, 1))
    assert only(effects.Publish, close_round(shard, (0, 1), 2, now=LEASE)).sealed.update.members == 2


def test_a_push_of_who_does_not_belong_to_the_run_is_returned() -> None:
    """In lockstep a step has the same members everywhere, so nobody takes part before it was said."""
    shard = training()
    for event in (register(2), hello(2)):
        say(shard, event)
    judged = only(effects.Judged, say(shard, push(2, 0)))
    assert (judged.verdict, "does not belong to the run at version 0" in judged.reason) == (Verdict.RETURNED, True)


def test_a_newcomer_is_let_in_at_the_close_of_a_round() -> None:
    """From the next round on it is waited for, and divides."""
    shard = training()
    say(shard, register(5))
    say(shard, hello(5))
    assert only(effects.Publish, close_round(shard, (0, 1), 0)).sealed.update.membership == Membership(1, (0, 1, 5))
    assert not of(effects.Publish, close_round(shard, (0, 1), 1))
    assert only(effects.Publish, say(shard, push(5, 1))).sealed.update.members == 3


@pytest.mark.parametrize("gone", [[leave(0), leave(1)], [lost(0), lost(1), events.Tick()]], ids=["left", "lost"])
def test_who_is_here_is_let_in_when_no_member_is(gone: list[events.Event]) -> None:
    """Nobody is left to close the round at which it would be let in."""
    shard = training()
    say(shard, register(2))
    say(shard, hello(2))
    done: list[Effect] = []
    for event in gone:
        done = say(shard, event, LEASE if isinstance(event, events.Tick) else 0.0)
    last = of(effects.Append, done)[-1].record
    assert isinstance(last, Membership)
    assert last.ranks == (2,)
    assert only(effects.Publish, say(shard, push(2, 0), LEASE)).sealed.update.members == 1


def test_other_shards_take_the_membership_from_the_pushes() -> None:
    """The first shard alone says who belongs to the run; here an older epoch changes nothing."""
    shard = part_of_two(1, 3)
    done = say(shard, push(0, 0, PAIR, membership=Membership(2, (0, 1))))
    assert only(effects.Append, done).record == Membership(2, (0, 1))
    update = only(effects.Publish, say(shard, push(1, 0, PAIR, membership=Membership(1, (0, 1, 2))))).sealed.update
    assert (update.members, update.membership) == (2, None)


def test_a_worker_that_has_left_is_no_member_whatever_epoch_comes() -> None:
    """The first shard may have said who belongs to the run before it heard of the leave."""
    shard = part_of_two(1, 3)
    say(shard, leave(2))
    say(shard, push(0, 0, PAIR, membership=Membership(1, (0, 1, 2))))
    assert only(effects.Publish, say(shard, push(1, 0, PAIR))).sealed.update.members == 2


# --- lives of one worker -----------------------------------------------------------------------------------


def test_a_new_life_takes_over_and_the_old_one_is_fenced() -> None:
    """It hears what became of the old one's push; its repetition is DUPLICATE; the old one has no say any more."""
    shard = training()
    close_round(shard, (0, 1), 0)
    say(shard, push(1, 1))
    answer = only(effects.Registered, say(shard, register(1, incarnation=2)))
    assert (answer.settled, answer.in_open_round, answer.verdict) == (1, True, Verdict.APPLIED)
    old = Worker(1, 1)
    for event in (
        push(1, 1),
        hello(1),
        leave(1),
        lost(1),
        register(1),
        events.Agree(old, 0, {}),
        events.Abort(old, ""),
    ):
        with pytest.raises(FencedError, match="worker 1 was replaced by worker 1"):
            say(shard, event)
    say(shard, hello(1, history_of(shard), incarnation=2))
    again = replace(push(1, 1), worker=Worker(1, 2))
    assert say(shard, again) == [effects.Judged(1, Verdict.DUPLICATE)]
    assert only(effects.Publish, say(shard, push(0, 1))).sealed.update.contributors == (0, 1)


def test_a_new_life_that_does_not_come_to_exchange_has_the_lease_of_the_old_one() -> None:
    """To register again and again keeps no round open."""
    shard = training()
    say(shard, lost(1), 1.0)
    for incarnation in (2, 3):
        say(shard, register(1, incarnation), 2.0)
    close_round(shard, [0], 0, now=2.0)
    assert only(effects.Publish, say(shard, events.Tick(), 1.0 + LEASE)).sealed.update.contributors == (0,)


def test_a_stand_in_for_a_lost_push() -> None:
    """It is an empty push; where the push it stands for came, or a stand-in did, it changes nothing."""
    shard = training()
    stand_in = push(1, 0, None, lost=True)
    say(shard, push(1, 0))
    assert say(shard, stand_in) == [effects.Judged(0, Verdict.DUPLICATE)]
    say(shard, push(0, 0))
    assert say(shard, stand_in) == [effects.Judged(0, Verdict.APPLIED)]
    say(shard, replace(stand_in, step=1, version=1))
    update = only(effects.Publish, say(shard, push(0, 1, overrides=(Override(0, "lr", 0.5),)))).sealed.update
    assert (update.members, update.contributors, update.overrides) == (2, (0,), (Override(0, "lr", 0.5),))


def test_a_life_after_the_leave_may_come_again() -> None:
    """A rank that has left is free: its next life is let in at a close, also after a crash in between."""
    journal = journaled()
    journal.say(leave(1))
    journal.say(register(1, incarnation=2))
    journal.crash()
    journal.check_replay()
    for rank, incarnation in ((0, 1), (1, 2)):
        journal.say(hello(rank, incarnation=incarnation))
    update = only(effects.Publish, journal.say(push(0, 0))).sealed.update
    assert (update.members, update.membership) == (1, Membership(2, (0, 1)))


# --- a shard that was killed -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [LOCKSTEP, QUORUM, SSP, ASYNC], ids=Consistency.describe)
@pytest.mark.parametrize("downlink", ["updates", "shadow"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_killed_shard_is_the_shard_that_was_not(mode: Consistency, downlink: Downlink, optimizer: str) -> None:
    """Law 8, in every mode, from every checkpoint: table and tensors, bit for bit, and again after more rounds."""
    consistency = replace(mode, grace=0.0, downlink=downlink)
    spec = OptimizerSpec(optimizer, ({"lr": 0.1},))
    journal = Journaled(replace(CONFIG, checkpoint_every=2))
    for rank in (0, 1):
        journal.say(register(rank, optimizer=spec, consistency=consistency))
    journal.say(seed(values=0.3))
    for life in (1, 2, 3):
        for rank in (0, 1):
            journal.say(register(rank, life, optimizer=spec, consistency=consistency))
            journal.say(hello(rank, journal.shard._state.history, life))
        for _ in range(3):
            version = history_of(journal.shard).version
            for rank in (0, 1):
                step = version if mode.lockstep else journal.shard.statistics().members[rank].steps
                gradient = [0.1 * rank, -1.0 / (version + 1), 3.7, 0.0]
                event = push(rank, step, gradient, version=version, residual_squared=0.7)
                journal.say(replace(event, worker=Worker(rank, life)))
        journal.check_replay()
        before = lasting(journal.shard._state)
        journal.crash(checkpoint=life % len(journal.checkpoints))
        assert lasting(journal.shard._state) == before
    assert len(journal.checkpoints) > 2


def test_a_crash_behind_a_mean_leaves_no_last_row_rather_than_that_of_the_mean() -> None:
    """It has neither residuals nor densities; the next round of gradients has."""
    journal = journaled(1)
    journal.say(push(0, 0, residual_squared=1.0))
    journal.say(push(0, 1, only_mean=True))
    journal.crash()
    assert journal.shard.statistics().last_row is None
    journal.say(hello(0, history_of(journal.shard)))
    journal.say(push(0, 2, residual_squared=4.0))
    row = journal.shard.statistics().last_row
    assert row is not None
    assert (row.version, row.residual_squared) == (3, 4.0)


def test_everything_is_kept_that_must_not_be_forgotten() -> None:
    """Verdicts, threshold, schedule, agreements, departures, rows: a crash changes no answer."""
    journal = journaled(3)
    for rank in range(3):
        journal.say(push(rank, 0, overrides=(Override(0, "lr", 0.5),), next_threshold=0.25))
    for rank in range(3):
        journal.say(events.Agree(Worker(rank, 1), 0, {"loss": float(rank)}))
    journal.say(leave(2, abandoned_squared=4.0, untrained={"bn.mean": torch.full((2,), 7.0)}))
    journal.check_replay()
    before = journal.shard.statistics()
    journal.crash()
    now = journal.shard.statistics()
    assert (now.verdicts, now.threshold) == (before.verdicts, 0.25)
    assert before.last_row is not None
    assert now.last_row == replace(before.last_row, barrier_seconds=None)  # times are for those who look, and not kept
    assert [m.state for m in now.members] == ["lost", "lost", "left"]
    assert snapshot_of(journal.shard).optimizer.groups[0]["lr"] == 0.5
    assert snapshot_of(journal.shard).tensors["untrained.bn.mean"].tolist() == [7.0, 7.0]
    journal.say(hello(0, history_of(journal.shard)))
    assert say(journal.shard, push(0, 0)) != []
    assert only(effects.Tell, journal.say(events.Agree(Worker(0, 1), 0, {"loss": 9.0}))).agreed.values == {"loss": 1.0}


def test_leases_begin_with_the_first_event_after_a_recovery() -> None:
    """Before it nobody could come back, however long the shard was down."""
    journal = journaled()
    journal.crash()
    journal.say(hello(0), 1000.0)
    journal.say(push(0, 0), 1000.0)
    assert journal.say(events.Tick(), 1000.0 + LEASE - 0.1) == []
    assert only(effects.Publish, journal.say(events.Tick(), 1000.0 + LEASE)).ranks == (0,)


def test_pushes_of_the_open_round_come_again_after_a_crash() -> None:
    """They had no verdict, so nobody was told; each still counts once."""
    journal = journaled()
    journal.say(push(0, 0, 2.0))
    journal.crash()
    for rank in (0, 1):
        journal.say(hello(rank))
        journal.say(push(rank, 0, 2.0))
    assert parameters(journal.shard) == [-2.0] * NUMEL
    assert journal.say(push(0, 0, 2.0)) == [effects.Judged(0, Verdict.APPLIED)]


def test_who_comes_back_gets_what_it_lacks() -> None:
    """From the log while it is there, for a minute behind a snapshot at least; else it needs a snapshot."""
    shard = training()
    before = history_of(shard)
    close_round(shard, (0, 1), 0)
    (missed,) = only(effects.Backlog, say(shard, hello(1, before))).updates
    assert missed.update.version == 1
    for step in (1, 2, 3):
        close_round(shard, (0, 1), step)
    backlog = only(effects.Backlog, say(shard, hello(1, before))).updates
    assert [missed.update.version for missed in backlog] == [1, 2, 3, 4], "its snapshot was taken just now"
    close_round(shard, (0, 1), 4, now=60.0)
    with pytest.raises(BehindError, match="take a snapshot"):
        say(shard, hello(1, before))


def test_histories_are_held_against_each_other() -> None:
    """Another run, a lost tail, another past: nobody goes on in silence."""
    shard = training()
    close_round(shard, (0, 1), 0)
    here = history_of(shard)
    for there in (replace(here, run=8), replace(here, version=2)):
        with pytest.raises(LostHistoryError):
            say(shard, hello(0, there))
    with pytest.raises(DataLossError, match="different histories up to version 1"):
        say(shard, hello(0, replace(here, digest=b"x" * 16)))


# --- a group that is started again before the first round --------------------------------------------------


def group(journal: Journaled, life: int, workers: int, stage: str, now: float) -> None:
    """Let a group of workers come that is told its own size, as far as ``stage``."""
    for rank in range(workers):
        journal.say(register(rank, life, workers), now)
    if stage != "registered":
        journal.say(replace(seed(), worker=Worker(0, life)), now)
    if stage in ("exchanging", "pushed"):
        for rank in range(workers):
            journal.say(hello(rank, incarnation=life), now)
    if stage == "pushed":
        journal.say(replace(push(0, 0), worker=Worker(0, life)), now)


@pytest.mark.parametrize("stage", ["registered", "seeded", "exchanging", "pushed"])
@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_a_group_that_is_started_again_with_another_number_is_let_in(
    before: int, after: int, recovered: bool, stage: str
) -> None:
    """Where nobody announced a number: more are let in at the first round, fewer go on when a lease is over."""
    journal = Journaled(replace(CONFIG, workers=0))
    group(journal, 1, before, stage, 0.0)
    for rank in range(before):
        journal.say(lost(rank), 1.0)
    if recovered:
        journal.shard = Shard(journal.config, journal.replayed())
    group(journal, 2, after, "exchanging", 2.0)
    for step, now in enumerate((3.0, 4.0 + LEASE)):
        for rank in range(after):
            journal.say(replace(push(rank, step), worker=Worker(rank, 2)), now)
        journal.say(events.Tick(), now + LEASE)
    told = journal.shard.statistics()
    assert (told.version, told.state) == (2, "training")
    assert journal.shard._state.members.membership.ranks == tuple(range(after))
    assert lasting(journal.replayed()) == lasting(journal.shard._state)


def test_a_further_rank_may_be_the_first_one_that_comes() -> None:
    """The run begins with as many as were announced, and so it is found again."""
    journal = Journaled(CONFIG)
    journal.say(register(5, workers=8))
    opened = journal.replayed().opened
    assert opened is not None
    assert opened.registration.workers == CONFIG.workers
