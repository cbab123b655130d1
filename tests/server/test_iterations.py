"""The per-iteration file: one line per round with every field of the row, there as soon as it is written."""

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.server.small_disk import fill, mounted

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


def versions(path: Path) -> list[int]:
    return [json.loads(line)["version"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("written", range(4))
@pytest.mark.parametrize("version", range(5))
@pytest.mark.parametrize("torn", [False, True])
def test_rows_go_on_after_a_kill_without_a_gap_or_a_double(
    tmp_path: Path, written: int, version: int, torn: bool
) -> None:
    """However far file and journal were: rows nobody heard of go, those of the journal come, a torn line is cut."""
    path = tmp_path / "iterations.jsonl"
    file = IterationFile(path)
    for number in range(1, written + 1):
        file.write(row(number))
    file.close()
    with path.open("a", encoding="utf-8") as more:
        more.write('{"version": 1' if torn else "")
    file = IterationFile(path, version)
    for number in range(1, version + 1):  # as the journal tells them, those that the file has too
        file.write(row(number))
    file.write(row(version + 1))
    assert versions(path) == list(range(1, version + 2))
    file.close()


@pytest.mark.parametrize("line", ["no row", "[1]", "{}", '{"version": null}'])
def test_another_file_is_refused_and_kept(tmp_path: Path, line: str) -> None:
    """What is no per-iteration file is not cut to one; the line that tells is in the message."""
    path = tmp_path / "iterations.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"iterations.jsonl has a line that is no row: b.*move the file away"):
        IterationFile(path, 3)
    assert path.read_text(encoding="utf-8") == f"{line}\n"


def test_rows_of_a_full_disk_follow_when_there_is_room(tmp_path: Path) -> None:
    """Who writes is told; no line is torn by it, and none is lost."""
    path, ballast = tmp_path / "iterations.jsonl", tmp_path / "ballast"
    with mounted(tmp_path, "size=64k"), closing(IterationFile(path)) as file:
        file.write(row(1))
        fill(ballast)
        failures = 0
        for version in range(2, 41):  # the last page of the file has room for some
            try:
                file.write(row(version))
            except OSError:
                failures += 1
        ballast.unlink()
        file.write(row(41))
        assert failures > 0
        assert versions(path) == list(range(1, 42))
