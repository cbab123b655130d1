"""The gRPC edge, spoken to with raw messages: what is right is answered, what is wrong is refused by name, alone."""

import asyncio
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.protos.codec import encode
from thresher.protos.errors import ProtocolError, ThresherError, error_named
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import (
    chunks,
    layout_to_message,
    optimizer_from_message,
    optimizer_to_message,
    update_from_message,
)
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.transport import ERROR_NAME
from thresher.protos.update import Update
from thresher.server.server import ServerConfig, ShardServer
from thresher.server.shard import ShardConfig
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub

SECONDS = 30.0  # a deadline that turns a hang into a failure; nothing waits for it otherwise
LAYOUT = Layout((TensorSpec("w", (3,), "float32"), TensorSpec("b", (1,), "float32")))
SGD = OptimizerSpec("SGD", ({"lr": 1.0},))
PIECE = LAYOUT.shard_slice(0, 1)
CODE = grpc.StatusCode


def register(
    rank: int, workers: int = 2, layout: Layout = LAYOUT, optimizer: OptimizerSpec = SGD
) -> pb.RegisterRequest:
    return pb.RegisterRequest(
        rank=rank,
        workers=workers,
        incarnation=1,
        shards=1,
        layout=layout_to_message(layout),
        fingerprint=layout.fingerprint,
        optimizer=optimizer_to_message(optimizer),
        method="Identity",
        origin=f"host:{rank}",
    )


def seeds(data: bytes, rank: int = 0, total: int | None = None) -> Iterator[pb.SeedRequest]:
    size = len(data) if total is None else total
    return (pb.SeedRequest(rank=rank, incarnation=1, total_bytes=size, chunk=chunk) for _, chunk in chunks(data))


def zeros(layout: Layout = LAYOUT) -> bytes:
    return pack_state({PARAMETERS: torch.zeros(layout.numel)}, {"bn.mean": torch.ones(2)})


def hello(rank: int, incarnation: int = 1) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(hello=pb.Hello(rank=rank, incarnation=incarnation))


def frame_of(value: float, numel: int = 4) -> bytes:
    return encode(SparseGradient.dense(torch.full((numel,), value)))


def push(step: int, frame: bytes, announced: int | None = None, **fields: Any) -> list[pb.ExchangeRequest]:
    made = pb.Push(step=step, version=step, **fields)
    return [
        pb.ExchangeRequest(push=None if index else made, payload_bytes=size, chunk=chunk)
        for index, (size, chunk) in enumerate((announced if i == 0 and announced is not None else size, chunk)
                                              for i, (size, chunk) in enumerate(chunks(frame)))
    ]  # fmt: skip


def leave(step: int, buffers: bytes = b"", push_bytes: int = 0, pull_bytes: int = 0) -> pb.ExchangeRequest:
    made = pb.Leave(step=step, push_bytes=push_bytes, pull_bytes=pull_bytes)
    return pb.ExchangeRequest(leave=made, payload_bytes=len(buffers), chunk=buffers)


@final
class Conversation:
    """One exchange stream, said and heard message by message."""

    def __init__(self, stub: AggregationServiceStub) -> None:
        self._said: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self.call: Any = stub.Exchange(iter(self._said.get, None), timeout=SECONDS)

    def say(self, *messages: pb.ExchangeRequest) -> None:
        for message in messages:
            self._said.put(message)

    def hear(self) -> pb.ExchangeResponse:
        response = next(self.call)
        assert isinstance(response, pb.ExchangeResponse)
        return response

    def hear_update(self) -> Update:
        response = self.hear()
        return update_from_message(response.update, bytearray(response.chunk), PIECE)

    def stop_talking(self) -> None:
        self._said.put(None)

    def break_off(self) -> None:
        self.call.cancel()
        self._said.put(None)


