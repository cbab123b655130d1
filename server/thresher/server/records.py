"""One file of a shard's log: records one after the other, each with its length and its checksum.

====== ===== ===========================================================================
offset bytes field, little-endian
====== ===== ===========================================================================
0      8     magic, ``THSHLOG`` and a line feed
8      4     format version, 1
12     4     generation, the number in the file's name
16     …     the records, without a gap
====== ===== ===========================================================================

A record is its length (4 bytes), the low 32 bits of the offset at which it ends (4), the CRC-32 of these eight bytes
and the body (4), and the body. Length and end check each other, so that whole records are also found behind a damaged
one: that is how a torn tail, which a kill leaves, is told from damage, which no kill explains.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, final

import numpy as np

from thresher.protos.errors import FrameError

MAGIC: Final = b"THSHLOG\n"
VERSION: Final = 1
MOST_RECORD_BYTES: Final = 2**32 - 1

_HEADER: Final = struct.Struct("<8sII")
_PLACE: Final = struct.Struct("<II")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size
RECORD_OVERHEAD: Final = _PLACE.size + _CRC.size

_READ_BYTES: Final = 1 << 20
_SEARCH_OFFSETS: Final = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at a whole log file found.

    Attributes:
        path: the file.
        generation: of the file.
        end: offset in bytes behind the last record that is whole, counted from the start; 0 without a whole header.
        problem: what is wrong at ``end``; empty when nothing is.
        torn: whether the problem is a torn tail, as a kill in the middle of a write leaves it: no whole record follows.
    """

    path: Path
    generation: int
    end: int
    problem: str = ""
    torn: bool = False

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole records, their headers included."""
        return max(0, self.end - HEADER_BYTES)

    def records(self) -> Iterator[bytes]:
        """Return the whole records in order, read one by one.

        Raises:
            FrameError: the file has changed since the inspection.
            OSError: the file cannot be read.
        """
        with self.path.open("rb", buffering=_READ_BYTES) as file:
            yield from _records(file, self.end)


def inspect_log(path: Path, generation: int) -> Inspection:
    """Read a log file through and say how far it is whole; nothing is changed.

    Raises:
        OSError: the file cannot be read.
    """
    end = 0
    size = path.stat().st_size  # a living shard may append meanwhile: that is not looked at
    try:
        with path.open("rb", buffering=_READ_BYTES) as file:
            header = file.read(HEADER_BYTES)
            if size <= HEADER_BYTES and _is_torn_header(header, generation):
                return Inspection(path, generation, 0, "the file ends within its header", torn=True)
            _check_header(header, generation)
            end = HEADER_BYTES
            for record in _records(file, size):
                end += RECORD_OVERHEAD + len(record)
    except FrameError as error:
        torn = end > 0 and not _whole_record_follows(path, end, size)
        return Inspection(path, generation, end, str(error), torn)
    return Inspection(path, generation, end)


def _nothing() -> None:
    """Nothing strikes in between."""


@final
class LogFile:
    """A log file that is appended to. Law: whatever fails, the file holds whole records only, or is mended before more.

    Args:
        path: the file, made where it is missing.
        generation: of the file.
        end: where the whole records end, as `inspect_log` found it; what lies behind is cut off. 0 begins a new file.
        sync: whether each record is on the disk, and not only in the kernel's memory, when `append` returns.
        between: called when half of a record is written.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: Path, generation: int, *, end: int = 0, sync: bool = False, between: Callable[[], None] = _nothing
    ) -> None:
        """Open the file."""
        self.generation = generation
        self.end = end
        self._sync, self._between = sync, between
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._ragged = True
        try:
            self.mend()
            if end == 0:
                self._append(_HEADER.pack(MAGIC, VERSION, generation))
                if sync:
                    sync_path(path.parent)
        except OSError:
            os.close(self._fd)
            raise

    @property
    def record_bytes(self) -> int:
        """Bytes of the records, their headers included."""
        return self.end - HEADER_BYTES

    def append(self, record: bytes) -> None:
        """Write a record.

        Raises:
            OSError: it could not be written, or not be synced; the file is as it was. After a failed sync the kernel
                may have dropped what it held, so the record must be appended again even if it seems to be there.
        """
        place = _PLACE.pack(len(record), (self.end + RECORD_OVERHEAD + len(record)) % 2**32)
        self._append(b"".join((place, _CRC.pack(_checksum(place, record)), record)))

    def mend(self) -> None:
        """Cut off what a failed write may have left behind the last record; nothing when there is nothing.

        Raises:
            OSError: the file cannot be cut.
        """
        if self._ragged:
            os.ftruncate(self._fd, self.end)
            self._ragged = False

    def close(self) -> None:
        """Close the file; an append that is half done then ends with an error, and writes nothing more."""
        os.close(self._fd)
        self._fd = -1

    def _append(self, data: bytes) -> None:
        self.mend()
        self._ragged = True  # until proven otherwise: whatever stops this leaves something to cut off
        try:
            half = len(data) // 2
            _write(self._fd, memoryview(data)[:half], self.end)
            self._between()
            _write(self._fd, memoryview(data)[half:], self.end + half)
            if self._sync:
                os.fdatasync(self._fd)
        except OSError:
            with suppress(OSError):  # the next append tries again
                self.mend()
            raise
        self.end += len(data)
        self._ragged = False


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Raises:
        OSError: the disk could not take it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, rest: memoryview, offset: int) -> None:
    """Write all of ``rest`` at ``offset``; a full disk or a signal may take only part of it at a time."""
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def _checksum(place: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(place))


