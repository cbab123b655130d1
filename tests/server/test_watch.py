"""Every wait has a deadline, and before it fails it says who is missing."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.server.dialogues import (
    ASYNC,
    CONFIG,
    LOCKSTEP,
    NUMEL,
    QUORUM,
    SSP,
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
    training,
)

from thresher.protos.consistency import Consistency
from thresher.protos.errors import RoundFailedError
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import Worker
from thresher.server.shard import Shard


def failure(shard: Shard, now: float) -> str:
    return only(effects.Failed, say(shard, events.Tick(), now)).reason


def agree(rank: int, number: int = 0) -> events.Agree:
    return events.Agree(Worker(rank, 1), number, {"loss": 1.0})


def test_a_worker_that_never_comes_is_named() -> None:
    """The first round waits as long as the start may take, then names worker, round and shard."""
    shard = Shard(CONFIG)
    for event in (register(0), seed(), hello(0), push(0, 0)):
        say(shard, event)
    assert [type(effect) for effect in say(shard, events.Tick(), 99.0)] == [effects.Notice]
    reason = failure(shard, 100.0)
    assert "round 0 of shard 0 was open for 100.0 s, its deadline: worker 1 has never registered" in reason


def test_a_worker_that_registered_and_stays_silent_is_named() -> None:
    """It has come, so the message says what it has not done."""
    shard = Shard(CONFIG)
    for event in (register(0), register(1), seed(), hello(0), push(0, 0)):
        say(shard, event)
    assert "worker 1 (host:1) has registered but not begun to exchange" in failure(shard, 100.0)


def test_a_slow_worker_is_named_and_never_evicted() -> None:
    """Notices at 10, 20, 40 … seconds, then the deadline; a push in between is welcome."""
    shard = training(round_timeout=90.0)
    say(shard, push(0, 0), 0.0)
    noticed = [second for second in range(90) if say(shard, events.Tick(), float(second))]
    assert noticed == [10, 20, 40, 80]
    assert of(effects.Publish, say(shard, push(1, 0), 89.0))
    say(shard, push(0, 1), 100.0)
    assert not say(shard, events.Tick(), 109.0)
    assert "worker 1 (host:1) is connected but has not pushed, after 1 steps" in failure(shard, 190.0)


def test_a_lost_worker_is_named_while_its_lease_runs() -> None:
    """The notice says how long it has been away; after the lease the others go on."""
    shard = training(lease=25.0)
    say(shard, push(0, 0), 0.0)
    say(shard, events.Disconnect(Worker(1, 1)), 1.0)
    notice = only(effects.Notice, say(shard, events.Tick(), 11.0))
    assert "has been open for 11 s: worker 1 (host:1) lost its connection 10.0 s ago, after 0 steps" in notice.text
    assert not of(effects.Failed, say(shard, events.Tick(), 26.0))


def test_a_round_does_not_fail_while_a_lease_runs() -> None:
    """Who was lost just before the deadline is waited for until its lease ends, and then the others go on."""
    shard = training(round_timeout=30.0, lease=5.0)
    say(shard, push(0, 0), 0.0)
    say(shard, events.Disconnect(Worker(1, 1)), 29.0)
    assert not of(effects.Failed, say(shard, events.Tick(), 33.9))
    assert of(effects.Publish, say(shard, events.Tick(), 34.0))


def test_a_push_that_waits_for_the_slowest_has_the_same_deadline() -> None:
    """In ssp it is held, not in a round; the slow one is named."""
    shard = training(2, SSP)
    for step in range(3):
        say(shard, push(0, step))
    assert "worker 1 (host:1) is connected but has not pushed" in failure(shard, CONFIG.round_timeout)


@pytest.mark.parametrize("mode", [LOCKSTEP, QUORUM, SSP, ASYNC], ids=Consistency.describe)
def test_an_agreement_that_a_worker_never_asks_for_names_it(mode: Consistency) -> None:
    """Notices, then the deadline, in every mode: worker, shard, number of the agreement, and what to do."""
    shard = training(3, mode)
    for rank in range(3):
        say(shard, agree(rank, 0), 0.0)
    for rank in (0, 2):
        say(shard, agree(rank, 1), 100.0)
    noticed = [second for second in range(100, 130) if say(shard, events.Tick(), float(second))]
    assert noticed == [110, 120]
    reason = failure(shard, 130.0)
    assert (
        "agreement 1 of shard 0 was open for 30.0 s, its deadline: worker 1 (host:1) is connected but has not" in reason
    )
    assert "worker 0" not in reason
    assert "All must ask alike, in mean() and stop(). Look at the log of who is missing" in reason
    with pytest.raises(RoundFailedError, match=r"agreement 1 of shard 0 .* worker 1"):
        say(shard, agree(1, 1))


def test_one_that_pushes_where_the_other_asks_is_told_apart() -> None:
    """Each notice says what the other one waits for instead."""
    shard = training(3)
    say(shard, agree(0), 0.0)
    say(shard, push(1, 0), 0.0)
    of_round, of_agreement = [notice.text for notice in of(effects.Notice, say(shard, events.Tick(), 10.0))]
    assert "round 0 of shard 0 has been open for 10 s: worker 0 (host:0) waits for agreement 0 instead" in of_round
    assert "worker 1 (host:1) is connected but has not asked and waits for its push of step 0 instead" in of_agreement


def test_a_push_that_crosses_an_agreement_fails_the_run_at_once() -> None:
    """In lockstep neither can go on, however long they wait: who asks, who pushes which step, and what to do."""
    shard = training(3)
    close_round(shard, range(3), 0)
    for event in (agree(1), push(0, 1), push(2, 1)):
        assert say(shard, event) == []
    assert failure(shard, 0.0) == (
        "round 1 and agreement 0 of shard 0 wait for each other: worker 0 (host:0), worker 2 (host:2) pushed step 1, "
        "worker 1 (host:1) asks for agreement 0. All must call mean() and stop() at the same place of their loop; "
        "after a restart an enumerate() begins anew: count with session.step"
    )
    with pytest.raises(RoundFailedError, match="wait for each other"):
        say(shard, agree(0))


@pytest.mark.parametrize("mode", [QUORUM, SSP, ASYNC], ids=Consistency.describe)
def test_where_rounds_do_not_wait_for_all_nothing_is_crossed(mode: Consistency) -> None:
    """Who asks there is not waited for by rounds."""
    shard = training(3, mode)
    for event in (agree(0), push(1, 0), push(2, 0, version=0), events.Tick()):
        assert not of(effects.Failed, say(shard, event))


def test_only_what_is_certain_is_a_crossing() -> None:
    """Not while somebody may still do either, is away, or has come back under another life and has not spoken."""
    for third in (events.Disconnect(Worker(2, 1)), register(2, 2, workers=3), hello(2)):
        shard = training(3)
        for event in (agree(0), push(1, 0), third):
            say(shard, event)
        assert say(shard, events.Tick()) == []
    shard = training(2)
    for event in (agree(0), register(0, 2), hello(0, incarnation=2), push(1, 0)):
        say(shard, event)
    assert say(shard, events.Tick()) == []
    say(shard, replace(agree(0), worker=Worker(0, 2)))
    assert "worker 0 (host:0) asks for agreement 0" in failure(shard, 0.0)


def test_an_agreement_waits_for_a_lease_and_is_forgotten_with_who_asked() -> None:
    """Who is lost has its lease; where all who asked have gone, nobody waits."""
    shard = training()
    say(shard, agree(0), 0.0)
    say(shard, events.Disconnect(Worker(1, 1)), 29.0)
    assert not of(effects.Failed, say(shard, events.Tick(), 33.0))
    assert of(effects.Tell, say(shard, events.Tick(), 34.0))
    shard = training()
    say(shard, agree(0), 0.0)
    say(shard, leave(0), 1.0)
    assert say(shard, events.Tick(), 1e6) == []


def test_who_is_dropped_and_who_is_let_in_are_told() -> None:
    """With worker, shard, version and steps; one that leaves has said so itself."""
    shard = training(3)
    close_round(shard, (0, 1, 2), 0)
    say(shard, leave(2))
    say(shard, events.Disconnect(Worker(1, 1)), 1.0)
    say(shard, push(0, 1), 2.0)
    done = say(shard, events.Tick(), 6.0)
    notice = only(effects.Notice, done)
    assert "shard 0 at version 2 goes on without worker 1 (host:1), which was lost 5.0 s ago" in notice.text
    assert "after 1 steps: its lease is 5 s. Look at its log" in notice.text
    say(shard, hello(1, history_of(shard)), 7.0)
    notice = only(effects.Notice, say(shard, push(0, 2), 7.0))
    assert notice.text == "shard 0 at version 3 lets in worker 1 (host:1), after 1 steps of its own"
    assert say(shard, events.Tick(), 7.0) == []


def test_a_round_without_pushes_waits_for_ever() -> None:
    """A worker that evaluates for hours is let alone while nobody waits for it."""
    shard = training()
    close_round(shard, (0, 1), 0)
    assert say(shard, events.Tick(), 1e6) == []


def test_after_a_failure_everybody_hears_why() -> None:
    """Worker, reason, and when; nothing more happens, and what a failure may have spoilt is not kept."""
    shard = training()
    reason = only(effects.Failed, say(shard, events.Abort(Worker(1, 1), "CUDA out of memory"))).reason
    said = "worker 1 (host:1) stopped after 0 steps: CUDA out of memory (shard 0 is at version 0; see its log)"
    assert reason == said
    assert (shard.statistics().state, shard.statistics().failure) == ("failed", reason)
    for event in (push(0, 0), hello(1), register(1), leave(0), seed(), events.Agree(Worker(0, 1), 0, {})):
        with pytest.raises(RoundFailedError, match="CUDA out of memory"):
            say(shard, event)
    assert say(shard, events.Tick(), 1000.0) == []
    assert say(shard, events.Drain()) == []
    assert say(shard, events.Abort(Worker(0, 1), "me too")) == []


def never_came() -> list[Effect]:
    shard = Shard(CONFIG)
    for event in (register(0), seed(), hello(0), push(0, 0)):
        say(shard, event)
    return say(shard, events.Tick(), 100.0)


def never_asks() -> list[Effect]:
    shard = training()
    say(shard, agree(0))
    return say(shard, events.Tick(), 30.0)


def never_pushes() -> list[Effect]:
    shard = training()
    say(shard, push(0, 0))
    return say(shard, events.Tick(), 30.0)


def gives_up() -> list[Effect]:
    return say(training(), events.Abort(Worker(1, 1), "no memory"))


def crosses() -> list[Effect]:
    shard = training()
    for event in (agree(0), push(1, 0)):
        say(shard, event)
    return say(shard, events.Tick())


def overflows() -> list[Effect]:
    shard = training()
    say(shard, push(0, 0, 3e38))
    return say(shard, push(1, 0, 3e38))


@pytest.mark.parametrize("fail", [never_came, never_asks, never_pushes, crosses, gives_up, overflows])
def test_every_failure_says_who_where_when_and_what_to_do(fail: Callable[[], list[Effect]]) -> None:
    """Worker, shard, round or version or agreement, and the next thing to try."""
    reason = only(effects.Failed, fail()).reason
    for said in (r"workers? \[?[01]", r"shard 0", r"(round|agreement|version) 0", r"log|lower|count"):
        assert re.search(said, reason), (said, reason)


def test_what_the_shard_needs_may_fail() -> None:
    """Its journal, say: the run cannot go on, and says so."""
    shard = training()
    assert say(shard, events.Fail("the disk is gone")) == [effects.Failed("the disk is gone")]
    with pytest.raises(RoundFailedError, match="the disk is gone"):
        say(shard, push(0, 0))


def test_a_shard_that_ends_writes_what_it_knows() -> None:
    """And waits until it is on disk; before the seed there is nothing to write."""
    assert only(effects.Checkpoint, say(training(), events.Drain())).wait
    assert say(Shard(CONFIG), events.Drain()) == []


def test_a_mean_that_overflows_is_not_applied() -> None:
    """Finite pushes can sum to infinity: the run fails before the model is spoilt."""
    shard = training()
    say(shard, push(0, 0, 3e38))
    failed = only(effects.Failed, say(shard, push(1, 0, 3e38)))
    assert "the mean of round 0 overflows float32" in failed.reason
    assert parameters(shard) == [0.0] * NUMEL


def test_a_switch_thrown_midway_that_torch_cannot_follow_fails_the_run() -> None:
    """Nobody waits for a round that cannot be applied: all are told, with the hyper-parameter in question."""
    adam = OptimizerSpec("Adam", ({"lr": 1.0, "amsgrad": False},))
    shard = Shard(replace(CONFIG, workers=1))
    for event in (register(0, workers=1, optimizer=adam), seed(), hello(0), push(0, 0)):
        say(shard, event)
    done = say(shard, push(0, 1, overrides=(Override(0, "amsgrad", True),)))
    assert "amsgrad" in only(effects.Failed, done).reason
    assert not of(effects.Append, done)
    assert shard.statistics().version == 1
    assert say(shard, events.Drain()) == []


def test_disagreeing_byte_counts_are_noticed() -> None:
    """Law 9 is checked at every leave that can know: the operator hears both counts."""
    shard = training()
    close_round(shard, (0, 1), 0)
    pulled = shard.statistics().members[0].pull_bytes
    exact = leave(0, push_bytes=100, pull_bytes=pulled, counted=True)
    assert not of(effects.Notice, say(shard, exact))
    notice = only(effects.Notice, say(shard, leave(1, push_bytes=100, pull_bytes=pulled + 1, counted=True)))
    assert f"counts 100 bytes pushed and {pulled + 1} pulled, this shard 100 and {pulled}" in notice.text