@final
class Served:
    """A real shard on loopback and a stub to it."""

    def __init__(self, server: ShardServer, stub: AggregationServiceStub) -> None:
        self.server, self.stub = server, stub
        self._talks: list[Conversation] = []

    def talk(self) -> Conversation:
        self._talks.append(Conversation(self.stub))
        return self._talks[-1]

    def join(self, workers: int = 2, layout: Layout = LAYOUT) -> list[Conversation]:
        """Register, seed and greet for all workers."""
        for rank in range(workers):
            self.stub.Register(register(rank, workers, layout), timeout=SECONDS)
        self.stub.Seed(seeds(zeros(layout)), timeout=SECONDS)
        talks = [self.talk() for _ in range(workers)]
        for rank, talk in enumerate(talks):
            talk.say(hello(rank))
        return talks

    def snapshot(self, wait_seconds: float = SECONDS) -> tuple[int, list[float]]:
        parts = list(self.stub.Snapshot(pb.SnapshotRequest(wait_seconds=wait_seconds), timeout=SECONDS))
        state, _ = unpack_state(b"".join(part.chunk for part in parts))
        return parts[0].version, state[PARAMETERS].tolist()

    def statistics(self) -> pb.StatisticsResponse:
        response = self.stub.Statistics(pb.StatisticsRequest(), timeout=SECONDS)
        assert isinstance(response, pb.StatisticsResponse)
        return response

    def wait_until_exchanging(self, rank: int) -> None:
        deadline = time.monotonic() + SECONDS
        while self.statistics().workers[rank].state != "exchanging":
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def hang_up(self) -> None:
        for talk in self._talks:
            talk.break_off()


