"""Shards and workers in one process, with real gRPC on loopback: for notebooks, examples and tests."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, final

from thresher.protos.errors import RoundFailedError
from thresher.server.server import ServerConfig, ShardServer
from thresher.server.config import ShardConfig
from thresher.server.statistics import ShardStatistics
from thresher.worker import Method, Session, Settings, connect

T = TypeVar("T")


@final
class InProcess:
    """A parameter server whose shards live on one background thread, and whose workers are yours.

    Use `in_process` to make one.

    Attributes:
        addresses: ``host:port`` of each shard.
    """

    def __init__(self, servers: list[ShardServer], settings: Settings) -> None:
        """Wrap servers that run."""
        self._servers = servers
        self._settings = settings
        self.addresses = settings.addresses

    def connect(self, rank: int, method: Method | None = None) -> Session:
        """Return the session of one worker, to be used from one thread. `Session.wrap` waits for rank 0's seed."""
        settings = replace(self._settings, rank=rank)
        return connect(settings=settings if method is None else replace(settings, method=method))

    def run(self, work: Callable[[Session], T]) -> list[T]:
        """Call ``work`` with the session of each rank, each on a thread of its own; return its results by rank.

        A session is closed when its ``work`` returns, and aborted when it raises.

        Raises:
            Exception: what the lowest rank raised that was not merely told of another one's failure.
        """

        def one(rank: int) -> T:
            with self.connect(rank) as session:
                return work(session)

        with ThreadPoolExecutor(self._settings.workers) as pool:
            futures = [pool.submit(one, rank) for rank in range(self._settings.workers)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, RoundFailedError))
        return [future.result() for future in futures]

    def statistics(self) -> list[ShardStatistics]:
        """Return the counters of each shard."""
        return [server.statistics() for server in self._servers]


@contextmanager
def in_process(*, shards: int, workers: int, method: Method | None = None, **options: Any) -> Iterator[InProcess]:
    """Serve ``shards`` shards for ``workers`` workers until the block ends.

    Args:
        shards: Number of shards.
        workers: Number of workers.
        method: What is sent; everything by default.
        options: Further fields of `ShardConfig`, such as ``round_timeout``.

    Examples:
        >>> import torch
        >>> def work(session):
        ...     model = torch.nn.Linear(1, 1, bias=False)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ...     session.wrap(model, optimizer)
        ...     torch.nn.init.ones_(model.weight).grad = torch.full((1, 1), float(session.rank))
        ...     optimizer.step()
        ...     return session.step
        >>> with in_process(shards=1, workers=2) as cluster:
        ...     cluster.run(work)
        [1, 1]
    """
    configs = [ServerConfig(ShardConfig(index, shards, workers, **options)) for index in range(shards)]
    servers = [ShardServer(config) for config in configs]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shards", daemon=True)
    thread.start()
    started: list[ShardServer] = []
    try:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result()
            started.append(server)
        addresses = tuple(server.address for server in servers)
        yield InProcess(servers, Settings(addresses, 0, workers, method=method or Method(threshold=0.0)))
    finally:
        for server in started:
            asyncio.run_coroutine_threadsafe(server.stop(grace=0.5), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
