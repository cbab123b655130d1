"""A shard's folder: what was appended comes back after any crash, and what no crash explains is refused untouched."""

import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.small_disk import fill, mounted

from thresher.protos.errors import ConfigurationError, DataLossError, JournalError, ProtocolError
from thresher.server import journal as module
from thresher.server.checkpoints import UNFINISHED, Checkpoint, write_checkpoint
from thresher.server.journal import Journal, read_history


def opened(folder: Path, keep: int = 3, *, sync: bool = False) -> Journal:
    journal = Journal(folder, keep=keep, sync=sync)
    journal.recover()
    return journal


def append(journal: Journal, numbers: range) -> None:
    for number in numbers:
        journal.append(str(number).encode())


def take(journal: Journal, count: int, size: int = 1) -> None:
    """Have a checkpoint written of a state made by the first ``count`` records."""
    journal.checkpoint(str(count).encode(), {"w": torch.full((size,), float(count))})


def recovered(folder: Path, keep: int = 3) -> tuple[list[int], tuple[str, ...]]:
    """The records that the folder stands for, those behind the checkpoint included, and the notices."""
    with closing(Journal(folder, keep=keep)) as journal:
        found = journal.recover()
        behind = 0 if found.checkpoint is None else int(found.checkpoint.table)
        if found.checkpoint is not None:
            assert found.checkpoint.tensors["w"][0] == behind
        return [*range(behind), *map(int, found.records)], found.notices


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def generations(folder: Path, ending: str) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob(f"*.{ending}"))


