"""The exchange, spoken with raw messages: what is right is answered, what is wrong is refused by name, alone."""

from collections.abc import Iterator

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.conversing import LAYOUT, Conversation, Served, frame_of, hello, leave, push, refusal, serving, zeros

from thresher.protos.codec import encode
from thresher.protos.errors import FencedError, ProtocolError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.sealed import update_from_message
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.v1 import aggregation_pb2 as pb

CODE = grpc.StatusCode


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def test_a_round_through_the_wire(served: Served) -> None:
    """Two pushes, one update for both, counted to the byte on both sides; then both leave in peace."""
    talks = served.join()
    sent = [push(0, frame_of(1.0)), push(0, frame_of(3.0))]
    for talk, messages in zip(talks, sent, strict=True):
        talk.say(*messages)
    responses = [talk.hear() for talk in talks]
    update = update_from_message(responses[0].update, responses[0].chunk, LAYOUT.shard_slice(0, 1))
    assert responses[0] == responses[1]
    assert (update.version, update.members, update.contributors) == (1, 2, (0, 1))
    assert update.mean is not None
    assert update.mean.values.tolist() == [2.0] * 4
    assert served.snapshot() == (1, [-2.0] * 4)
    workers = served.statistics().workers
    assert [worker.push_bytes for worker in workers] == [sum(m.ByteSize() for m in messages) for messages in sent]
    assert [worker.pull_bytes for worker in workers] == [response.ByteSize() for response in responses]
    assert [(worker.steps, worker.pushed_elements, worker.pushable_elements) for worker in workers] == [(1, 4, 4)] * 2
    for talk in talks:
        talk.say(leave())
        assert talk.hear().left.version == 1
        assert list(talk.call) == []
    assert served.statistics().state == "finished"


def test_a_frame_in_chunks_is_put_together(served: Served) -> None:
    """A push of several MiB arrives whole, and its update too."""
    layout = Layout((TensorSpec("w", (600_000,), "float32"),))
    (talk,) = served_alone(served, layout)
    messages = push(0, encode(SparseGradient.dense(torch.arange(600_000) / 3)))  # constant values would be a bit each
    talk.say(*messages)
    first, *others = [talk.hear() for _ in range(3)]
    assert first.payload_bytes == sum(len(part.chunk) for part in (first, *others))
    assert served.statistics().workers[0].push_bytes == sum(message.ByteSize() for message in messages)
    assert served.snapshot()[0] == 1


def served_alone(served: Served, layout: Layout = LAYOUT) -> list[Conversation]:
    """Worker 1 leaves at once, so that worker 0 closes rounds alone."""
    first, second = served.join(layout=layout)
    second.say(leave())
    assert second.hear().HasField("left")
    return [first]


def test_a_leave_that_closes_a_round_is_answered_by_left_alone(served: Served) -> None:
    """Who leaves hears of no update that its leave let happen: nothing follows, and nothing is counted as pulled."""
    first, second = served.join()
    second.say(*push(0, frame_of(4.0)))
    second.say(*push(0, frame_of(4.0)))  # its answer tells that the first one has been taken
    assert second.hear().result.verdict == pb.VERDICT_DUPLICATE
    first.say(leave())
    assert first.hear().left.version == 0
    assert list(first.call) == []
    assert second.hear_update().members == 1
    assert served.statistics().workers[0].pull_bytes == 0


def test_who_leaves_with_an_open_push_is_refused(served: Served) -> None:
    """The push would be in no round, and nobody would know; it stays, and its worker may come back for the answer."""
    first, second = served.join()
    first.say(*push(0, frame_of(1.0)), leave())
    code, error = first.hear_refusal()
    assert code is CODE.FAILED_PRECONDITION
    assert "leaves, but its push of step 0 is open" in str(error)
    again = served.talk(hello(0))
    second.say(*push(0, frame_of(3.0)))
    assert again.hear_update().contributors == second.hear_update().contributors == (0, 1)


def test_buffers_of_a_leave_are_in_the_snapshot(served: Served) -> None:
    """Rank 0 hands over its BatchNorm statistics when it leaves."""
    first, _ = served.join()
    first.say(leave(buffers=pack_state({}, {"bn.mean": torch.full((2,), 5.0)})))
    assert first.hear().HasField("left")
    _, untrained = unpack_state(b"".join(part.chunk for part in served.parts()))
    assert untrained["bn.mean"].tolist() == [5.0, 5.0]


