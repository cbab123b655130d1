"""What tests of workers share: a small model, shards that can be killed, and workers that can."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thresher.protos.consistency import Consistency
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer
from thresher.server.statistics import ShardStatistics
from thresher.worker import Method, Session, Settings, connect
from thresher.worker.calls import ShardCalls
from thresher.worker.snapshot import Snapshot

T = TypeVar("T")

EVERYTHING = Method(threshold=0.0)


class Scale(nn.Module):
    """weight · x, with a weight that begins at ones and is easy to compute with."""

    def __init__(self, size: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs + self.bias


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **{"lr": 0.5, **options})


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def snapshot(address: str) -> Snapshot:
    calls = ShardCalls(0, address, "a test")
    try:
        return calls.snapshot(wait_seconds=5.0)
    finally:
        calls.close()


class Killed(BaseException):
    """What a fault plan raises in a worker: nothing but `abandon` follows."""


def abandon(session: Session) -> None:
    """End a worker as ``kill -9`` does: its sockets and its files are closed, and nobody is told why."""
    session._closed = True
    session._end()


class Cluster:
    """Shards on one background loop, whose addresses and folders outlive them.

    Args:
        loop: Where they live.
        folder: Of their states and the workers'; None keeps everything in memory.
        settings: Of the workers; addresses are filled in.
        told: How many workers the shards are told of; 0 for none, which learn it from them.
        options: Further fields of `ShardConfig`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        shards: int,
        folder: Path | None,
        settings: Settings,
        told: int,
        options: dict[str, Any],
    ) -> None:
        self._loop, self._folder, self._told, self._options = loop, folder, told, options
        self._servers: list[ShardServer | None] = [None] * shards
        self._listen = ["127.0.0.1:0"] * shards
        self.settings = settings
        for shard in range(shards):
            self.start(shard)
        self.settings = replace(settings, addresses=tuple(self._listen))

    def start(self, shard: int) -> None:
        """Start a shard that is not running, where it was before."""
        config = ShardConfig(shard, len(self._servers), self._told, **self._options)
        state_dir = self._folder / f"shard-{shard}" if self._folder is not None else None
        server = ShardServer(ServerConfig(config, listen=self._listen[shard], state_dir=state_dir))
        asyncio.run_coroutine_threadsafe(server.start(), self._loop).result()
        self._servers[shard], self._listen[shard] = server, server.address

    def kill(self, shard: int) -> None:
        """End a shard in the middle of everything: connections are cut, no checkpoint is written, nobody is told."""
        server = self._servers[shard]
        if server is not None:
            asyncio.run_coroutine_threadsafe(server.kill(), self._loop).result()
        self._servers[shard] = None

    def statistics(self, shard: int = 0) -> ShardStatistics:
        server = self._servers[shard]
        assert server is not None
        return server.statistics()

    def snapshots(self) -> list[Snapshot]:
        return [snapshot(address) for address in self.settings.addresses]

    def connect(self, rank: int, **changes: Any) -> Session:
        return connect(settings=replace(self.settings, rank=rank, **changes))

    def work(self, work: Callable[[Session], T], rank: int, **changes: Any) -> T:
        """Call ``work`` as one worker's script; a worker that is killed in it is started again."""
        while True:
            session = self.connect(rank, **changes)
            with session:
                try:
                    return work(session)
                except Killed:
                    abandon(session)

    def run(self, work: Callable[[Session], T]) -> list[T]:
        """Call ``work`` as the script of every worker, on threads; return its results by rank."""
        workers = self.settings.workers
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self.work, work, rank) for rank in range(workers)]
        return [future.result() for future in futures]


@contextmanager
def cluster(
    shards: int,
    workers: int,
    folder: Path | None = None,
    *,
    method: Method = EVERYTHING,
    consistency: Consistency | None = None,
    worker_memory: bool = False,
    told: int | None = None,
    **options: Any,
) -> Iterator[Cluster]:
    """Serve until the block ends; the shards are told of ``workers``, or of ``told``."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shards", daemon=True)
    thread.start()
    settings = Settings(
        ("127.0.0.1:1",),
        0,
        workers,
        method=method,
        consistency=consistency or Consistency(),
        state_dir=folder / "workers" if folder is not None and worker_memory else None,
        reconnect_timeout=60.0,
    )
    found: Cluster | None = None
    try:
        found = Cluster(loop, shards, folder, settings, workers if told is None else told, options)
        yield found
    finally:
        for shard in range(shards if found is not None else 0):
            assert found is not None
            found.kill(shard)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
