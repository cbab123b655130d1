"""Shards and workers in one process, with real gRPC on loopback: for notebooks, examples and tests."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, final

from thresher.deploy.processes import ReservedPort
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ProtocolError, RoundFailedError
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer
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

    def __init__(self, configs: list[ServerConfig], settings: Settings) -> None:
        """Begin without shards; `start` starts them."""
        self._configs = configs
        self._settings = settings
        self._servers: dict[int, ShardServer] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shards", daemon=True)
        self._thread.start()
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
        return [self._servers[shard].statistics() for shard in range(len(self._configs))]

    def start(self, shard: int) -> None:
        """Start a shard, the first time or again, at the same address; it goes on with what is in its folder.

        Raises:
            ProtocolError: when it runs.
            ThresherError: as `ShardServer` raises it.
        """
        if shard in self._servers:
            raise ProtocolError(f"shard {shard} runs; kill it first")
        server = ShardServer(self._configs[shard])
        self._do(server.start())
        self._servers[shard] = server

    def kill(self, shard: int) -> None:
        """End a shard as ``kill -9`` would: its connections break, nobody is told anything, no checkpoint is written.

        What has been written stays written. A fault plan (`thresher.protos.faults.plan`) that strikes at a shard calls
        this on the shard's own thread, and may `start` the shard again at once: what is left of the old life can
        neither write nor speak.

        Raises:
            ProtocolError: when it does not run.
        """
        if shard not in self._servers:
            raise ProtocolError(f"shard {shard} does not run")
        self._do(self._servers.pop(shard).kill())

    def close(self) -> None:
        """Stop all shards that run."""
        for shard in sorted(self._servers):
            self._do(self._servers.pop(shard).stop(grace=0.5))
        self._do(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@contextmanager
def in_process(
    *,
    shards: int,
    workers: int,
    method: Method | None = None,
    consistency: Consistency | None = None,
    state_dir: Path | None = None,
    reconnect_timeout: float = 60.0,
    **options: Any,
) -> Iterator[InProcess]:
    """Serve ``shards`` shards for ``workers`` workers until the block ends.

    Args:
        shards: Number of shards.
        workers: Number of workers.
        method: What is sent; everything by default.
        consistency: When rounds close; by default when all have pushed.
        state_dir: Where shards and workers keep what must not be lost, in ``shard-N`` and ``workers``; by default they
            keep it in memory only.
        reconnect_timeout: Seconds for which workers look for a shard that was lost; no less than the lease.
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
    addresses: list[str] = []
    with ExitStack() as held:
        for _ in range(shards):
            port = ReservedPort()
            held.callback(port.close)
            addresses.append(port.address)
        settings = Settings(
            tuple(addresses),
            rank=0,
            workers=workers,
            method=method or Method(threshold=0.0),
            consistency=consistency or Consistency(),
            state_dir=None if state_dir is None else state_dir / "workers",
            reconnect_timeout=reconnect_timeout,
        )
        cluster = InProcess(_configs(settings, state_dir, options), settings)
        held.callback(cluster.close)
        for shard in range(shards):
            cluster.start(shard)
        yield cluster


def _configs(settings: Settings, state_dir: Path | None, options: dict[str, Any]) -> list[ServerConfig]:
    return [
        ServerConfig(
            ShardConfig(shard, len(settings.addresses), settings.workers, **options),
            listen=address,
            state_dir=None if state_dir is None else state_dir / f"shard-{shard}",
        )
        for shard, address in enumerate(settings.addresses)
    ]
