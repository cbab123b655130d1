"""Coming back over gRPC: what a worker lacks is sent, what cannot go on is refused by name, nothing counts twice."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
import torch
from tests.server.conversing import (
    Served,
    agree,
    frame_of,
    hello,
    leave,
    make_rounds,
    push,
    refusal,
    register,
    serving,
    told,
    zeros,
)

from thresher.protos.codec import encode
from thresher.protos.consistency import Consistency
from thresher.protos.errors import (
    BehindError,
    DataLossError,
    FencedError,
    LostHistoryError,
    ProtocolError,
    ThresherError,
)
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.sealed import sealed
from thresher.protos.snapshots import pack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server import events
from thresher.server.config import ShardConfig
from thresher.server.engine import Engine
from thresher.server.servicer import AggregationServicer
from thresher.server.shard import Shard
from thresher.server.stream import Stream
from thresher.server.translation import register_from_message
from thresher.v1 import aggregation_pb2 as pb

CODE = grpc.StatusCode


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


# --- the hello ---------------------------------------------------------------------------------------------


def test_a_worker_that_missed_an_update_is_sent_it(served: Served) -> None:
    """Its connection broke between push and answer: the hello says where it is, and the push changes nothing again."""
    first, second = served.join()
    before = told(served, make_rounds([first, second], range(2)))
    second.say(*push(2, frame_of(5.0)))
    second.say(*push(2, frame_of(5.0)))
    assert second.hear().result.verdict == pb.VERDICT_DUPLICATE
    second.break_off()
    first.say(*push(2, frame_of(1.0)))
    missed = first.hear_update()
    answer = served.register(1)
    assert (answer.settled_steps, answer.last_verdict) == (3, pb.VERDICT_APPLIED)
    again = served.talk(hello(1, history=before), *push(2, frame_of(5.0)))
    assert again.hear_update().digest == missed.digest
    assert again.hear().result.verdict == pb.VERDICT_APPLIED
    assert make_rounds([first, again], range(3, 4)).version == 4
    assert [worker.steps for worker in served.statistics().workers] == [4, 4]


@pytest.mark.parametrize(
    ("fields", "code", "error", "said"),
    [
        ({"version": 0}, CODE.OUT_OF_RANGE, BehindError, "take a snapshot"),
        ({"version": 4}, CODE.DATA_LOSS, LostHistoryError, "told of version 4; the shard is at 3"),
        ({"run": 77}, CODE.DATA_LOSS, LostHistoryError, "told of run 4d"),
        ({"digest": b"another history."}, CODE.DATA_LOSS, DataLossError, "different histories up to version 3"),
    ],
    ids=["behind the cut", "ahead", "another run", "another history"],
)
def test_a_history_that_does_not_fit_is_refused_by_name(
    served: Served, fields: dict[str, int | bytes], code: grpc.StatusCode, error: type[ThresherError], said: str
) -> None:
    """The class of the error says what is to be done; the others go on, and so does the worker once it knows better."""
    first, second = served.join()
    history = told(served, make_rounds([first, second], range(3)))
    second.break_off()
    wrong = pb.History(run=history.run, version=history.version, digest=history.digest)
    for name, value in fields.items():
        setattr(wrong, name, value)
    found, refused = served.talk(hello(1, history=wrong)).hear_refusal()
    assert (found, type(refused)) == (code, error)
    assert said in str(refused)
    assert make_rounds([first, served.talk(hello(1, history=history))], range(3, 4)).version == 4


def test_an_update_that_closes_during_a_hello_is_heard_whoever_else_says_one() -> None:
    """A worker that was replaced greets beside its replacement: it is refused, and takes no update from the other."""

    async def scenario() -> list[int]:
        engine = Engine(Shard(ShardConfig(0, 1, 1)), "shard 0", lambda _: None)
        servicer = AggregationServicer(engine, ShardConfig(0, 1, 1))
        engine.start(asyncio.get_running_loop(), servicer)
        try:
            await engine.submit(register_from_message(register(0, workers=1)))
            await engine.submit(events.Seed(events.Worker(0, 1), {PARAMETERS: torch.zeros(4)}, {}))
            await engine.submit(register_from_message(register(0, workers=1, incarnation=2)))
            stream, replaced = Stream(1 << 20), Stream(1 << 20)
            greetings = [
                asyncio.ensure_future(servicer._greet(hello(0, incarnation=2), stream)),
                asyncio.ensure_future(servicer._greet(hello(0, incarnation=1), replaced)),
            ]
            await asyncio.sleep(0)  # both wait for the engine's answer
            servicer.publish(sealed(Update(1, 1, (), None, (True, True)), b""), (0,))
            await greetings[0]
            with pytest.raises(FencedError):
                await greetings[1]
            stream.end()
            return [message.update.version async for message in stream]
        finally:
            await asyncio.to_thread(engine.stop)

    assert asyncio.run(scenario()) == [1]


def test_a_worker_that_does_not_read_is_told_no_more_and_may_come_back() -> None:
    """The others go on, the shard holds no more for it than its log would, and it is told so when it reads again."""
    layout = Layout((TensorSpec("w", (50_000,), "float32"),))
    frame = encode(SparseGradient.dense(torch.arange(50_000) / 3))
    with serving(log_cap_bytes=1 << 20) as served:
        first, second = served.join(layout=layout, consistency=Consistency("async", downlink="updates"))
        served.wait_until(1, "exchanging")
        step = 0
        while served.statistics().workers[1].state == "exchanging":
            first.say(*push(step, frame))
            step = first.hear_update(layout).version
            assert step < 100
        versions: list[int] = []
        with pytest.raises(grpc.RpcError) as caught:
            versions.extend(second.hear_update(layout).version for _ in range(100))
        code, error = refusal(caught.value)
        assert (code, type(error)) == (CODE.RESOURCE_EXHAUSTED, BehindError)
        assert "worker 1 does not read what it is told" in str(error)
        at = served.parts()[0].history
        assert at.version == step > len(versions)
        again = served.talk(hello(1, history=at), *push(0, frame, version=at.version))
        assert again.hear_update(layout).version == step + 1


# --- a second life -----------------------------------------------------------------------------------------


def test_an_earlier_life_is_fenced_from_the_moment_a_new_one_registers(served: Served) -> None:
    """Whatever it says next ends its stream, a new stream and a registration too; the new life takes part."""
    first, second = served.join()
    served.wait_until(1, "exchanging")
    served.register(1, incarnation=2)
    second.say(*push(0, frame_of(9.0)))
    for code, error in (second.hear_refusal(), served.talk(hello(1)).hear_refusal()):
        assert (code, type(error)) == (CODE.FAILED_PRECONDITION, FencedError)
        assert "worker 1 was replaced by worker 1 (host:1)" in str(error)
    with pytest.raises(grpc.RpcError) as caught:
        served.register(1)
    assert isinstance(refusal(caught.value)[1], FencedError)
    make_rounds([first, served.talk(hello(1, incarnation=2))], range(1))
    assert served.snapshot() == (1, [-1.5] * 4)


def test_the_stream_of_an_earlier_life_ends_when_the_new_one_greets(served: Served) -> None:
    """A worker that hangs silently in a pause hears that it was replaced, and is sent nothing more."""
    first, second = served.join()
    served.wait_until(1, "exchanging")
    served.register(1, incarnation=2)
    again = served.talk(hello(1, incarnation=2))
    code, error = second.hear_refusal()
    assert (code, type(error)) == (CODE.FAILED_PRECONDITION, FencedError)
    assert make_rounds([first, again], range(2)).version == 2
    assert [worker.state for worker in served.statistics().workers] == ["exchanging"] * 2


# --- leaving -----------------------------------------------------------------------------------------------


def test_a_leave_whose_answer_was_lost_is_repeated_quietly(served: Served) -> None:
    """The worker greets again and is answered; it does not belong to the run any more, and the others go on."""
    first, second = served.join()
    history = told(served, make_rounds([first, second], range(2)))
    second.say(leave(abandoned_squared=2.0))
    assert second.hear().left.version == 2
    for _ in range(2):
        assert served.register(1).membership.ranks == [0]
        again = served.talk(hello(1, history=history), leave(abandoned_squared=2.0))
        assert again.hear().left.version == 2
        assert list(again.call) == []
    first.say(*push(2, frame_of(1.0)))
    update = first.hear_update()
    assert (update.members, update.contributors) == (1, (0,))
    assert [worker.state for worker in served.statistics().workers] == ["exchanging", "left"]


def test_who_has_left_cannot_push_again(served: Served) -> None:
    """It may greet, to repeat its leave, and nothing else."""
    _, second = served.join()
    second.say(leave())
    assert second.hear().HasField("left")
    code, error = served.talk(hello(1), *push(0, frame_of(1.0))).hear_refusal()
    assert code is CODE.FAILED_PRECONDITION
    assert "cannot push: it is left" in str(error)


# --- agreements --------------------------------------------------------------------------------------------


def test_members_agree_on_means(served: Served) -> None:
    """Each hears the mean when all have asked; who asks again, on another stream too, hears the same."""
    first, second = served.join()
    first.say(agree(0, loss=1.0, stop=0.0))
    second.say(agree(0, loss=4.0, stop=1.0))
    answers = [talk.hear().agreed for talk in (first, second)]
    assert [dict(answer.values) for answer in answers] == [{"loss": 2.5, "stop": 0.5}] * 2
    second.break_off()
    assert served.register(1).agreements == 1
    again = served.talk(hello(1), agree(0, loss=7.0, stop=7.0))
    assert again.hear().agreed == answers[0]
    for talk in (first, again):
        talk.say(agree(1, loss=3.0))
    assert {talk.hear().agreed.values["loss"] for talk in (first, again)} == {3.0}


@pytest.mark.parametrize(
    ("asked", "said"),
    [(agree(5, loss=1.0), "asks for agreement 5; 0 is next"), (agree(0, other=1.0), "all must ask alike")],
)
def test_who_asks_for_something_else_is_refused(served: Served, asked: pb.ExchangeRequest, said: str) -> None:
    """Another number or other names: told by name, and the one who waits goes on waiting."""
    first, second = served.join()
    first.say(agree(0, loss=1.0), *push(0, b"", skipped=True), *push(0, b"", skipped=True))
    assert first.hear().result.verdict == pb.VERDICT_DUPLICATE  # so the first has asked
    second.say(asked)
    code, error = second.hear_refusal()
    assert (code, type(error)) == (CODE.FAILED_PRECONDITION, ProtocolError)
    assert said in str(error)
    served.talk(hello(1), agree(0, loss=3.0))
    assert first.hear().agreed.values["loss"] == 2.0


# --- a shard that has lost its state -----------------------------------------------------------------------

LOST = pb.Refill(
    history=pb.History(run=5, version=3, digest=b"sixteen bytes ab"), membership=pb.Membership(ranks=[0, 1])
)
REPLICA = pack_state({PARAMETERS: torch.tensor([1.0, 2.0, 3.0, 4.0])}, {})


def test_an_empty_shard_goes_on_from_a_replica(served: Served) -> None:
    """It is then in the run, at the version and in the history that the workers know; a later replica is not needed."""
    for rank in (0, 1):
        assert not served.register(rank).seeded
    _, error = served.talk(hello(0, history=LOST.history)).hear_refusal()
    assert isinstance(error, LostHistoryError)
    assert served.seed(REPLICA, LOST)
    assert not served.seed(REPLICA, LOST)
    assert served.snapshot() == (3, [1.0, 2.0, 3.0, 4.0])
    assert served.parts()[0].history == LOST.history
    talks = [served.talk(hello(rank, history=LOST.history)) for rank in (0, 1)]
    assert make_rounds(talks, range(3, 4)).version == 4
    assert [worker.steps for worker in served.statistics().workers] == [1, 1]


def test_workers_that_exchange_find_out_anew_where_a_refilled_shard_is(served: Served) -> None:
    """A shard that lost the end of its log: the streams of the others end, so that they greet with what they know."""
    talks = served.join()
    history = told(served, make_rounds(talks, range(1)))
    newer = pb.Refill(history=LOST.history, membership=LOST.membership)
    newer.history.run = history.run
    assert served.seed(REPLICA, newer)
    code, error = talks[1].hear_refusal()
    assert (code, type(error)) == (CODE.OUT_OF_RANGE, BehindError)
    again = [served.talk(hello(rank, history=newer.history)) for rank in (0, 1)]
    assert make_rounds(again, range(3, 4)).version == 4


@pytest.mark.parametrize(
    ("consistency", "run", "said"),
    [
        (Consistency(), 9, "is in run 9, this shard in run"),
        (Consistency("async"), 0, "in lockstep only. Restore the state folder"),
        (Consistency(downlink="shadow"), 0, "in lockstep only. Restore the state folder"),
    ],
)
def test_a_replica_that_is_not_all_the_shard_knew_is_refused(
    served: Served, consistency: Consistency, run: int, said: str
) -> None:
    """Of another run, or where a replica does not hold what the shard held: it is data loss, and says what to do."""
    first, second = served.join(consistency=consistency)
    first.say(*push(0, frame_of(1.0)))
    second.say(*push(0, frame_of(1.0)))
    first.hear()
    newer = pb.Refill(history=LOST.history, membership=LOST.membership)
    newer.history.run = run or served.parts()[0].history.run
    newer.history.version = 30
    with pytest.raises(grpc.RpcError) as caught:
        served.seed(REPLICA, newer)
    code, error = refusal(caught.value)
    assert (code, type(error)) == (CODE.DATA_LOSS, DataLossError)
    assert said in str(error)


def test_a_replica_of_another_size_is_refused_and_changes_nothing(served: Served) -> None:
    """The shard stays empty, and the right one is still welcome."""
    served.register(0)
    for data in (zeros()[:-1], pack_state({PARAMETERS: torch.zeros(9)}, {})):
        with pytest.raises(grpc.RpcError):
            served.seed(data, LOST)
    assert not served.register(0).seeded
    assert served.seed(REPLICA, LOST)