def damage(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def filled(folder: Path, *, keep: int = 3) -> Path:
    """A folder with ten records each in generations 0, 1 and 2."""
    with closing(opened(folder, keep)) as journal:
        for generation in range(3):
            append(journal, range(10 * generation, 10 * generation + 10))
            if generation < 2:
                take(journal, 10 * generation + 10)
    return folder


actions = st.lists(st.sampled_from(["append", "append", "append", "checkpoint", "reopen", "tear", "lose"]), max_size=25)


@settings(max_examples=100)
@given(actions, st.integers(1, 3), st.booleans(), st.integers(0, 40))
def test_every_record_before_a_tear_comes_back_in_order(steps: list[str], keep: int, sync: bool, torn: int) -> None:
    """Law: after any appends, checkpoints, torn tails and lost checkpoints, all comes back but what was torn off."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        journal, count = opened(folder, keep, sync=sync), 0
        for step in steps:
            if step == "append":
                append(journal, range(count, count + 1))
                count += 1
            elif step == "checkpoint":
                take(journal, count)
            else:
                journal.close()
                count -= tear(folder, torn) if step == "tear" else 0
                checkpoints = sorted(folder.glob("*.safetensors"))
                if step == "lose" and len(checkpoints) + (folder / "log-000000.bin").exists() > 1:
                    damage(checkpoints[-1])
                assert recovered(folder, keep)[0] == list(range(count))
                journal = opened(folder, keep, sync=sync)
        journal.close()
        assert recovered(folder, keep)[0] == list(range(count))


def tear(folder: Path, size: int) -> int:
    """Cut bytes off the end of the last log file; how many records are lost by it."""
    newest = generations(folder, "bin")[-1]
    last = folder / f"log-{newest:06d}.bin"
    before = list(read_history(folder).records(newest))
    os.truncate(last, max(0, last.stat().st_size - size))
    return len(before) - len(list(read_history(folder).records(newest)))


KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from thresher.server.journal import Journal

def live(told):
    journal = Journal(Path(sys.argv[1]), keep=2)
    found = journal.recover()
    count = int(found.checkpoint.table) if found.checkpoint else 0
    assert not found.checkpoint or torch.all(found.checkpoint.tensors["w"] == count)
    for record in found.records:
        assert int(record) == count
        count += 1
    os.write(told, b"%08d" % count)
    while True:
        journal.append(b"%d" % count + b" " * (count % 3000))
        count += 1
        os.write(told, b"%08d" % count)
        if not journal.checkpointing:
            journal.checkpoint(b"%d" % count, {"w": torch.full((100_000,), float(count))})

random.seed(1)
last = 0
for life in range(15):
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            live(told)
        finally:
            os._exit(1)
    os.close(told)
    first = int(os.read(heard, 8))
    assert first >= last, f"{last} records were appended, {first} came back"
    for _ in range(random.randrange(150)):
        last = int(os.read(heard, 8))
    os.kill(child, signal.SIGKILL)
    while message := os.read(heard, 8):
        last = int(message)
    os.close(heard)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(last)
"""


def test_no_kill_loses_a_record_that_was_appended(tmp_path: Path) -> None:
    """Fifteen lives of one journal, each killed while it appends and writes checkpoints; its lock dies with it."""
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(generations(tmp_path, "safetensors")) <= 3  # one more than kept, when a kill came before the removal
    with closing(Journal(tmp_path, keep=2)) as journal:
        found = journal.recover()
        behind = 0 if found.checkpoint is None else int(found.checkpoint.table)
        records = list(map(int, found.records))
    assert records == list(range(behind, behind + len(records)))
    assert behind + len(records) >= int(run.stdout) > 0
    assert not (tmp_path / UNFINISHED).exists()
    assert len(generations(tmp_path, "safetensors")) <= 2


def test_a_new_folder_is_empty_and_an_old_one_is_not(tmp_path: Path) -> None:
    """The folder and those above it are made; nothing comes back from nothing."""
    folder = tmp_path / "run" / "shard-0"
    with closing(Journal(folder)) as journal:
        found = journal.recover()
        assert (found.checkpoint, list(found.records), found.notices) == (None, [], ())
        append(journal, range(3))
    assert recovered(folder) == ([0, 1, 2], ())


def test_the_folder_stays_bounded(tmp_path: Path) -> None:
    """Only the checkpoints kept, and the log since the oldest of them, stay; `bytes` is what is there."""
    with closing(opened(tmp_path)) as journal:
        for generation in range(10):
            append(journal, range(10 * generation, 10 * generation + 10))
            take(journal, 10 * generation + 10)
            journal.wait()
            assert (journal.checkpointing, journal.failure, journal.log_bytes) == (False, "", 0)
            oldest = max(0, generation - 1)
            assert generations(tmp_path, "safetensors") == list(range(max(1, oldest), generation + 2))
            assert generations(tmp_path, "bin") == list(range(oldest, generation + 2))
            assert journal.bytes == sum(len(content) for content in contents(tmp_path).values())
        journal.append(b"x" * 1000)
        assert journal.bytes == sum(len(content) for content in contents(tmp_path).values())
        assert journal.log_bytes == 1012
    with closing(opened(tmp_path)) as journal:
        assert journal.log_bytes == 1012
        assert journal.bytes == sum(len(content) for content in contents(tmp_path).values())


@pytest.mark.parametrize("bad", [(2,), (2, 1)])
def test_damaged_checkpoints_cost_a_longer_replay_and_a_notice(tmp_path: Path, bad: tuple[int, ...]) -> None:
    """The one before serves, or the beginning; the damaged ones are set aside and don't count as kept any more."""
    folder = filled(tmp_path)
    for generation in bad:
        damage(folder / f"checkpoint-{generation:06d}.safetensors")
    records, notices = recovered(folder)
    assert records == list(range(30))
    assert ["checksum is wrong; what is before it serves instead" in notice for notice in notices] == [True] * len(bad)
    assert recovered(folder) == (records, ())
    with closing(opened(folder)) as journal:
        assert journal.log_bytes == 10 * 14 * (len(bad) + 1) - 10 * (len(bad) == 2)
        for count in (30, 30, 30):
            take(journal, count)
    assert generations(folder, "safetensors") == [3, 4, 5]
    assert not list(folder.glob("*.damaged"))


def test_without_a_good_checkpoint_or_the_beginning_it_is_data_loss(tmp_path: Path) -> None:
    """The message names the log that would be needed and why the checkpoints cannot serve."""
    folder = filled(tmp_path, keep=1)
    damage(folder / "checkpoint-000002.safetensors")
    before = contents(folder)
    with (
        closing(Journal(folder)) as journal,
        pytest.raises(DataLossError, match=r"log-000000.bin, byte 0: .*missing.*checkpoint-000002.*checksum is wrong"),
    ):
        journal.recover()
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("file", "place", "message"),
    [
        ("log-000002.bin", 20, r"log-000002.bin, byte 16: .* contradict each other. Nothing.*back from a copy"),
        ("log-000002.bin", 29, r"log-000002.bin, byte 16: .*wrong checksum"),
        ("log-000002.bin", 0, r"log-000002.bin, byte 0: .*wrong magic"),
        ("log-000002.bin", 12, r"log-000002.bin, byte 0: .*wrong generation"),
        ("log-000001.bin", -1, r"log-000001.bin, byte 142: .*wrong checksum.*checkpoint-000002.*checksum is wrong"),
    ],
)
def test_damage_that_is_no_torn_tail_is_refused_and_nothing_changed(
    tmp_path: Path, file: str, place: int, message: str
) -> None:
    """In the middle of the last log file, or anywhere in one before that is needed."""
    folder = filled(tmp_path)
    damage(folder / file, place)
    if file == "log-000001.bin":
        assert recovered(folder) == (list(range(30)), ())  # not needed as long as the checkpoint behind it is good
        damage(folder / "checkpoint-000002.safetensors")
    before = contents(folder)
    with closing(Journal(folder)) as journal, pytest.raises(DataLossError, match=message):
        journal.recover()
    assert contents(folder) == before