@contextmanager
def serving(**config: Any) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = ShardServer(ServerConfig(ShardConfig(**{"shard": 0, "shards": 1, "workers": 2, "lease": 60.0} | config)))
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(SECONDS)
    try:
        with grpc.insecure_channel(server.address) as channel:
            served = Served(server, AggregationServiceStub(channel))
            yield served
            served.hang_up()
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(grace=0.2), loop).result(SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def refusal(error: Any) -> tuple[grpc.StatusCode, ThresherError]:
    """The status code, and the error that a client would raise."""
    name = dict(error.trailing_metadata() or ())[ERROR_NAME]
    return error.code(), error_named(str(name), error.details() or "")


def heard_refusal(talk: Conversation) -> tuple[grpc.StatusCode, ThresherError]:
    with pytest.raises(grpc.RpcError) as caught:
        talk.hear()
    return refusal(caught.value)


# --- unary calls -------------------------------------------------------------------------------------------


def test_a_registration_is_answered(served: Served) -> None:
    """The worker learns the run, the version, and how long a round may take; again it hears the same."""
    answer = served.stub.Register(register(0), timeout=SECONDS)
    assert (answer.version, answer.seeded, answer.answer_timeout) == (0, False, 600.0)
    assert answer.run > 0
    assert served.stub.Register(register(0), timeout=SECONDS) == answer


MANY = OptimizerSpec("SGD", tuple({"lr": 0.1 + index, "weight_decay": 1e-4} for index in range(400)))


@pytest.mark.parametrize(
    ("request_", "code", "name"),
    [
        (register(1, layout=Layout((TensorSpec("w", (4,), "float32"),))), CODE.FAILED_PRECONDITION, "LayoutError"),
        (register(1, optimizer=MANY), CODE.FAILED_PRECONDITION, "RegistrationError"),
        (register(2), CODE.FAILED_PRECONDITION, "RegistrationError"),
        (pb.RegisterRequest(rank=1), CODE.FAILED_PRECONDITION, "LayoutError"),
        (
            pb.RegisterRequest(
                layout=layout_to_message(LAYOUT), fingerprint=LAYOUT.fingerprint, optimizer=pb.Optimizer(name="Lion")
            ),
            CODE.INVALID_ARGUMENT,
            "OptimizerError",
        ),
        (
            pb.RegisterRequest(layout=layout_to_message(LAYOUT), fingerprint="another"),
            CODE.FAILED_PRECONDITION,
            "LayoutError",
        ),
    ],
    ids=["layout", "a message longer than gRPC's metadata", "rank", "empty", "optimizer", "fingerprint"],
)
def test_a_refused_registration_names_its_error(
    served: Served, request_: pb.RegisterRequest, code: grpc.StatusCode, name: str
) -> None:
    """The class of the error travels in the trailing metadata, the message in the details, however long it is."""
    served.stub.Register(register(0), timeout=SECONDS)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Register(request_, timeout=SECONDS)
    found, error = refusal(caught.value)
    assert (found, type(error).__name__) == (code, name)
    assert str(error)
    assert [worker.state for worker in served.statistics().workers] == ["registered", "waited for"]


def test_a_seed_can_be_read_back(served: Served) -> None:
    """Rank 0's values are the state of version 0, in as many chunks as they take."""
    layout = Layout((TensorSpec("w", (300_000,), "float32"),))
    served.stub.Register(register(0, layout=layout), timeout=SECONDS)
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    answer = served.stub.Seed(seeds(pack_state({PARAMETERS: values}, {})), timeout=SECONDS)
    assert answer.accepted
    parts = list(served.stub.Snapshot(pb.SnapshotRequest(wait_seconds=SECONDS), timeout=SECONDS))
    assert len(parts) == 2
    state, _ = unpack_state(b"".join(part.chunk for part in parts))
    assert torch.equal(state[PARAMETERS], values)
    assert parts[0].layout == layout_to_message(layout)
    assert optimizer_from_message(parts[0].optimizer) == SGD


@pytest.mark.parametrize(
    ("requests", "code", "said"),
    [
        ([], CODE.FAILED_PRECONDITION, "empty seed"),
        (list(seeds(zeros(), total=1 << 50)), CODE.INVALID_ARGUMENT, "1125899906842624 bytes is announced; at most"),
        (list(seeds(zeros()))[:1] * 2, CODE.INVALID_ARGUMENT, "more came"),
        (list(seeds(zeros(), total=len(zeros()) + 1)), CODE.INVALID_ARGUMENT, "was announced"),
        (list(seeds(b"no safetensors")), CODE.INVALID_ARGUMENT, "not a safetensors file"),
        (list(seeds(pack_state({PARAMETERS: torch.zeros(9)}, {}))), CODE.FAILED_PRECONDITION, "needs float32"),
        (list(seeds(zeros(), rank=1)), CODE.FAILED_PRECONDITION, "rank 0 seeds the shards"),
    ],
    ids=["nothing", "huge", "more than announced", "less than announced", "noise", "another size", "another rank"],
)
def test_a_wrong_seed_is_refused(
    served: Served, requests: Iterable[pb.SeedRequest], code: grpc.StatusCode, said: str
) -> None:
    """What is wrong with it is said, and the right seed is still welcome."""
    for rank in (0, 1):
        served.stub.Register(register(rank), timeout=SECONDS)
    with pytest.raises(grpc.RpcError, match=said) as caught:
        served.stub.Seed(iter(requests), timeout=SECONDS)
    assert refusal(caught.value)[0] is code
    assert served.stub.Seed(seeds(zeros()), timeout=SECONDS).accepted


def test_a_seed_before_any_registration_is_told_to_register(served: Served) -> None:
    """The shard knows no model yet, so it cannot even say how large a seed may be."""
    with pytest.raises(grpc.RpcError, match="register first") as caught:
        served.stub.Seed(seeds(zeros()), timeout=SECONDS)
    assert refusal(caught.value)[0] is CODE.FAILED_PRECONDITION


def test_who_waits_for_a_seed_that_does_not_come_is_told_who_brings_it(served: Served) -> None:
    """The wait has a deadline, and its error names the worker and the shard."""
    with pytest.raises(grpc.RpcError, match=r"shard 0 has waited 0.0 s for its starting values; worker 0") as caught:
        served.snapshot(wait_seconds=0.0)
    assert refusal(caught.value)[0] is CODE.ABORTED


# --- the exchange ------------------------------------------------------------------------------------------


def test_a_round_through_the_wire(served: Served) -> None:
    """Two pushes, one update for both, counted to the byte on both sides; then both leave in peace."""
    talks = served.join()
    sent = [push(0, frame_of(1.0)), push(0, frame_of(3.0))]
    for talk, messages in zip(talks, sent, strict=True):
        talk.say(*messages)
    responses = [talk.hear() for talk in talks]
    update = update_from_message(responses[0].update, bytearray(responses[0].chunk), PIECE)
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
        talk.say(leave(1))
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
    second.say(leave(0))
    assert second.hear().HasField("left")
    return [first]


def test_a_leave_that_closes_a_round_is_answered_by_left_alone(served: Served) -> None:
    """Who leaves hears of no update that its leave let happen: nothing follows, and nothing is counted as pulled."""
    first, second = served.join()
    second.say(*push(0, frame_of(4.0)))
    second.say(*push(0, frame_of(4.0)))  # its answer tells that the first one has been taken
    assert second.hear().result.verdict == pb.VERDICT_DUPLICATE
    first.say(leave(0))
    assert first.hear().left.version == 0
    assert list(first.call) == []
    assert second.hear_update().members == 1
    assert served.statistics().workers[0].pull_bytes == 0


def test_buffers_of_a_leave_are_in_the_snapshot(served: Served) -> None:
    """Rank 0 hands over its BatchNorm statistics when it leaves."""
    first, _ = served.join()
    first.say(leave(0, buffers=pack_state({}, {"bn.mean": torch.full((2,), 5.0)})))
    assert first.hear().HasField("left")
    parts = served.stub.Snapshot(pb.SnapshotRequest(wait_seconds=SECONDS), timeout=SECONDS)
    _, untrained = unpack_state(b"".join(part.chunk for part in parts))
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
        ([hello(0)], CODE.FAILED_PRECONDITION, "one hello"),
        ([pb.ExchangeRequest(chunk=b"abc")], CODE.FAILED_PRECONDITION, "came before its message"),
        ([push(0, GOOD, announced=61)[0], hello(0)], CODE.FAILED_PRECONDITION, "before the payload of the last one"),
        ([leave(3)], CODE.FAILED_PRECONDITION, "leaves at step 3, but has pushed 0 steps"),
        ([leave(0, buffers=b"noise")], CODE.INVALID_ARGUMENT, "not a safetensors file"),
    ],
    ids=["truncated", "no frame", "corrupt", "another slice", "huge claim", "more than claimed", "above the bound",
         "presence", "override without value", "unknown override", "two hellos", "chunk before body",
         "interrupted payload", "leave at another step", "buffers"],
)  # fmt: skip
def test_a_broken_message_ends_its_own_stream_only(
    served: Served, messages: list[pb.ExchangeRequest], code: grpc.StatusCode, said: str
) -> None:
    """The error is told by name; version, parameters and the other's push are as before, and it can come back."""
    first, second = served.join()
    second.say(*push(0, frame_of(3.0)), *push(0, frame_of(3.0)))
    assert second.hear().result.verdict == pb.VERDICT_DUPLICATE
    first.say(*messages)
    found, error = heard_refusal(first)
    assert found is code
    with pytest.raises(type(error), match=said):
        raise error
    assert served.snapshot() == (0, [0.0] * 4)
    assert served.statistics().workers[0].pushed_elements == 0
    again = served.talk()
    again.say(hello(0), *push(0, frame_of(1.0)))
    assert again.hear_update().version == second.hear_update().version == 1
    assert served.snapshot() == (1, [-2.0] * 4)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (push(0, b""), "the first message of a stream must be a hello"),
        ([leave(0)], "the first message of a stream must be a hello"),
        ([hello(0, incarnation=9)], "not registered under this incarnation"),
        ([hello(7)], "not registered"),
        ([pb.ExchangeRequest(hello=pb.Hello(rank=0, incarnation=1, version=3))], "no longer in the log"),
        ([pb.ExchangeRequest()], "came before its message"),
    ],
    ids=["push first", "leave first", "another life", "no such rank", "from the future", "empty"],
)
def test_a_stream_that_begins_wrongly_is_refused(served: Served, messages: list[pb.ExchangeRequest], said: str) -> None:
    """Nothing that a stranger says reaches the shard."""
    served.stub.Register(register(0), timeout=SECONDS)
    served.stub.Seed(seeds(zeros()), timeout=SECONDS)
    talk = served.talk()
    talk.say(*messages)
    code, error = heard_refusal(talk)
    assert code is CODE.FAILED_PRECONDITION
    assert isinstance(error, ProtocolError)
    assert said in str(error)
    assert served.statistics().workers[0].state == "registered"


