"""What one worker is told: backlog first, then what was published since, each update once and in order."""

import asyncio
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import RoundFailedError, ThresherError
from thresher.protos.messages import CHUNK_BYTES
from thresher.protos.sealed import SealedUpdate, sealed
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.events import Worker
from thresher.server.stream import ANSWER_BYTES, Stream, UnreadError
from thresher.v1 import aggregation_pb2 as pb


def update(version: int, numel: int = 4) -> SealedUpdate:
    return sealed(Update(version, 1, (0,), SparseGradient.dense(torch.arange(numel) / 3), (True,)), b"")


async def heard(stream: Stream) -> list[pb.ExchangeResponse]:
    return [message async for message in stream]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_no_update_is_missed_or_said_twice(read: int, overlap: int, early: int, later: int) -> None:
    """However the greeting falls among the updates, the worker hears every version after its own once, in order."""
    backlog = range(read + 1, read + 1 + overlap)  # what the shard answered to the hello
    known = list(backlog)
    first_early = max(read + 1, read + 1 + overlap - early)  # published while the hello was under way, some of it twice
    published = range(first_early, first_early + early + later)

    async def scenario() -> list[int]:
        stream = Stream(1 << 30)
        for version in published[:early]:
            stream.publish(update(version))
        stream.greet([update(version) for version in known])
        for version in published[early:]:
            stream.publish(update(version))
        stream.end()
        return [message.update.version for message in await heard(stream)]

    assert asyncio.run(scenario()) == sorted({*known, *published})


def test_answers_and_updates_keep_their_order() -> None:
    """A refusal that was said between two updates is heard between them."""

    async def scenario() -> list[str | None]:
        stream = Stream(1 << 30)
        stream.greet([])
        stream.publish(update(1))
        stream.say(pb.ExchangeResponse(result=pb.PushResult(step=1)))
        stream.publish(update(2))
        stream.end()
        return [message.WhichOneof("body") for message in await heard(stream)]

    assert asyncio.run(scenario()) == ["update", "result", "update"]


def test_a_stream_that_ends_with_an_error_says_first_what_waits() -> None:
    """The last update is still read by those who could use it; of several reasons the first counts."""

    async def scenario() -> Stream:
        stream = Stream(1 << 30)
        stream.greet([])
        stream.publish(update(1))
        stream.end(RoundFailedError("worker 1 is gone"))
        stream.end()
        stream.publish(update(2))
        assert [message.update.version for message in await heard(stream)] == [1]
        return stream

    assert str(asyncio.run(scenario()).refusal) == "worker 1 is gone"


@given(st.lists(st.sampled_from(["update", "answer", "read"]), max_size=60), st.integers(0, 400))
def test_what_a_worker_does_not_read_is_bounded(happened: list[str], bound: int) -> None:
    """Whatever is read in between: never more waits than the bound and one update; then the stream ends, and says so.

    Whoever reads all that it is told is told all.
    """

    async def scenario() -> None:
        stream, waiting, said = Stream(bound), 0, 0
        stream.greet([])
        messages = aiter(stream)
        for event in happened:
            match event:
                case "update":
                    over = waiting > bound
                    stream.publish(update(said + 1))
                    if over:
                        assert isinstance(stream.refusal, UnreadError)
                        assert f"{waiting} bytes of updates wait for it, {bound} may" in str(stream.refusal)
                        assert await heard(stream) == []
                        return
                    said, waiting = said + 1, waiting + update(said + 1).wire_bytes
                case "answer":
                    stream.say(pb.ExchangeResponse(result=pb.PushResult(step=said)))
                case _:
                    if waiting:
                        while not (message := await anext(messages)).HasField("update"):
                            pass
                        waiting -= update(message.update.version).wire_bytes
            assert stream.refusal is None

    asyncio.run(scenario())


def test_answers_that_are_not_read_end_the_stream() -> None:
    """Who asks and asks, and never listens, is not waited for."""

    async def scenario() -> None:
        stream = Stream(1 << 30)
        stream.worker = Worker(3, 1)
        answer = pb.ExchangeResponse(result=pb.PushResult(reason="no" * 500))
        for _ in range(ANSWER_BYTES // answer.ByteSize() + 1):
            stream.say(answer)
        assert stream.refusal is None
        stream.say(answer)
        assert "worker 3 does not read what it is told" in str(stream.refusal)
        assert await heard(stream) == []

    asyncio.run(scenario())


def test_a_stream_and_the_task_that_hears_its_worker_end_together() -> None:
    """Whichever ends first: a stream that was ended hears nothing more, and what a worker is refused for ends it."""

    async def refused() -> ThresherError | None:
        return RoundFailedError("a reason")

    async def scenario() -> None:
        first, second = Stream(1 << 30), Stream(1 << 30)
        hears = asyncio.create_task(asyncio.Event().wait())
        first.listen(cast("asyncio.Task[ThresherError | None]", hears))
        first.end()
        second.listen(asyncio.create_task(refused()))
        assert await heard(first) == await heard(second) == []
        assert first.refusal is None
        assert str(second.refusal) == "a reason"
        with pytest.raises(asyncio.CancelledError):
            await hears

    asyncio.run(scenario())


def test_a_large_update_is_said_in_parts_one_behind_the_other() -> None:
    """No message is longer than gRPC takes, and nothing comes between the parts of one update."""

    async def scenario() -> list[pb.ExchangeResponse]:
        stream = Stream(1 << 30)
        stream.greet([update(1, CHUNK_BYTES // 2)])
        stream.publish(update(2))
        stream.end()
        return await heard(stream)

    *parts, last = asyncio.run(scenario())
    assert [part.WhichOneof("body") for part in parts] == ["update", None, None]
    assert sum(len(part.chunk) for part in parts) == parts[0].payload_bytes > 2 * CHUNK_BYTES
    assert last.update.version == 2


def test_a_stream_without_a_greeting_says_no_update() -> None:
    """Before the shard has answered the hello nobody knows what the worker lacks: updates wait, errors do not."""

    async def scenario() -> None:
        stream = Stream(1 << 30)
        stream.publish(update(1))
        stream.end(RoundFailedError("worker 1 is gone"))
        assert await heard(stream) == []

    asyncio.run(scenario())
