"""What it costs to hand bytes to another process of this machine: through gRPC as Thresher does, and through Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from statistics import median
from typing import Any, Final

import grpc
import numpy as np

from thresher.deploy.ray_cluster.requirement import check_ray
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError
from thresher.protos.messages import Payload, chunks
from thresher.protos.transport import SERVER_OPTIONS, channel
from thresher.v1 import aggregation_pb2 as pb

Row = dict[str, float | int | str]

Exchange = Callable[[], int]
"""Hands its bytes to the other process, and returns how many that says it has."""

Carriers = Mapping[str, Callable[[bytes], Exchange]]
"""By name, what makes an exchange of some bytes: all that may be done once and for all is done there."""

SIZES: Final = (100, 100_000_000)
REPETITIONS: Final = 2000

_SERVICE: Final = "thresher.bench"
_SECONDS: Final = 600.0
_WARM_UP: Final = 5  # connections are opened, memory is touched for the first time
_SMALL_BYTES: Final = 1 << 20


def measure(sizes: Sequence[int] = SIZES, repetitions: int = REPETITIONS) -> tuple[list[Row], str]:
    """Time exchanges of each size with each carrier: the bytes go to the other process, a number comes back.

    Args:
        sizes: In bytes.
        repetitions: Of which the median is taken; a hundredth of it above 1 MiB.

    Returns:
        Rows of ``transport``, ``bytes``, ``microseconds_per_exchange`` and ``megabytes_per_second`` (10⁶
        bytes, at that time); and why rows are missing, empty when none is.

    Raises:
        AssertionError: the other process did not get what was sent.
    """
    sources: list[Callable[[], AbstractContextManager[Carriers]]] = [grpc_stream]
    hint = ""
    try:
        check_ray()
    except ConfigurationError as error:
        hint = f"Ray was not measured: {error}"
    else:
        from thresher.deploy.ray_cluster.carriers import ray_calls  # noqa: PLC0415 - Ray need not be there

        sources.append(ray_calls)
    return [row for source in sources for row in _rows(source(), sizes, repetitions)], hint


def _rows(source: AbstractContextManager[Carriers], sizes: Sequence[int], repetitions: int) -> Iterator[Row]:
    with source as carriers:
        for name, prepare in carriers.items():
            for size in sizes:
                data = np.random.default_rng(size).bytes(size)
                times = repetitions if size <= _SMALL_BYTES else max(1, repetitions // 100)
                seconds = _seconds(prepare(data), size, times)
                yield {
                    "transport": name,
                    "bytes": size,
                    "microseconds_per_exchange": 1e6 * seconds,
                    "megabytes_per_second": size / 1e6 / seconds,
                }


def _seconds(exchange: Exchange, size: int, repetitions: int) -> float:
    taken = []
    for _ in range(_WARM_UP + repetitions):
        begin = time.perf_counter()
        arrived = exchange()
        taken.append(time.perf_counter() - begin)
        if arrived != size:
            raise AssertionError(f"{arrived} of {size} bytes arrived")
    return median(taken[_WARM_UP:])


@contextmanager
def grpc_stream() -> Iterator[Carriers]:
    """A stream as `Exchange` is one: its messages, options and chunks, a client of threads, a server on asyncio.

    Raises:
        ConnectionTimeoutError: the other process did not start.
    """
    spawning = get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=serve, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(_SECONDS):
            raise ConnectionTimeoutError(f"the other process of the bench did not start within {_SECONDS:.0f} s")
        with channel(here.recv()) as opened:
            waiting: SimpleQueue[pb.ExchangeRequest | None] = SimpleQueue()
            answers = opened.stream_stream(
                f"/{_SERVICE}/Exchange",
                request_serializer=pb.ExchangeRequest.SerializeToString,
                response_deserializer=pb.ExchangeResponse.FromString,
            )(iter(waiting.get, None), timeout=_SECONDS)
            yield {"gRPC stream": lambda data: lambda: _exchange(data, waiting, answers)}
            waiting.put(None)
    finally:
        here.close()  # which ends the process
        process.join()


def _exchange(data: bytes, waiting: "SimpleQueue[pb.ExchangeRequest | None]", answers: Iterator[Any]) -> int:
    for total, chunk in chunks(data):
        waiting.put(pb.ExchangeRequest(payload_bytes=total, chunk=chunk))
    return int(next(answers).payload_bytes)


def serve(connection: Connection) -> None:
    """Serve the other end of the stream, in a process of its own: say where, and end with ``connection``."""
    asyncio.run(_serve(connection))


async def _serve(connection: Connection) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(
        _receive,
        request_deserializer=pb.ExchangeRequest.FromString,
        response_serializer=pb.ExchangeResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Exchange": handler}),))
    connection.send(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    await asyncio.to_thread(connection.poll, None)  # until the other end is closed: nothing is ever sent
    await server.stop(None)


async def _receive(requests: AsyncIterator[pb.ExchangeRequest], _: object) -> AsyncIterator[pb.ExchangeResponse]:
    payload = Payload(0, 0)
    async for request in requests:
        if request.payload_bytes:
            payload = Payload(request.payload_bytes, request.payload_bytes)
        if payload.add(request.chunk):
            yield pb.ExchangeResponse(payload_bytes=len(payload.data))
