"""The file of a worker's rows: each step once, whatever was killed in between, and a disk that is full costs rows."""

import json
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import ConfigurationError
from thresher.worker.rows import RowsFile, WorkerRow

ROW = WorkerRow(
    time=1.5, rank=2, step=1, version=1, compute_seconds=0.5, compress_seconds=0.25, exchange_seconds=0.125,
    push_bytes=100, pull_bytes=200, pushed_elements=5, numel=10, residual_norm=3.0, threshold=None,
    layers={"weight": 4, "bias": 1},
)  # fmt: skip


def read(path: Path) -> list[WorkerRow]:
    return [WorkerRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, kept: int, steps: range) -> None:
    file = RowsFile(path)
    file.keep(kept)
    for step in steps:
        file(replace(ROW, step=step))
    file.close()


@given(st.data())
def test_after_any_kills_each_step_has_one_whole_row(data: st.DataObject) -> None:
    """A life goes on with the step in which the last one was killed, wherever in its line that was."""
    with tempfile.TemporaryDirectory() as folder:
        path, step = Path(folder) / "rows.jsonl", 0
        for _ in range(data.draw(st.integers(1, 4))):
            until = step + data.draw(st.integers(1, 4))
            write(path, step, range(max(1, step), until + 1))  # the step it was killed in is told again
            whole = path.read_bytes()
            last = whole.splitlines(keepends=True)[-1]
            torn = data.draw(st.integers(0, len(last)))
            path.write_bytes(whole[: len(whole) - torn])
            step = until
        write(path, step, range(step, step + 1))
        assert read(path) == [replace(ROW, step=one) for one in range(1, step + 1)]


def test_a_row_is_a_line_with_all_its_fields(tmp_path: Path) -> None:
    """Before the next one is made: whoever reads the file sees every step that is over."""
    path = tmp_path / "made" / "rows.jsonl"
    file = RowsFile(path)
    file.keep(0)
    file(ROW)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [asdict(ROW)]
    file.close()


def test_a_new_run_begins_the_file_anew(tmp_path: Path) -> None:
    """Rows of another run are gone, and where a worker goes on from an earlier step, those behind it."""
    path = tmp_path / "rows.jsonl"
    write(path, 0, range(1, 6))
    write(path, 3, range(4, 5))
    assert [row.step for row in read(path)] == [1, 2, 3, 4]
    write(path, 0, range(1, 2))
    assert [row.step for row in read(path)] == [1]


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: what is behind is refused, in the middle of a line, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once; what is in the file is whole, and goes on when there is room again."""
    path = tmp_path / "rows.jsonl"
    file = RowsFile(path)
    file.keep(0)
    with limited(100_000):
        for step in range(1, 1001):
            file(replace(ROW, step=step))
    written = len(read(path))
    assert 0 < written < 1000
    assert path.stat().st_size < 100_000
    file(replace(ROW, step=1001))
    file.close()
    assert [row.step for row in read(path)] == [*range(1, written + 1), 1001]
    (record,) = caplog.records
    assert "takes no more rows" in record.message


@pytest.mark.parametrize("text", ["nothing\n", "[]\n", '{"time": 1}\n'])
def test_a_file_of_something_else_is_not_touched(text: str, tmp_path: Path) -> None:
    """The message has the path and what to do."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl has a line that is no row.*move the file away"):
        RowsFile(path)
    assert path.read_text(encoding="utf-8") == text


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigurationError, match="cannot be written: Is a directory; name another file"):
        RowsFile(tmp_path)


def test_scalars_are_the_numbers_of_a_step() -> None:
    """For loggers: what is not known is not there, and neither is what says when and where it was."""
    found = ROW.scalars()
    assert found.keys() == {
        f"thresher/{name}"
        for name in (
            "version", "compute_seconds", "compress_seconds", "exchange_seconds", "push_bytes", "pull_bytes",
            "pushed_elements", "push_density", "residual_norm", "layers/weight", "layers/bias",
        )
    }  # fmt: skip
    assert (found["thresher/push_density"], found["thresher/layers/weight"]) == (0.5, 4.0)
    assert replace(ROW, threshold=0.25, layers=None).scalars()["thresher/threshold"] == 0.25
