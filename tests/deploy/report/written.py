"""Folders of runs, as shards, workers and the launcher write them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BEGIN = 1_700_000_000.0
SIZES = {"first.weight": 60, "first.bias": 4}


def shard_row(shard: int, version: int, **changed: object) -> dict[str, Any]:
    """A row of a shard with two workers; numbers differ by shard and version."""
    return {
        "time": BEGIN + version + 0.1 * shard,
        "shard": shard,
        "numel": 32,
        "version": version,
        "members": 2,
        "contributors": [0, 1],
        "skipped": False,
        "only_mean": False,
        "push_bytes": 100 + 10 * shard + version % 7,
        "pull_bytes": 150 + 10 * shard,
        "pushed_elements": 8 + version % 3,
        "push_density": (8 + version % 3) / 64,
        "update_elements": 6 + version % 3,
        "update_density": (6 + version % 3) / 32,
        "residual_squared": 4.0 / version,
        "threshold": 0.01,
        "learning_rate": 0.1,
        "round_seconds": 0.01,
        "staleness": 0,
        "barrier_seconds": [0.002, 0.001 * (1 + shard)],
        **changed,
    }


def worker_row(rank: int, step: int, **changed: object) -> dict[str, Any]:
    """A row of a worker: layers in the first one and every tenth."""
    return {
        "time": BEGIN + step,
        "rank": rank,
        "step": step,
        "version": step,
        "compute_seconds": 0.02,
        "compress_seconds": 0.003,
        "exchange_seconds": 0.01,
        "push_bytes": 105,
        "pull_bytes": 155,
        "pushed_elements": 8,
        "numel": 64,
        "residual_norm": 0.5,
        "threshold": 0.01,
        "layers": {"first.weight": 6, "first.bias": 2} if step == 1 or step % 10 == 0 else None,
        **changed,
    }


def printed_row(step: int, **changed: object) -> dict[str, Any]:
    """What rank 0 prints after a step."""
    return {"time": BEGIN + step + 0.5, "epoch": step // 10, "loss": 2.0 / step, **changed}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_run(folder: Path, iterations: int = 40, **result: object) -> Path:
    """A finished run of two shards and two workers, with everything that a launch leaves and a report reads."""
    folder.mkdir(parents=True)
    steps = range(1, iterations + 1)
    for part in range(2):
        write_lines(folder / f"shard-{part}.iterations.jsonl", (shard_row(part, step) for step in steps))
        write_lines(folder / f"worker-{part}.iterations.jsonl", (worker_row(part, step) for step in steps))
    accuracy = {"time": BEGIN + iterations + 1, "accuracy": 0.9, "loss": 0.1}
    write_lines(folder / "printed.jsonl", [*(printed_row(step) for step in steps), accuracy])
    save_file({name: np.zeros(size, np.float32) for name, size in SIZES.items()}, folder / "model.safetensors")
    settings = {
        "method": {"compressor": "HardThreshold", "density": 0.1, "threshold": None},
        "consistency": {"mode": "sync"},
        "workers": 2,
        "shards": 2,
    }
    numbers = {
        "accuracy": 0.9, "loss": 0.1, "steps": iterations, "push_bytes": 1000, "pull_bytes": 2000,
        "mean_density": 0.1, "compression_ratio": 7.5, "seconds": 12.0,
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps({"sparse": {**numbers, **result}, "workers": 2}), encoding="utf-8")
    return folder
