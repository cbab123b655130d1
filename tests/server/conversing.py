"""Speaks to a real shard with raw messages, as workers do, and hears every answer."""

import asyncio
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, final

import grpc
import pytest
import torch

from thresher.protos.codec import encode
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ThresherError, error_named
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import chunks, consistency_to_message, layout_to_message, optimizer_to_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.sealed import update_from_message
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.transport import ERROR_NAME
from thresher.protos.update import Update
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub

SECONDS = 30.0  # a deadline that turns a hang into a failure; nothing waits for it otherwise
LAYOUT = Layout(
    (TensorSpec("w", (3,), "float32"), TensorSpec("b", (1,), "float32")), (TensorSpec("bn.mean", (2,), "float32"),)
)
SGD = OptimizerSpec("SGD", ({"lr": 1.0},))
LOCKSTEP = Consistency()


def register(
    rank: int,
    workers: int = 2,
    layout: Layout = LAYOUT,
    optimizer: OptimizerSpec = SGD,
    incarnation: int = 1,
    consistency: Consistency = LOCKSTEP,
    shard: int = 0,
    shards: int = 1,
) -> pb.RegisterRequest:
    return pb.RegisterRequest(
        rank=rank,
        workers=workers,
        incarnation=incarnation,
        shard=shard,
        shards=shards,
        layout=layout_to_message(layout),
        fingerprint=layout.fingerprint,
        optimizer=optimizer_to_message(optimizer),
        method="Identity",
        consistency=consistency_to_message(consistency),
        origin=f"host:{rank}",
    )


def seeds(
    data: bytes, rank: int = 0, total: int | None = None, refill: pb.Refill | None = None
) -> Iterator[pb.SeedRequest]:
    size = len(data) if total is None else total
    for index, (_, chunk) in enumerate(chunks(data)):
        first = refill if index == 0 else None
        yield pb.SeedRequest(rank=rank, incarnation=1, total_bytes=size, chunk=chunk, refill=first)


def zeros(layout: Layout = LAYOUT) -> bytes:
    untrained = {spec.name: torch.ones(spec.shape) for spec in layout.untrained}
    return pack_state({PARAMETERS: torch.zeros(layout.numel)}, untrained)


def hello(rank: int, incarnation: int = 1, history: pb.History | None = None) -> pb.ExchangeRequest:
    at = history or pb.History()
    said = pb.Hello(rank=rank, incarnation=incarnation, run=at.run, version=at.version, digest=at.digest)
    return pb.ExchangeRequest(hello=said)


def frame_of(value: float, numel: int = 4) -> bytes:
    return encode(SparseGradient.dense(torch.full((numel,), value)))


def push(step: int, frame: bytes, announced: int | None = None, **fields: Any) -> list[pb.ExchangeRequest]:
    said: dict[str, Any] = {"step": step, "version": step} | fields
    made = pb.Push(**said)
    return [
        pb.ExchangeRequest(push=None if index else made, payload_bytes=size, chunk=chunk)
        for index, (size, chunk) in enumerate((announced if i == 0 and announced is not None else size, chunk)
                                              for i, (size, chunk) in enumerate(chunks(frame)))
    ]  # fmt: skip


def leave(buffers: bytes = b"", **fields: Any) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(leave=pb.Leave(**fields), payload_bytes=len(buffers), chunk=buffers)


def agree(number: int, **values: float) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(agree=pb.Agree(number=number, values=values))


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

    def hear_update(self, layout: Layout = LAYOUT) -> Update:
        response = self.hear()
        assert response.HasField("update"), response
        return update_from_message(response.update, response.chunk, layout.shard_slice(0, 1))

    def hear_refusal(self) -> tuple[grpc.StatusCode, ThresherError]:
        with pytest.raises(grpc.RpcError) as caught:
            self.hear()
        return refusal(caught.value)

    def stop_talking(self) -> None:
        self._said.put(None)

    def break_off(self) -> None:
        self.call.cancel()
        self._said.put(None)


