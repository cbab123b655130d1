"""Rounds that hear a verdict twice, or too late: it is taken for the step it speaks of, and for no other."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDoneError
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.worker.conversing import LAYOUT, SGD, registration, unused_address

from thresher.protos.consistency import Consistency
from thresher.protos.replica import Replica
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import ShardCalls
from thresher.worker.client import Returned, Settled, ShardClient, Told
from thresher.worker.joining import JoinedShard
from thresher.worker.rounds import Outcome, Rounds

PIECE = LAYOUT.shard_slice(0, 1)


def update_of(step: int) -> Update:
    """The round that worker 0's push of ``step`` made, in a run of its own."""
    mean = SparseGradient.dense(torch.ones(3))
    return Update(step + 1, 1, (0,), mean, (True,), arrivals=((0, step),))


@contextmanager
def hearing() -> Iterator[tuple[Rounds, ShardClient]]:
    """Rounds of an asynchronous run, and the conversation in which nobody speaks but the test."""
    client = ShardClient(ShardCalls(0, unused_address(), "worker 0"), registration(), 30.0)
    follower = Replica(PIECE, SGD, {"parameters": torch.zeros(3)}, 0)
    joined = JoinedShard(client, PIECE, follower, pb.RegisterResponse(), 0, (), None)
    try:
        yield Rounds(0, [joined], Consistency("async"), SGD, dict), client
    finally:
        client.close()


def say(client: ShardClient, *told: Told) -> None:
    for one in told:
        client._inbox.put(one)


def push(rounds: Rounds, value: float) -> None:
    rounds.prepare(SparseGradient.dense(torch.full((3,), value)), (True,), (), None, torch.zeros(3), None)
    rounds.send()


@pytest.mark.parametrize(
    "late", [Settled(0), Returned(0, "while there was no connection")], ids=["settled", "returned"]
)
def test_a_verdict_that_is_told_twice_is_not_that_of_the_next_step(late: Told) -> None:
    """The next step waits for its own, is kept until then, and gives nothing back that was applied."""
    with hearing() as (rounds, client), ThreadPoolExecutor(1) as pool:
        push(rounds, 1.0)
        say(client, update_of(0), late)
        assert [update.version for update in rounds.finish().updates] == [1]
        push(rounds, 2.0)
        waiting: Future[Outcome] = pool.submit(rounds.finish)
        try:
            with pytest.raises(NotDoneError):
                waiting.result(timeout=0.1)
            assert client._unanswered
        finally:
            say(client, update_of(1))
        outcome = waiting.result(timeout=60)
    assert [update.version for update in outcome.updates] == [2]
    assert not outcome.returned


def test_a_return_that_is_told_twice_is_given_back_once() -> None:
    """The values of the step it speaks of come back, those of the next one do not."""
    with hearing() as (rounds, client):
        push(rounds, 1.0)
        say(client, Returned(0, "it is too stale"), Returned(0, "while there was no connection"))
        ((_, values),) = rounds.finish().returned
        assert torch.equal(values.densify(), torch.ones(3))
        push(rounds, 2.0)
        say(client, Settled(1))
        assert not rounds.finish().returned


def test_a_loss_is_told_until_a_push_that_says_so_is_applied() -> None:
    """Returned pushes change nothing at the shard, which would not book what is lost."""
    with hearing() as (rounds, client):
        rounds.shards[0].answer.settled_steps = 1
        rounds.begin()
        said = []
        for verdict in (Returned(1, "it is too stale"), Settled(2), Settled(3)):
            push(rounds, 1.0)
            said.append(pb.Push.FromString(rounds.pending[0][0]).forgot)
            say(client, verdict)
            rounds.finish()
    assert said == [True, True, False]


@pytest.mark.parametrize("verdict", [Returned(0, "it was closed"), Settled(0)])
def test_a_mean_that_was_made_without_this_worker_is_not_waited_for(verdict: Told) -> None:
    """The verdict is all there is to come, and the round is over with it."""
    client = ShardClient(ShardCalls(0, unused_address(), "worker 0"), registration(), 30.0)
    follower = Replica(PIECE, SGD, {"parameters": torch.zeros(3)}, 0)
    answer = pb.RegisterResponse(membership=pb.Membership(ranks=[0, 1]))
    rounds = Rounds(0, [JoinedShard(client, PIECE, follower, answer, 0, (), None)], Consistency(), SGD, dict)
    client._inbox.put(replace(update_of(0), contributors=(1,), arrivals=(), only_mean=True))
    client._inbox.put(verdict)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rounds.mean, torch.ones(3))
        try:
            assert waiting.result(timeout=5) is None
        finally:
            client._end(RuntimeError("the test is over"))
    assert rounds.number == 1
    client.close()
