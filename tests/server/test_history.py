"""What a journal's folder holds, read by somebody else: complete and in order, or told why not, and never changed."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import DataLossError, JournalError
from thresher.server.history import generations_of, read_history
from thresher.server.journal import Journal


def filled(folder: Path, sizes: tuple[int, ...] = (10, 10, 10)) -> Path:
    """A folder whose generations hold so many records each, numbered through."""
    count = 0
    with closing(Journal(folder, keep=10)) as journal:
        journal.recover()
        for generation, size in enumerate(sizes):
            if generation:
                journal.checkpoint(str(count).encode(), {"w": torch.full((1,), float(count))})
            for number in range(count, count + size):
                journal.append(str(number).encode())
            count += size
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_each_checkpoint_stands_for_the_records_before_it(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    """Law: checkpoint g and the records since are the whole run, for every g, and each record tells its generation."""
    history = read_history(filled(tmp_path_factory.mktemp("run"), tuple(sizes)))
    assert history.generations == tuple(range(1, len(sizes)))
    for generation in range(len(sizes)):
        behind = int(history.checkpoint(generation).table) if generation else 0
        found = list(history.records(generation))
        assert behind == sum(sizes[:generation])
        assert [int(record) for _, record in found] == list(range(behind, sum(sizes)))
        assert [found for found, _ in found] == [g for g in range(generation, len(sizes)) for _ in range(sizes[g])]


def test_history_is_read_beside_a_living_journal(tmp_path: Path) -> None:
    """Neither its lock nor anything else stands in the way, and nothing is changed by it."""
    with closing(Journal(filled(tmp_path))) as journal:
        journal.recover()
        before = contents(tmp_path)
        history = read_history(tmp_path)
        assert float(history.checkpoint(1).tensors["w"]) == 10.0
        assert len(list(history.records())) == 30
        assert contents(tmp_path) == before


def test_a_record_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    """Half a record at the end of the log is no damage, and is left to the journal to mend."""
    last = filled(tmp_path) / "log-000002.bin"
    os.truncate(last, last.stat().st_size - 1)
    before = contents(tmp_path)
    assert len(list(read_history(tmp_path).records())) == 29
    assert contents(tmp_path) == before


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_log_is_data_loss(tmp_path: Path, gone: int) -> None:
    """What came after a checkpoint must not be forgotten in silence; behind the checkpoint it is not needed."""
    (filled(tmp_path) / f"log-{gone:06d}.bin").unlink()
    history = read_history(tmp_path)
    for generation in range(3):
        if generation > gone:
            assert len(list(history.records(generation))) == 10 * (3 - generation)
        else:
            with pytest.raises(DataLossError, match=rf"log-{gone:06d}.bin, byte 0: the file is missing"):
                list(history.records(generation))


def test_a_checkpoint_that_is_missing_or_damaged_is_data_loss(tmp_path: Path) -> None:
    """Who asks for a version gets that one or an error."""
    history = read_history(filled(tmp_path))
    with pytest.raises(DataLossError, match=r"checkpoint-000003.safetensors, byte 0: it cannot be read.*from a copy"):
        history.checkpoint(3)
    (tmp_path / "checkpoint-000001.safetensors").write_bytes(contents(tmp_path)["checkpoint-000002.safetensors"])
    with pytest.raises(DataLossError, match=r"checkpoint-000001.safetensors, byte 0: it is damaged"):
        history.checkpoint(1)


def test_records_that_vanish_while_they_are_read_are_told(tmp_path: Path) -> None:
    """A living shard may remove what a reader wants next."""
    records = read_history(filled(tmp_path)).records(1)
    next(records)
    (tmp_path / "log-000002.bin").unlink()
    with pytest.raises(JournalError, match=r"reading the log failed: .*log-000002.bin.*try again"):
        list(records)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """It is told by name."""
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(JournalError, match=r"file: listing the folder failed.*Not a directory"):
        read_history(path)


def test_other_files_are_not_counted(tmp_path: Path) -> None:
    """What was set aside, and what is somebody else's, belongs to no generation."""
    for name in ("checkpoint-000001.safetensors.damaged", "checkpoint-1.safetensors", "log-000002.bin.txt", "lock"):
        (tmp_path / name).touch()
    (tmp_path / "log-1000000.bin").touch()
    assert generations_of(tmp_path, "checkpoint") == []
    assert generations_of(tmp_path, "log") == [1_000_000]
