"""An earlier run: what it says is the second half of its rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from thresher.deploy.advise.past import read_past
from thresher.protos.errors import ConfigurationError

WORKERS, NUMEL = 3, 1000


def shard_row(version: int, **fields: Any) -> dict[str, Any]:
    """A shard's row; from version 5 on the run has settled."""
    pushed = 60 if version > 4 else 3 * NUMEL
    return {
        "time": 100.0 + 0.5 * version, "version": version, "members": WORKERS, "contributors": list(range(WORKERS)),
        "skipped": False, "only_mean": False, "threshold": 0.1, "learning_rate": 0.1, "numel": NUMEL,
        "push_bytes": 600, "pull_bytes": 900, "pushed_elements": pushed, "residual_squared": 1.0,
        "update_elements": 50 if version > 4 else NUMEL, "push_density": pushed / NUMEL / WORKERS,
        "update_density": 0.05, "residual_norm": 1.0, "round_seconds": 0.1, "barrier_seconds": [0.0] * WORKERS,
    } | fields  # fmt: skip


def worker_row(rank: int, step: int) -> dict[str, Any]:
    return {
        "time": 100.0 + step, "rank": rank, "step": step, "version": step,
        "compute_seconds": 9.0 if step < 5 else 0.1 * (rank + 1), "compress_seconds": 0.01, "exchange_seconds": 0.02,
        "push_bytes": 1, "pull_bytes": 1, "pushed_elements": 1, "numel": NUMEL, "residual_norm": 1.0,
        "threshold": None, "layers": None,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_run_says_what_to_expect(tmp_path: Path) -> None:
    """Compute is that of the slowest worker; the first half of the rows does not count."""
    write(tmp_path / "shard-0.iterations.jsonl", [shard_row(version) for version in range(1, 9)])
    for rank in range(WORKERS):
        write(tmp_path / f"worker-{rank}.iterations.jsonl", [worker_row(rank, step) for step in range(1, 9)])
    found = read_past(tmp_path)
    assert (found.numel, found.workers, found.shards) == (NUMEL, WORKERS, 1)
    assert found.density == pytest.approx(0.02)
    assert found.update_density == pytest.approx(0.05)
    assert (found.push_bytes, found.pull_bytes) == (600, 900)
    assert found.step_seconds == pytest.approx(0.5)
    assert found.compute is not None
    assert found.compute.tolist() == pytest.approx([0.3] * 4)


def test_rounds_without_gradients_do_not_count(tmp_path: Path) -> None:
    """Neither in the middle nor as the last: they are dense and large, and nothing in them is compressed."""
    rows = [shard_row(version) for version in range(1, 9)]
    means = {"only_mean": True, "push_bytes": 9000, "pull_bytes": 9000, "update_elements": NUMEL, "pushed_elements": 0}
    write(tmp_path / "shard-0.iterations.jsonl", [*rows[:6], shard_row(7, **means), shard_row(8, **means)])
    found = read_past(tmp_path)
    assert (found.workers, found.push_bytes, found.pull_bytes) == (WORKERS, 600, 900)
    write(tmp_path / "shard-0.iterations.jsonl", [*rows, shard_row(9, **means)])
    with_means = read_past(tmp_path)
    write(tmp_path / "shard-0.iterations.jsonl", rows)
    assert with_means == read_past(tmp_path)


def test_without_rows_of_workers_computing_is_not_known(tmp_path: Path) -> None:
    write(tmp_path / "shard-0.iterations.jsonl", [shard_row(1)])
    found = read_past(tmp_path)
    assert (found.compute, found.step_seconds) == (None, 0.0)


def test_a_run_without_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "shard-0.iterations.jsonl").touch()
    with pytest.raises(ConfigurationError, match="no iterations yet"):
        read_past(tmp_path)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no folder of a run"):
        read_past(tmp_path)


def test_a_run_in_which_nobody_pushes_any_more_is_told(tmp_path: Path) -> None:
    write(tmp_path / "shard-0.iterations.jsonl", [shard_row(1, contributors=[], barrier_seconds=[], members=1)])
    with pytest.raises(ConfigurationError, match="nobody has pushed"):
        read_past(tmp_path)
