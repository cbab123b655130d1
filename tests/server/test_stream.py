"""What one worker is told: backlog first, then what was published since, each update once and in order."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import RoundFailedError
from thresher.protos.messages import CHUNK_BYTES
from thresher.protos.sealed import SealedUpdate, sealed
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.stream import Stream
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
        stream = Stream()
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
        stream = Stream()
        stream.greet([])
        stream.publish(update(1))
        stream.say(pb.ExchangeResponse(result=pb.PushResult(step=1)))
        stream.publish(update(2))
        stream.end()
        return [message.WhichOneof("body") for message in await heard(stream)]

    assert asyncio.run(scenario()) == ["update", "result", "update"]


def test_a_stream_that_ends_with_an_error_says_first_what_waits() -> None:
    """The last update is still read by those who could use it; then the error is raised."""

    async def scenario() -> list[int]:
        stream = Stream()
        stream.greet([])
        stream.publish(update(1))
        stream.end(RoundFailedError("worker 1 is gone"))
        versions: list[int] = []
        messages = aiter(stream)
        versions.append((await anext(messages)).update.version)
        with pytest.raises(RoundFailedError, match="worker 1 is gone"):
            await anext(messages)
        return versions

    assert asyncio.run(scenario()) == [1]


def test_a_large_update_is_said_in_parts_one_behind_the_other() -> None:
    """No message is longer than gRPC takes, and nothing comes between the parts of one update."""

    async def scenario() -> list[pb.ExchangeResponse]:
        stream = Stream()
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
        stream = Stream()
        stream.publish(update(1))
        stream.end(RoundFailedError("worker 1 is gone"))
        with pytest.raises(RoundFailedError, match="worker 1 is gone"):
            await heard(stream)

    asyncio.run(scenario())