def test_a_torn_tail_is_cut_off_and_told(tmp_path: Path) -> None:
    """Also one that is torn within the header of a file that was just begun."""
    folder = filled(tmp_path)
    last = folder / "log-000002.bin"
    os.truncate(last, last.stat().st_size - 1)
    records, notices = recovered(folder)
    assert records == list(range(29))
    assert "log-000002.bin: a record of 2 bytes ends 1 bytes behind the end" in notices[0]
    assert recovered(folder) == (records, ())
    os.truncate(last, 5)
    records, notices = recovered(folder)
    assert (records, "within its header" in notices[0]) == (list(range(20)), True)


def test_what_a_kill_left_unfinished_is_removed(tmp_path: Path) -> None:
    """Half a checkpoint takes no space for ever."""
    unfinished = filled(tmp_path) / UNFINISHED
    unfinished.mkdir()
    (unfinished / "checkpoint-000003.safetensors").write_bytes(b"half")
    assert recovered(tmp_path) == (list(range(30)), ())
    assert not unfinished.exists()


def test_kills_before_a_removal_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Life after life ends between a checkpoint and the removal of what it replaces: each recovery catches up."""
    for life in range(1, 6):
        with monkeypatch.context() as patch, closing(opened(tmp_path, keep=2)) as journal:
            patch.setattr(journal, "_prune", lambda: None)
            append(journal, range(life - 1, life))
            take(journal, life)
        assert len(generations(tmp_path, "safetensors")) <= 3
        assert recovered(tmp_path, keep=2) == (list(range(life)), ())
        assert generations(tmp_path, "safetensors") == list(range(max(1, life - 1), life + 1))
    assert generations(tmp_path, "bin") == [4, 5]


def test_a_checkpoint_is_written_while_records_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new log begins at once; whoever asks for the next checkpoint meanwhile waits for this one."""
    go_on = threading.Event()

    def write_late(path: Path, checkpoint: Checkpoint) -> None:
        assert go_on.wait(60)
        write_checkpoint(path, checkpoint)

    monkeypatch.setattr(module, "write_checkpoint", write_late)
    with closing(opened(tmp_path)) as journal:
        append(journal, range(5))
        take(journal, 5)
        assert journal.checkpointing
        assert journal.failure == ""
        append(journal, range(5, 8))
        assert [record for _, record in read_history(tmp_path).records(1)] == [b"5", b"6", b"7"]
        assert generations(tmp_path, "safetensors") == []
        threading.Timer(0.05, go_on.set).start()
        take(journal, 8)
        assert generations(tmp_path, "safetensors")[:1] == [1]
    assert generations(tmp_path, "safetensors") == [1, 2]  # closing finishes what was begun


