"""A run of many rounds: what a shard and a worker hold, in memory and on disk, does not grow with their number."""

import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import nn

from thresher.worker import Method, Settings, connect

ROUNDS: Final = 100_000
WORKERS: Final = 2
SNAPSHOT_SECONDS: Final = 61.0  # for a minute a shard keeps what follows a snapshot, whoever has read it by then


@dataclass(frozen=True)
class Held:
    """What is held at one moment: memory in MB, folders in bytes."""

    rounds: int
    shard_mb: float
    worker_mb: float
    shard_bytes: int
    worker_bytes: int


@contextmanager
def shard(folder: Path) -> Iterator[tuple[str, int]]:
    """Serve in a process of its own; yield its address and its process."""
    command = [
        sys.executable, "-m", "thresher.deploy", "serve", "--workers", str(WORKERS), "--until-stdin-closes",
        "--state-dir", str(folder), "--checkpoint-every", "500",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"], process.pid
    finally:
        process.kill()
        process.communicate()


def resident_mb(process: int) -> float:
    """Return the memory that a process holds now."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files; one that is removed meanwhile has none."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return found


def soaked(folder: Path, rounds: int) -> list[Held]:
    """Train for so many rounds; return what was held after each tenth of them."""
    seen = []
    with shard(folder / "shard") as (address, process), ThreadPoolExecutor(WORKERS) as pool:

        def work(rank: int) -> bytes:
            settings = Settings((address,), rank, WORKERS, method=Method(threshold=0.01), state_dir=folder / "workers")
            model = nn.Linear(10, 10)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            with connect(settings=settings).wrap(model, optimizer) as session:
                generator = torch.Generator().manual_seed(rank)
                for step in range(1, rounds + 1):
                    for parameter in model.parameters():
                        parameter.grad = torch.randn(parameter.shape, generator=generator)
                    optimizer.step()
                    if step == 1:
                        time.sleep(SNAPSHOT_SECONDS)
                    if rank == 0 and step % (rounds // 10) == 0:
                        gc.collect()
                        memory = resident_mb(process), resident_mb(os.getpid())
                        disk = folder_bytes(folder / "shard"), folder_bytes(folder / "workers")
                        seen.append(Held(session.step, *memory, *disk))
            return model.weight.detach().numpy().tobytes()

        first, *others = pool.map(work, range(WORKERS))
        assert all(other == first for other in others)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_nothing_grows_with_the_number_of_rounds(tmp_path: Path) -> None:
    """Memory after all rounds is what it was after a tenth of them, within 5 %; folders within a factor of 2."""
    seen = soaked(tmp_path, ROUNDS)
    for held in seen:
        logging.getLogger(__name__).info("%s", held)
    first, last = seen[0], seen[-1]
    assert (first.rounds, last.rounds) == (ROUNDS // 10, ROUNDS)
    assert last.shard_mb <= 1.05 * first.shard_mb
    assert last.worker_mb <= 1.05 * first.worker_mb
    assert last.shard_bytes <= 2 * first.shard_bytes
    assert last.worker_bytes <= 2 * first.worker_bytes