def test_a_stream_that_ends_without_a_leave_is_told_so(served: Served) -> None:
    """Who closes its side and waits would otherwise wait for ever."""
    first, _ = served.join()
    first.stop_talking()
    code, error = heard_refusal(first)
    assert code is CODE.FAILED_PRECONDITION
    assert "ended without a leave" in str(error)


def test_a_broken_stream_fails_the_run_after_its_lease() -> None:
    """The others end with an error that names the lost worker, and new calls hear the same."""
    with serving(lease=0.0) as served:
        first, second = served.join()
        first.say(*push(0, GOOD))
        second.say(*push(0, GOOD))
        assert first.hear_update().version == second.hear_update().version == 1
        second.break_off()
        code, error = heard_refusal(first)
        assert code is CODE.ABORTED
        assert "round 1 of shard 0 cannot be closed: worker 1 (host:1) lost its connection" in str(error)
        assert [worker.state for worker in served.statistics().workers][1] == "lost"
        with pytest.raises(grpc.RpcError, match="worker 1") as caught:
            served.stub.Register(register(0), timeout=SECONDS)
        assert refusal(caught.value)[0] is CODE.ABORTED
        assert served.statistics().failure == str(error)


def test_a_stream_that_breaks_during_its_hello_is_noticed(served: Served) -> None:
    """However the break and the hello interleave, a worker that is gone is never taken for one that exchanges."""
    _, second = served.join()
    second.break_off()
    for _ in range(30):
        talk = served.talk()
        talk.say(hello(1))
        talk.break_off()
    deadline = time.monotonic() + SECONDS / 2  # the calls themselves end after SECONDS
    while served.statistics().workers[1].state == "exchanging":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_stream_of_a_worker_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that comes back before its old stream was seen to break is not taken for lost when it does."""
    with serving(lease=0.0) as served:
        first, second = served.join()
        served.wait_until_exchanging(1)  # streams overtake each other: the second one is the one that is heard later
        again = served.talk()
        again.say(hello(1), *push(0, GOOD))
        _, error = heard_refusal(second)
        assert "another stream" in str(error)
        first.say(*push(0, GOOD))
        assert first.hear_update().version == again.hear_update().version == 1
    assert not caplog.records  # the old stream's reader was still listening when it was ended: no fault of anybody


def test_the_reason_of_an_abort_reaches_the_others_however_long(served: Served) -> None:
    """A whole traceback is cut to what gRPC's metadata carries, its beginning kept."""
    first, second = served.join()
    second.say(pb.ExchangeRequest(abort=pb.Abort(reason="diverged: π → ∞\n" + "é" * 50_000)))
    for talk in (first, second):
        code, error = heard_refusal(talk)
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
    talk = fuzzed.talk()
    talk.say(hello(0))
    for index, part in enumerate(parts):
        body = pb.Push(step=0) if index < bodies else None
        talk.say(pb.ExchangeRequest(push=body, payload_bytes=announced, chunk=part))
    talk.stop_talking()
    code, _ = heard_refusal(talk)
    assert code in (CODE.INVALID_ARGUMENT, CODE.FAILED_PRECONDITION)
    assert fuzzed.snapshot() == (0, [0.0] * 4)
