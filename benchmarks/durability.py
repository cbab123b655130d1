"""What it costs that nothing is lost: the time of a step with each durability, in one process over loopback.

    python benchmarks/durability.py FOLDER

Two workers push to one shard at a density of 1 %; the gradients are ready, so a step is all exchange. With `process`
records and the workers' states are written to files, with `disk` they are synced: a record before anybody is told of
it, a state before its step is sent. The durabilities take turns, and the table has the median of the steps.
"""

import asyncio
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import nn

from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer
from thresher.worker import Method, Session, Settings, connect

WORKERS = 2
STEPS = 30
TURNS = 3
DURABILITIES = ("none", "process", "disk")
_METHOD = Method(threshold=2.576)  # of normal gradients it keeps 1 %


@contextmanager
def served(folder: Path, durability: str) -> Iterator[tuple[Settings, ShardServer]]:
    state_dir, sync = None if durability == "none" else folder / "shard", durability == "disk"
    config = ServerConfig(ShardConfig(0, 1, WORKERS), state_dir=state_dir, sync=sync)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = ShardServer(config)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    workers = None if durability == "none" else folder / "workers"
    try:
        yield (
            Settings((server.address,), 0, WORKERS, method=_METHOD, state_dir=workers, state_sync=sync),
            server,
        )
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(grace=0.5), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def steps(session: Session, numel: int) -> list[float]:
    """Return the seconds of each step but the first ones, which compile and allocate."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(numel))])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    session.wrap(model, optimizer)
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(session.rank))
    found = []
    for _ in range(STEPS):
        (parameter,) = model.parameters()
        parameter.grad = gradient
        begin = perf_counter()
        optimizer.step()
        found.append(perf_counter() - begin)
    session.close()
    return found[5:]


def measured(folder: Path, durability: str, numel: int) -> list[float]:
    with TemporaryDirectory(dir=folder) as fresh, served(Path(fresh), durability) as (settings, _):
        sessions = [connect(settings=_ranked(settings, rank)) for rank in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            return next(iter(pool.map(lambda session: steps(session, numel), sessions)))


def _ranked(settings: Settings, rank: int) -> Settings:
    return replace(settings, rank=rank)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print("| parameters | durability | ms a step | of none |\n| ---: | --- | ---: | ---: |")
    for numel in (100_000, 1_000_000, 10_000_000):
        found: dict[str, list[float]] = {durability: [] for durability in DURABILITIES}
        for _ in range(TURNS):
            for durability in DURABILITIES:
                found[durability] += measured(folder, durability, numel)
        base = median(found["none"])
        for durability, seconds in found.items():
            print(f"| {numel:,} | {durability} | {median(seconds) * 1e3:.2f} | {median(seconds) / base:.2f} |")


if __name__ == "__main__":
    main()