def test_a_refused_push_is_answered_and_the_stream_goes_on(served: Served) -> None:
    """REJECTED says why, DUPLICATE that nothing changed; the right push still counts."""
    first, second = served.join()
    nan = encode(SparseGradient.dense(torch.tensor([0.0, float("nan"), 0.0, 0.0])))
    first.say(*push(0, nan))
    result = first.hear().result
    assert (result.step, result.verdict) == (0, pb.VERDICT_REJECTED)
    assert "worker 0 (host:0) pushed NaN or infinity in step 0" in result.reason
    first.say(*push(0, frame_of(1.0)), *push(0, frame_of(1.0)), *push(0, frame_of(2.0)))
    assert first.hear().result.verdict == pb.VERDICT_DUPLICATE
    conflict = first.hear().result
    assert conflict.verdict == pb.VERDICT_REJECTED
    assert "with other content" in conflict.reason
    second.say(*push(0, b"", skipped=True))
    update = first.hear_update()
    assert update.mean is not None
    assert update.mean.values.tolist() == [0.5] * 4


GOOD = frame_of(1.0)
HUGE = 1 << 40


@pytest.mark.parametrize(
    ("messages", "code", "said"),
    [
        (push(0, GOOD[:-1]), CODE.INVALID_ARGUMENT, "length"),
        (push(0, b""), CODE.INVALID_ARGUMENT, "truncated"),
        (push(0, GOOD[:-1] + b"\x01"), CODE.INVALID_ARGUMENT, "crc"),
        (push(0, frame_of(1.0, numel=5)), CODE.INVALID_ARGUMENT, "numel|announced"),
        (push(0, GOOD, announced=HUGE), CODE.INVALID_ARGUMENT, f"{HUGE} bytes is announced; at most"),
        (push(0, GOOD, announced=3), CODE.INVALID_ARGUMENT, "3 bytes was announced, more came"),
        (push(0, bytes(2000)), CODE.INVALID_ARGUMENT, "2000 bytes is announced"),
        (push(0, GOOD, presence=b"\xff"), CODE.FAILED_PRECONDITION, "beyond the 2 of this shard"),
        (push(0, GOOD, overrides=[pb.Override(name="lr")]), CODE.INVALID_ARGUMENT, "without a value"),
        (push(0, GOOD, overrides=[pb.Override(name="x", value=pb.Value(number=1))]), CODE.INVALID_ARGUMENT, "'x'"),
        ([hello(0)], CODE.FAILED_PRECONDITION, "after a hello come pushes"),
        ([pb.ExchangeRequest(chunk=b"abc")], CODE.FAILED_PRECONDITION, "came before its message"),
        ([push(0, GOOD, announced=61)[0], hello(0)], CODE.FAILED_PRECONDITION, "before the payload of the last one"),
        ([leave(buffers=b"noise")], CODE.INVALID_ARGUMENT, "not a safetensors file"),
    ],
    ids=["truncated", "no frame", "corrupt", "another slice", "huge claim", "more than claimed", "above the bound",
         "presence", "override without value", "unknown override", "two hellos", "chunk before body",
         "interrupted payload", "buffers"],
)  # fmt: skip
def test_a_broken_message_ends_its_own_stream_only(
    served: Served, messages: list[pb.ExchangeRequest], code: grpc.StatusCode, said: str
) -> None:
    """The error is told by name; version, parameters and the other's push are as before, and it can come back."""
    first, second = served.join()
    second.say(*push(0, frame_of(3.0)), *push(0, frame_of(3.0)))
    assert second.hear().result.verdict == pb.VERDICT_DUPLICATE
    first.say(*messages)
    found, error = first.hear_refusal()
    assert found is code
    with pytest.raises(type(error), match=said):
        raise error
    assert served.snapshot() == (0, [0.0] * 4)
    assert served.statistics().workers[0].pushed_elements == 0
    again = served.talk(hello(0), *push(0, frame_of(1.0)))
    assert again.hear_update().version == second.hear_update().version == 1
    assert served.snapshot() == (1, [-2.0] * 4)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (push(0, b""), "the first message of a stream must be a hello"),
        ([leave()], "the first message of a stream must be a hello"),
        ([hello(0, incarnation=9)], "not registered under this incarnation"),
        ([hello(7)], "not registered"),
        ([pb.ExchangeRequest()], "came before its message"),
    ],
    ids=["push first", "leave first", "another life", "no such rank", "empty"],
)
def test_a_stream_that_begins_wrongly_is_refused(served: Served, messages: list[pb.ExchangeRequest], said: str) -> None:
    """Nothing that a stranger says reaches the shard."""
    served.register(0)
    served.seed(zeros())
    talk = served.talk(*messages)
    code, error = talk.hear_refusal()
    assert code is CODE.FAILED_PRECONDITION
    assert isinstance(error, ProtocolError)
    assert said in str(error)
    assert served.statistics().workers[0].state == "registered"


