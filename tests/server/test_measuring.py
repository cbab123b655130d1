"""Measuring the link to a shard: what comes is counted and what is wanted comes back, within bounds, one at a time."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.conversing import SECONDS, Served, frame_of, push, refusal, serving

from thresher.protos.errors import BusyError, ProtocolError, RoundFailedError
from thresher.protos.messages import CHUNK_BYTES
from thresher.server import measuring
from thresher.server.measuring import MEASURED_BYTES, Measuring
from thresher.v1 import aggregation_pb2 as pb

CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(workers=1) as one:
        yield one


def measure(served: Served, sizes: list[int], wanted: int) -> list[pb.MeasureResponse]:
    parts = [
        pb.MeasureRequest(wanted_bytes=wanted if index == 0 else 0, chunk=bytes(size))
        for index, size in enumerate(sizes)
    ]
    return list(served.stub.Measure(iter(parts), timeout=SECONDS))


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, CHUNK_BYTES), min_size=1, max_size=3),
    wanted=st.integers(0, 3 * CHUNK_BYTES) | st.sampled_from([0, 1, CHUNK_BYTES, CHUNK_BYTES + 1]),
)
def test_what_came_is_counted_and_what_is_wanted_comes_back(served: Served, sizes: list[int], wanted: int) -> None:
    """First the count alone, then chunks of at most 1 MiB."""
    first, *rest = measure(served, sizes, wanted)
    assert first == pb.MeasureResponse(received_bytes=sum(sizes))
    assert sum(len(part.chunk) for part in rest) == wanted
    assert all(0 < len(part.chunk) <= CHUNK_BYTES for part in rest)


def test_who_says_nothing_is_answered(served: Served) -> None:
    assert measure(served, [], 0) == [pb.MeasureResponse()]


def test_what_comes_back_cannot_be_compressed(served: Served) -> None:
    """Or a link that compresses would look faster than it is for gradients."""
    _, part = measure(served, [0], 4096)
    assert len(set(part.chunk)) > 200


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([CHUNK_BYTES + 1], 0), ([0], MEASURED_BYTES + 1)], ids=["long chunk", "too much wanted"]
)
def test_what_is_out_of_bounds_is_refused(served: Served, sizes: list[int], wanted: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        measure(served, sizes, wanted)
    code, error = refusal(caught.value)
    assert (code, type(error)) == (CODE.FAILED_PRECONDITION, ProtocolError)
    assert "at most" in str(error)
    assert measure(served, [1], 0)[0].received_bytes == 1  # and the turn is free again


def test_more_than_may_come_is_refused() -> None:
    """Chunk by chunk, without a byte of it being kept."""

    async def endless() -> AsyncIterator[pb.MeasureRequest]:
        part = pb.MeasureRequest(chunk=bytes(CHUNK_BYTES))
        while True:
            yield part

    async def scenario() -> None:
        await anext(Measuring(0).answer(endless()))

    with pytest.raises(ProtocolError, match="at most"):
        asyncio.run(scenario())


async def hanging() -> AsyncIterator[pb.MeasureRequest]:
    await asyncio.sleep(SECONDS)
    yield pb.MeasureRequest()


def test_one_at_a_time_and_pushes_meanwhile(served: Served) -> None:
    """Whoever comes second is told to ask again; a round closes while a measurement is under way."""
    (talk,) = served.join(workers=1)
    going = served.stub.Measure(iter([pb.MeasureRequest(wanted_bytes=MEASURED_BYTES)]), timeout=SECONDS)
    assert next(going) == pb.MeasureResponse()
    with pytest.raises(grpc.RpcError) as caught:
        measure(served, [0], 0)
    code, error = refusal(caught.value)
    assert (code, type(error)) == (CODE.RESOURCE_EXHAUSTED, BusyError)
    talk.say(*push(0, frame_of(1.0)))
    assert talk.hear_update().version == 1
    going.cancel()
    until = time.monotonic() + SECONDS
    while not is_free(served):  # the shard hears of the end when it sends the next chunk
        assert time.monotonic() < until
        time.sleep(0.01)


def is_free(served: Served) -> bool:
    try:
        return bool(measure(served, [5], 0)[0].received_bytes == 5)
    except grpc.RpcError as busy:
        return refusal(busy)[0] is not CODE.RESOURCE_EXHAUSTED


def test_whoever_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who says nothing, and one who does not read; then the turn is another's."""
    monkeypatch.setattr(measuring, "MEASURING_SECONDS", 0.05)

    async def small() -> AsyncIterator[pb.MeasureRequest]:
        yield pb.MeasureRequest(wanted_bytes=4 * CHUNK_BYTES)

    async def scenario() -> None:
        turns = Measuring(3)
        with pytest.raises(RoundFailedError, match="shard 3 took longer"):
            await anext(turns.answer(hanging()))
        unread = turns.answer(small())
        assert await anext(unread) == pb.MeasureResponse()
        await asyncio.sleep(0.1)
        another = turns.answer(small())
        assert await anext(another) == pb.MeasureResponse()
        with pytest.raises(RoundFailedError, match="took longer"):
            await anext(unread)
        with pytest.raises(BusyError):  # the one that was late has not taken the other's turn away
            await anext(turns.answer(small()))
        await another.aclose()

    asyncio.run(scenario())