def test_a_full_disk_pauses_and_loses_nothing(tmp_path: Path) -> None:
    """Neither a checkpoint nor a record that finds no space costs what was written before; with space all goes on."""
    with mounted(tmp_path, "size=256k"):
        with closing(opened(tmp_path)) as journal:
            append(journal, range(10))
            take(journal, 10, size=100_000)
            with pytest.raises(JournalError, match=r"checkpoint 1 could not be written.*No space left.*free space"):
                journal.wait()
            assert "No space left on device" in journal.failure
            assert not (tmp_path / UNFINISHED).exists()
            append(journal, range(10, 20))
            with pytest.raises(JournalError, match=r"appending a record failed.*No space left.*try again"):
                journal.append(bytes(400_000))
            append(journal, range(20, 25))
        assert recovered(tmp_path) == (list(range(25)), ())
        fill(tmp_path / "ballast")
        with closing(opened(tmp_path)) as journal:
            with pytest.raises(JournalError, match=r"beginning a new log file failed.*No space left"):
                take(journal, 25)
            assert generations(tmp_path, "bin") == [0, 1]  # a later file would make this one's torn tail data loss
            (tmp_path / "ballast").unlink()
            append(journal, range(25, 26))
            take(journal, 26)
            journal.wait()
        assert recovered(tmp_path) == (list(range(26)), ())
        assert generations(tmp_path, "safetensors") == [2]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """Two shards never write to one folder; once the first is closed the second may."""
    with (
        closing(opened(tmp_path)),
        pytest.raises(JournalError, match=r"cannot be locked.*another process uses it.*choose another folder"),
    ):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    """It is told at the start and not at the first record."""
    with (
        mounted(tmp_path, "ro"),
        pytest.raises(JournalError, match="is read-only; see that it is a folder one may write"),
    ):
        Journal(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """It is told by name."""
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(JournalError, match=r"file: opening the folder failed.*File exists"):
        Journal(path)


def test_a_journal_is_used_in_order(tmp_path: Path) -> None:
    """Recover, then append, then close, each once; and nothing is taken that could not come back."""
    journal = Journal(tmp_path)
    with pytest.raises(ProtocolError, match="call recover"):
        journal.append(b"x")
    assert (journal.bytes, journal.log_bytes, journal.checkpointing, journal.failure) == (0, 0, False, "")
    journal.wait()
    journal.recover()
    with pytest.raises(ProtocolError, match="recovered before"):
        journal.recover()
    with pytest.raises(ConfigurationError, match="'table'"):
        journal.checkpoint(b"", {"table": torch.zeros(1)})
    journal.close()
    journal.close()
    for use in (journal.recover, lambda: journal.append(b"x"), lambda: take(journal, 0)):
        with pytest.raises(ProtocolError):
            use()
    with pytest.raises(ConfigurationError, match="at least 1 checkpoint, not 0"):
        Journal(tmp_path, keep=0)


def test_a_record_longer_than_its_length_can_tell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is four gigabytes; a smaller one stands in for it."""
    monkeypatch.setattr(module, "MOST_RECORD_BYTES", 3)
    with closing(opened(tmp_path)) as journal, pytest.raises(JournalError, match="a record of 4 bytes; split it at 3"):
        journal.append(b"four")