def test_a_stream_that_ends_without_a_leave_is_told_so(served: Served) -> None:
    """Who closes its side and waits would otherwise wait for ever."""
    first, _ = served.join()
    first.stop_talking()
    code, error = first.hear_refusal()
    assert code is CODE.FAILED_PRECONDITION
    assert "ended without a leave" in str(error)


def test_the_others_go_on_without_a_worker_whose_lease_is_over() -> None:
    """The round that waited for it is closed, and those after it have one member less, which the updates say."""
    with serving(lease=0.0) as served:
        first, second = served.join()
        first.say(*push(0, GOOD))
        second.say(*push(0, GOOD))
        assert first.hear_update().version == second.hear_update().version == 1
        second.break_off()
        first.say(*push(1, GOOD))
        update = first.hear_update()
        assert (update.members, update.contributors) == (2, (0,))
        assert update.membership is not None
        assert update.membership.ranks == (0,)
        first.say(*push(2, GOOD))
        assert first.hear_update().members == 1
        assert [worker.state for worker in served.statistics().workers] == ["exchanging", "lost"]


def test_a_round_that_waits_too_long_fails_the_run_and_names_who_is_missing() -> None:
    """All streams end with the reason, and new calls hear the same."""
    with serving(round_timeout=0.0, start_timeout=0.0, lease=0.0) as served:
        first, second = served.join()
        first.say(*push(0, GOOD))
        code, error = first.hear_refusal()
        assert code is CODE.ABORTED
        assert "round 0 of shard 0 was open for" in str(error)
        assert "worker 1 (host:1)" in str(error)
        assert str(second.hear_refusal()[1]) == str(error)
        with pytest.raises(grpc.RpcError, match="worker 1") as caught:
            served.register(0)
        assert refusal(caught.value)[0] is CODE.ABORTED
        assert (served.statistics().state, served.statistics().failure) == ("failed", str(error))


def test_a_stream_that_breaks_during_its_hello_is_noticed(served: Served) -> None:
    """However the break and the hello interleave, a worker that is gone is never taken for one that exchanges."""
    _, second = served.join()
    second.break_off()
    for _ in range(30):
        served.talk(hello(1)).break_off()
    served.wait_until(1, "lost", "registered")


def test_a_second_stream_of_a_worker_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that comes back before its old stream was seen to break is not taken for lost when it does."""
    with serving(lease=0.0) as served:
        first, second = served.join()
        served.wait_until(1, "exchanging")  # streams overtake each other: the second is the one that is heard later
        again = served.talk(hello(1), *push(0, GOOD))
        code, error = second.hear_refusal()
        assert (code, type(error)) == (CODE.FAILED_PRECONDITION, FencedError)
        assert "another stream" in str(error)
        first.say(*push(0, GOOD))
        assert first.hear_update().version == again.hear_update().version == 1
    # The old stream's reader was still listening when it was ended: no fault of anybody. asyncio's own records are of
    # other tests' loops, which gRPC's poller may still call when they are closed.
    assert not [record for record in caplog.records if record.name != "asyncio"]


def test_the_reason_of_an_abort_reaches_the_others_however_long(served: Served) -> None:
    """A whole traceback is cut to what gRPC's metadata carries, its beginning kept."""
    first, second = served.join()
    second.say(pb.ExchangeRequest(abort=pb.Abort(reason="diverged: π → ∞\n" + "é" * 50_000)))
    for talk in (first, second):
        code, error = talk.hear_refusal()
        assert code is CODE.ABORTED
        assert "worker 1 (host:1) stopped after 0 steps: diverged: π → ∞\n" in str(error)
    assert served.statistics().state == "failed"


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Served]:
    """One shard for all examples: to start one for each would take longer than the test."""
    with serving() as one:
        one.join()
        yield one


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.integers(0, 100), st.integers(0, 2))
def test_no_bytes_of_a_worker_harm_the_others(fuzzed: Served, parts: list[bytes], announced: int, bodies: int) -> None:
    """Whatever is sent as a push, in whatever parts, is refused with one of our errors; nothing hangs or changes."""
    talk = fuzzed.talk(hello(0))
    for index, part in enumerate(parts):
        body = pb.Push(step=0) if index < bodies else None
        talk.say(pb.ExchangeRequest(push=body, payload_bytes=announced, chunk=part))
    talk.stop_talking()
    code, _ = talk.hear_refusal()
    assert code in (CODE.INVALID_ARGUMENT, CODE.FAILED_PRECONDITION)
    assert fuzzed.snapshot() == (0, [0.0] * 4)
