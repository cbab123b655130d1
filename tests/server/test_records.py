"""One log file: it comes back whole up to any tear, damage is told from a tear, and a failed append leaves no trace."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.protos.errors import FrameError
from thresher.server import records
from thresher.server.records import HEADER_BYTES, RECORD_OVERHEAD, LogFile, inspect_log

GENERATION = 7
BODIES = [b"first", b"", b"\x00" * 9, b"the last one"]


def written(path: Path, bodies: list[bytes], end: int = 0) -> Path:
    log = LogFile(path, GENERATION, end=end)
    for body in bodies:
        log.append(body)
    log.close()
    return path


def starts(bodies: list[bytes]) -> list[int]:
    """The offset of each record, and that of the end."""
    return [
        HEADER_BYTES + sum(RECORD_OVERHEAD + len(body) for body in bodies[:count]) for count in range(len(bodies) + 1)
    ]


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Let the system refuse what is written behind ``size``, in part if need be, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(st.lists(st.binary(max_size=40), max_size=6), st.floats(0, 1), st.binary(max_size=20))
@example([b"x"], 0.0, b"")
@example([b"x"], 1.0, b"")
def test_a_log_torn_at_any_byte_is_whole_up_to_the_tear_and_goes_on_from_there(
    bodies: list[bytes], where: float, more: bytes
) -> None:
    """Law: cut anywhere, exactly the records that are whole before the cut come back, and so does what comes next."""
    with TemporaryDirectory() as folder:
        path = written(Path(folder, "log"), bodies)
        cut = round(where * path.stat().st_size)
        os.truncate(path, cut)
        ends = starts(bodies)
        whole = [body for body, end in zip(bodies, ends[1:], strict=True) if end <= cut]
        found = inspect_log(path, GENERATION)
        assert list(found.records()) == whole
        assert found.end == (0 if cut < HEADER_BYTES else ends[len(whole)])
        assert bool(found.problem) == found.torn == (cut != found.end or cut == 0)
        written(path, [more], end=found.end)
        again = inspect_log(path, GENERATION)
        assert (list(again.records()), again.problem) == ([*whole, more], "")
        assert again.record_bytes == path.stat().st_size - HEADER_BYTES


def test_each_flipped_bit_is_found_and_only_one_in_the_last_record_is_a_tear(tmp_path: Path) -> None:
    """Law: whichever bit of the file is wrong, no record comes back wrong, and what is followed by more is no tear."""
    path = written(tmp_path / "log", BODIES)
    data, offsets = path.read_bytes(), starts(BODIES)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = inspect_log(path, GENERATION)
        before = [offset for offset in offsets if offset <= bit // 8]
        assert found.end == (before[-1] if before else 0)
        assert found.problem
        assert found.torn == (len(before) == len(BODIES))


@pytest.mark.parametrize("size", [1, RECORD_OVERHEAD, 500])
def test_pages_that_never_reached_the_disk_are_a_tear_only_at_the_end(tmp_path: Path, size: int) -> None:
    """Zeros behind the last record are a tear; zeros before a whole record, or instead of the header, are not."""
    path = written(tmp_path / "log", BODIES)
    data, end = path.read_bytes(), starts(BODIES)[-1]
    path.write_bytes(data + bytes(size))
    found = inspect_log(path, GENERATION)
    assert (found.end, found.torn) == (end, True)
    path.write_bytes(data[:HEADER_BYTES] + bytes(starts(BODIES)[2] - HEADER_BYTES) + data[starts(BODIES)[2] :])
    assert (inspect_log(path, GENERATION).end, inspect_log(path, GENERATION).torn) == (HEADER_BYTES, False)
    path.write_bytes(bytes(HEADER_BYTES))
    assert (inspect_log(path, GENERATION).end, inspect_log(path, GENERATION).torn) == (0, True)
    path.write_bytes(bytes(HEADER_BYTES) + data[HEADER_BYTES:])
    assert (inspect_log(path, GENERATION).end, inspect_log(path, GENERATION).torn) == (0, False)


def test_a_torn_record_that_holds_records_is_a_tear(tmp_path: Path) -> None:
    """A record of another place, inside a body, is not taken for one that follows."""
    inner = written(tmp_path / "inner", BODIES).read_bytes()
    path = written(tmp_path / "log", [b"before", inner])
    os.truncate(path, path.stat().st_size - 1)
    assert inspect_log(path, GENERATION).torn


def test_a_whole_record_is_found_however_far_behind_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes on over the borders of its blocks."""
    monkeypatch.setattr(records, "_SEARCH_OFFSETS", 16)
    path = written(tmp_path / "log", [b"a" * 100, b"b"])
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\xff")
    assert not inspect_log(path, GENERATION).torn
    os.truncate(path, path.stat().st_size - 1)
    assert inspect_log(path, GENERATION).torn


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no log", "no log: it ends after 6 bytes"),
        (b"no log at all, but long", "wrong magic: found b'no log a'"),
        (records.MAGIC + b"\x02\x00\x00\x00\x07\x00\x00\x00", "wrong format version: found 2, expected 1"),
        (records.MAGIC + b"\x01\x00\x00\x00\x08\x00\x00\x00", "wrong generation: found 8, expected 7"),
    ],
)
def test_another_file_is_no_torn_log(tmp_path: Path, content: bytes, problem: str) -> None:
    """What was never a log of this generation is damage, and the message says what is wrong."""
    path = tmp_path / "log"
    path.write_bytes(content)
    found = inspect_log(path, GENERATION)
    assert problem in found.problem
    assert (found.end, found.torn) == (0, False)


