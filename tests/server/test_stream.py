"""What one worker is told: backlog first, then what was published since, each update once and in order."""

import asyncio
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import RoundFailedError
from thresher.protos.messages import CHUNK_BYTES, update_to_messages
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.stream import Stream, encoded
from thresher.v1 import aggregation_pb2 as pb


def update(version: int, numel: int = 4) -> Update:
    return Update(version, 1, (0,), SparseGradient.dense(torch.arange(numel) / 3), (True,))


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
            stream.publish(encoded(update(version)))
        stream.greet([encoded(update(version)) for version in known])
        for version in published[early:]:
            stream.publish(encoded(update(version)))
        stream.end()
        return [message.update.version for message in await heard(stream)]

    assert asyncio.run(scenario()) == sorted({*known, *published})


def test_answers_and_updates_keep_their_order() -> None:
    """A refusal that was said between two updates is heard between them."""

    async def scenario() -> list[str | None]:
        stream = Stream()
        stream.greet([])
        stream.publish(encoded(update(1)))
        stream.say(pb.ExchangeResponse(result=pb.PushResult(step=1)))
        stream.publish(encoded(update(2)))
        stream.end()
        return [message.WhichOneof("body") for message in await heard(stream)]

    assert asyncio.run(scenario()) == ["update", "result", "update"]


def test_a_stream_that_ends_with_an_error_says_first_what_waits() -> None:
    """The last update is still read by those who could use it; then the error is raised."""

    async def scenario() -> list[int]:
        stream = Stream()
        stream.greet([])
        stream.publish(encoded(update(1)))
        stream.end(RoundFailedError("worker 1 is gone"))
        versions: list[int] = []
        messages = aiter(stream)
        versions.append((await anext(messages)).update.version)
        with pytest.raises(RoundFailedError, match="worker 1 is gone"):
            await anext(messages)
        return versions

    assert asyncio.run(scenario()) == [1]


def test_an_encoded_update_knows_its_bytes() -> None:
    """What is counted as pulled is what its messages weigh, continuations included."""
    large = update(1, CHUNK_BYTES // 2)
    messages = update_to_messages(large)
    assert encoded(large).wire_bytes == sum(message.ByteSize() for message in messages)
    assert len(b"".join(chain(message.chunk for message in messages))) > 2 * CHUNK_BYTES