def refusal(error: Any) -> tuple[grpc.StatusCode, ThresherError]:
    """The status code, and the error that a client would raise."""
    name = dict(error.trailing_metadata() or ())[ERROR_NAME]
    return error.code(), error_named(str(name), error.details() or "")


@final
class Served:
    """A shard and a stub to it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = AggregationServiceStub(channel)
        self._talks: list[Conversation] = []

    def register(self, rank: int, **fields: Any) -> pb.RegisterResponse:
        answer = self.stub.Register(register(rank, **fields), timeout=SECONDS)
        assert isinstance(answer, pb.RegisterResponse)
        return answer

    def seed(self, data: bytes, refill: pb.Refill | None = None, rank: int = 0) -> bool:
        return bool(self.stub.Seed(seeds(data, rank, refill=refill), timeout=SECONDS).accepted)

    def talk(self, *messages: pb.ExchangeRequest) -> Conversation:
        self._talks.append(Conversation(self.stub))
        self._talks[-1].say(*messages)
        return self._talks[-1]

    def join(self, workers: int = 2, layout: Layout = LAYOUT, **fields: Any) -> list[Conversation]:
        """Register, seed and greet for all workers."""
        for rank in range(workers):
            self.register(rank, workers=workers, layout=layout, **fields)
        self.seed(zeros(layout))
        return [self.talk(hello(rank)) for rank in range(workers)]

    def come_back(self, *histories: pb.History) -> list[Conversation]:
        """Register and greet for all workers, each at the last it was told."""
        for rank in range(len(histories)):
            self.register(rank, workers=len(histories))
        return [self.talk(hello(rank, history=history)) for rank, history in enumerate(histories)]

    def parts(self, wait_seconds: float = SECONDS) -> list[pb.SnapshotResponse]:
        return list(self.stub.Snapshot(pb.SnapshotRequest(wait_seconds=wait_seconds), timeout=SECONDS))

    def snapshot(self, wait_seconds: float = SECONDS) -> tuple[int, list[float]]:
        parts = self.parts(wait_seconds)
        state, _ = unpack_state(b"".join(part.chunk for part in parts))
        return parts[0].version, state[PARAMETERS].tolist()

    def statistics(self) -> pb.StatisticsResponse:
        response = self.stub.Statistics(pb.StatisticsRequest(), timeout=SECONDS)
        assert isinstance(response, pb.StatisticsResponse)
        return response

    def wait_until(self, rank: int, *states: str) -> None:
        deadline = time.monotonic() + SECONDS / 2  # the calls themselves end after SECONDS
        while self.statistics().workers[rank].state not in states:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def hang_up(self) -> None:
        for talk in self._talks:
            talk.break_off()


def make_rounds(talks: list[Conversation], steps: range) -> Update:
    """Push the value of step plus rank from each, step after step; return the newest update."""
    newest: Update | None = None
    for step in steps:
        for rank, talk in enumerate(talks):
            talk.say(*push(step, frame_of(1.0 + step + rank)))
        newest, *_ = (talk.hear_update() for talk in talks)
    assert newest is not None
    return newest


def told(served: Served, update: Update) -> pb.History:
    """Where a worker is that was told of this update."""
    return pb.History(run=served.parts()[0].history.run, version=update.version, digest=update.digest)


@contextmanager
def reached_at(address: str) -> Iterator[Served]:
    with grpc.insecure_channel(address) as channel:
        served = Served(channel)
        try:
            yield served
        finally:
            served.hang_up()


@contextmanager
def serving(served_with: Mapping[str, Any] = MappingProxyType({}), **config: Any) -> Iterator[Served]:
    """A shard for two workers on loopback, stopped in peace at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    shard = ShardConfig(**{"shard": 0, "shards": 1, "workers": 2} | config)
    try:
        server = ShardServer(ServerConfig(shard, **served_with))
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(SECONDS)
        try:
            with reached_at(server.address) as served:
                yield served
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(grace=0.2), loop).result(SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
