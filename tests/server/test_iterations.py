"""The per-iteration file: one line per round with every field of the row, there as soon as it is written."""

import json
from dataclasses import asdict
from pathlib import Path

from thresher.server.events import IterationRow
from thresher.server.iterations import IterationFile


def row(version: int) -> IterationRow:
    return IterationRow(
        shard=0, numel=10, version=version, members=2, contributors=(0, 1), skipped=False, only_mean=False,
        push_bytes=100,
        pull_bytes=60, pushed_elements=5, push_density=0.25, update_elements=4, update_density=0.4,
        residual_squared=1.5, threshold=None, learning_rate=0.1, round_seconds=0.5,
    )  # fmt: skip


def test_each_round_is_a_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    """A run that is killed has every round it closed: nothing waits in a buffer for the file to be closed."""
    path = tmp_path / "iterations.jsonl"
    file = IterationFile(path)
    for version in (1, 2):
        file.write(row(version))
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [line["version"] for line in lines] == list(range(1, version + 1))
        expected = json.loads(json.dumps(asdict(row(version))))
        assert {name: value for name, value in lines[-1].items() if name != "time"} == expected
    file.close()


def test_time_does_not_run_backwards(tmp_path: Path) -> None:
    """Each line carries the wall-clock time of its round, in order."""
    path = tmp_path / "iterations.jsonl"
    file = IterationFile(path)
    for version in range(1, 6):
        file.write(row(version))
    file.close()
    times = [json.loads(line)["time"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert times == sorted(times)


def test_a_run_begins_its_file_anew(tmp_path: Path) -> None:
    """Rows of an earlier run of the same name do not mix with this one's."""
    path = tmp_path / "iterations.jsonl"
    for version in (7, 1):
        file = IterationFile(path)
        file.write(row(version))
        file.close()
    assert [json.loads(line)["version"] for line in path.read_text(encoding="utf-8").splitlines()] == [1]