def _check_header(found: bytes, generation: int) -> None:
    if len(found) < HEADER_BYTES:
        raise FrameError(f"the file is no log: it ends after {len(found)} bytes")
    magic, version, found_generation = _HEADER.unpack(found)
    for field, is_, should in (
        ("magic", magic, MAGIC),
        ("format version", version, VERSION),
        ("generation", found_generation, generation),
    ):
        if is_ != should:
            raise FrameError(f"the file has a wrong {field}: found {is_!r}, expected {should!r}")


def _is_torn_header(found: bytes, generation: int) -> bool:
    """Whether a file was just begun, and its first write torn or lost with the machine: nobody relies on it yet."""
    header = _HEADER.pack(MAGIC, VERSION, generation)
    return found != header and (header.startswith(found) or not any(found))


def _records(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Return the records of a file of ``size`` bytes; nothing is allocated for a length that exceeds the file."""
    file.seek(HEADER_BYTES)
    offset = HEADER_BYTES
    while offset < size:
        head = file.read(min(RECORD_OVERHEAD, size - offset))
        if len(head) < RECORD_OVERHEAD:
            raise FrameError(f"a record ends after {len(head)} bytes, within its header")
        length, end = _PLACE.unpack_from(head)
        offset += RECORD_OVERHEAD + length
        if offset % 2**32 != end:
            raise FrameError(f"a record's length, {length}, and its end, {end}, contradict each other")
        if offset > size:
            raise FrameError(f"a record of {length} bytes ends {offset - size} bytes behind the end of the file")
        body = file.read(length)
        (crc,) = _CRC.unpack_from(head, _PLACE.size)
        if len(body) != length or crc != _checksum(head[: _PLACE.size], body):
            raise FrameError(f"a record of {length} bytes has a wrong checksum")
        yield body


def _whole_record_follows(path: Path, start: int, size: int) -> bool:
    """Whether a whole record begins anywhere at or after ``start``, in the first ``size`` bytes of a file.

    Length and end of a record fit each other at one in 2³² places by chance, so few checksums need to be computed.
    """
    data = np.fromfile(path, dtype=np.uint8, offset=start, count=size - start)
    places = data.size - RECORD_OVERHEAD + 1
    for begin in range(0, places, _SEARCH_OFFSETS):
        count = min(_SEARCH_OFFSETS, places - begin)
        # At every byte, whatever its alignment: strides of one byte over words of four.
        lengths = np.ndarray((count,), "<u4", data, offset=begin, strides=(1,))
        ends = np.ndarray((count,), "<u4", data, offset=begin + 4, strides=(1,))
        bodies = (np.arange(count, dtype=np.uint64) + np.uint64(start + begin + RECORD_OVERHEAD)).astype(np.uint32)
        if any(_is_whole(data.data[begin + int(found) :]) for found in np.flatnonzero(bodies + lengths == ends)):
            return True
    return False


def _is_whole(rest: memoryview) -> bool:
    """Whether ``rest`` begins with a whole record."""
    place = bytes(rest[: _PLACE.size])
    length, _ = _PLACE.unpack(place)
    body = rest[RECORD_OVERHEAD : RECORD_OVERHEAD + length]
    return len(body) == length and rest[_PLACE.size : RECORD_OVERHEAD] == _CRC.pack(_checksum(place, body))
