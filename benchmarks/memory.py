"""What a flip of a worker's memory costs, beside one addition over as many floats.

    python benchmarks/memory.py FOLDER …

The table has a row per folder and durability: milliseconds (median of the flips), GB/s of state, and the fraction of
the bandwidth of `torch.add(out=)`, which reads two vectors and writes one, measured between the flips.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from thresher.worker.memory import Memory

NUMEL = 25_000_000
FLIPS = 15


def seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def row(folder: str, *, sync: bool) -> str:
    residual, gradient, out = torch.randn(NUMEL), torch.randn(NUMEL), torch.empty(NUMEL)
    with TemporaryDirectory(dir=folder) as place:
        memory = Memory(Path(place, "memory"), "benchmark", sync=sync)
        memory.flip({"residual": residual})
        memory.flip({"residual": residual})  # both halves have their pages now
        pairs = [
            (
                seconds(lambda: memory.flip({"residual": residual})),
                seconds(lambda: torch.add(residual, gradient, out=out)),
            )
            for _ in range(FLIPS)
        ]
        memory.close()
    flip, add = (median(times) for times in zip(*pairs, strict=True))
    speed, speed_of_add = 4e-9 * NUMEL / flip, 12e-9 * NUMEL / add
    crash = "machine" if sync else "process"
    return f"| {folder} | {crash} | {1e3 * flip:.0f} | {speed:.2f} | {speed / speed_of_add:.2f} |"


print(f"{NUMEL} floats, {torch.get_num_threads()} threads\n")
print("| folder | survives a crash of the | ms | GB/s | of add |\n| --- | --- | ---: | ---: | ---: |")
for name in sys.argv[1:]:
    for durable in (False, True):
        print(row(name, sync=durable))