def test_a_length_that_exceeds_the_file_allocates_nothing(tmp_path: Path) -> None:
    """A record that claims four gigabytes is refused by the size of the file, before anything is read."""
    path = written(tmp_path / "log", [])
    length = 2**32 - 1
    with path.open("ab") as file:
        file.write(length.to_bytes(4, "little"))
        file.write(((HEADER_BYTES + RECORD_OVERHEAD + length) % 2**32).to_bytes(4, "little") + bytes(8))
    assert "4294967295 bytes ends 4294967291 bytes behind the end" in inspect_log(path, GENERATION).problem


def test_a_file_that_changed_since_it_was_inspected_is_refused(tmp_path: Path) -> None:
    """Records that are read late are checked again."""
    path = written(tmp_path / "log", BODIES)
    found = inspect_log(path, GENERATION)
    os.truncate(path, found.end - 1)
    with pytest.raises(FrameError, match="wrong checksum"):
        list(found.records())


@pytest.mark.parametrize("room", [0, 1, RECORD_OVERHEAD, RECORD_OVERHEAD + 99])
def test_an_append_that_does_not_fit_leaves_no_trace_and_a_later_one_succeeds(tmp_path: Path, room: int) -> None:
    """Whatever part of a record the disk took, the file is cut back to whole records at once."""
    path = tmp_path / "log"
    log = LogFile(path, GENERATION)
    log.append(b"before")
    before = path.read_bytes()
    with no_file_longer_than(len(before) + room), pytest.raises(OSError, match="File too large"):
        log.append(b"x" * 100)
    assert path.read_bytes() == before
    assert log.end == len(before)
    log.append(b"after")
    log.close()
    assert list(inspect_log(path, GENERATION).records()) == [b"before", b"after"]


def test_a_record_that_could_not_be_synced_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not be on the disk must not seem to be there; a disk that fails to sync cannot be had in a test."""

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "log"
    log = LogFile(path, GENERATION, sync=True)
    log.append(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            log.append(b"lost")
    log.append(b"after")
    log.close()
    assert list(inspect_log(path, GENERATION).records()) == [b"before", b"after"]


def test_what_could_not_be_cut_off_is_cut_off_before_the_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk so broken that even the mending fails: nothing is written behind the remains."""

    def fail(_fd: int, _size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "log"
    log = LogFile(path, GENERATION)
    whole = log.end
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with no_file_longer_than(whole + 50), pytest.raises(OSError, match="File too large"):
            log.append(b"x" * 100)
        with pytest.raises(OSError, match="Input/output error"):
            log.append(b"y")
    assert path.stat().st_size == whole + 50
    log.append(b"z")
    log.close()
    assert path.stat().st_size == whole + RECORD_OVERHEAD + 1
    assert list(inspect_log(path, GENERATION).records()) == [b"z"]


def test_a_file_that_cannot_be_begun_raises(tmp_path: Path) -> None:
    """A header that does not fit is told as the system tells it."""
    with no_file_longer_than(4), pytest.raises(OSError, match="File too large"):
        LogFile(tmp_path / "log", GENERATION, sync=True)


def test_a_file_that_is_closed_in_the_middle_of_a_record_is_written_to_no_more(tmp_path: Path) -> None:
    """As when its shard is killed there, in a process that goes on: the tail is torn, and whoever opens it cuts it."""

    def strike() -> None:
        if armed:
            log.close()

    path, armed = tmp_path / "log", False
    log = LogFile(path, GENERATION, between=strike)
    log.append(b"whole")
    size, armed = path.stat().st_size, True
    with pytest.raises(OSError, match="Bad file descriptor"):
        log.append(b"half of it")
    assert size < path.stat().st_size < size + len(b"half of it") + RECORD_OVERHEAD
    found = inspect_log(path, GENERATION)
    assert found.end == size
    assert found.problem
