"""What a worker would lose by dying, in one file with two halves.

All worker-local state (residual, pending frames, momenta, controllers, what the user keeps) is written to one half
while the other stays as it is; then a slot in the header names the new half. A process killed at any instant therefore
leaves one whole state: the last one that was flipped, or the one before.

The file, little-endian:

====== ===== ========== ============================================================================================
offset bytes field      meaning
====== ===== ========== ============================================================================================
0      8     magic      ``THSHMEM1``
8      3064  identity   whose memory this is, UTF-8, padded with zeros
3072   32    slot 0     sequence (8), offset (8), length (8) and checksum (4) of a half; CRC-32 of these 28 bytes (4)
3584   32    slot 1     likewise; number n goes to slot n mod 2, the larger number is the newer one
4096   …     the halves length of the skeleton (8); the skeleton (JSON); the bytes of the tensors and bytes in it
====== ===== ========== ============================================================================================

A half of length 0 stands for no state; its checksum is 0. Any other checksum is the CRC-32 of the CRC-32s of the half's
blocks of 4 MiB, so that several threads can share the work. Each slot, padded with zeros, has a sector of its own: a
torn write never reaches the other one.
"""

import fcntl
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch

from thresher.protos.errors import ConfigurationError, DataLossError, ThresherError
from thresher.worker.state_bytes import decode, encode

State = dict[str, Any]
"""Dicts (keys: str, int), lists and tuples of tensors, bytes, str, int, float, bool, None: what a state_dict holds."""

Block = TypeVar("Block")

_MAGIC: Final = b"THSHMEM1"
_SECTOR: Final = 512
_PAGE: Final = 4096
_SLOTS_AT: Final = (_PAGE - 2 * _SECTOR, _PAGE - _SECTOR)
_BLOCK: Final = 4 << 20

_SLOT: Final = struct.Struct("<QQQI")
_CRC: Final = struct.Struct("<I")


class MemoryFileError(ThresherError, RuntimeError):
    """A memory's file cannot be opened, locked, read or written. What was flipped before is still there."""


@final
@dataclass(frozen=True, slots=True)
class _Slot:
    """Where in the file a half lies."""

    sequence: int
    offset: int
    length: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    def pack(self) -> bytes:
        data = _SLOT.pack(self.sequence, self.offset, self.length, self.crc)
        return (data + _CRC.pack(zlib.crc32(data))).ljust(_SECTOR, b"\0")

    @classmethod
    def unpack(cls, sector: bytes) -> "_Slot | None":
        """The inverse of `pack`; None where the sector is damaged."""
        slot = cls(*_SLOT.unpack_from(sector))
        return slot if slot.pack() == sector else None


@final
class Memory:
    """The state of one worker, kept through `kill -9`: `flip` replaces it as a whole, `load` returns the newest.

    The file is locked while it is open; the lock goes with the process, however it ends. It is at most two pages and
    25/8 times the largest state long. Not thread-safe.

    Args:
        path: The file; made when missing, in a folder that exists.
        identity: Names the run, the rank, the layout and the method; at most 3064 bytes.
        sync: Survive a crash of the machine as well: wait for the disk before and after the slot is written.
        between: Called when the new half is written and its slot is not: the point at which a fault plan strikes.

    Attributes:
        notices: What the user should hear of: that a half was damaged and the other one is used.

    Raises:
        ConfigurationError: the file is somebody else's, or the identity is too long.
        MemoryFileError: the file cannot be opened or read, or another process has it open.
    """

    def __init__(
        self, path: Path, identity: str, *, sync: bool = False, between: Callable[[], object] = lambda: None
    ) -> None:
        self.notices: list[str] = []
        self._path, self._sync, self._between = path, sync, between
        self._head = (_MAGIC + identity.encode()).ljust(_SLOTS_AT[0], b"\0")
        if len(self._head) > _SLOTS_AT[0]:
            raise ConfigurationError(f"identity: more than 3064 bytes, {identity[:80]!r}…; put a digest in its place")
        with self._os_errors():
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with self._os_errors():
                self._lock()
                self._current = self._open()
        except BaseException:
            self.close()
            raise

    def load(self) -> State | None:
        """The newest whole state, bit for bit; None when nothing was flipped since the file was made or cleared.

        Tensors are contiguous, on the CPU, and share no memory with the file. A subclass comes back as its base: an
        OrderedDict as a dict, a Parameter as a tensor, a named tuple as a tuple; but a Counter stays one.

        Raises:
            DataLossError: both halves are damaged; `clear` begins anew.
            MemoryFileError: the file cannot be read.
        """
        half = self._whole()
        with self._os_errors():
            return decode(self._fd, half.offset) if half.length else None

    def flip(self, state: State) -> None:
        """Write ``state`` to the half that is not in use, then make it the newest.

        On any error, and when the process dies in here, the state before stays.

        Raises:
            ConfigurationError: a value in ``state`` cannot be kept; the message says where it is.
            DataLossError: both halves are damaged; `clear` begins anew.
            MemoryFileError: the file cannot be written, as on a full disk.
        """
        parts = encode(state)
        with self._os_errors():
            slot = self._write_half(parts)
            self._between()
            self._flip_header(slot)

    def clear(self) -> None:
        """Forget both halves and give their space back.

        Raises:
            MemoryFileError: the file cannot be written.
        """
        with self._os_errors():
            os.ftruncate(self._fd, 0)
            self._current = self._create()

    def close(self) -> None:
        """Unlock and close the file; what was flipped stays. Closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1  # the number may soon be another file's

    def _lock(self) -> None:
        # A lock of the process, not of the open file: forked children, a loader's say, can outlive it for seconds.
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise MemoryFileError(
                f"{self._path} is open in another process; each worker needs a file of its own: end that process, "
                "or give this worker another rank or folder"
            ) from error

    def _open(self) -> _Slot | None:
        """The newest whole half of the file, which is made when it is new."""
        page = os.pread(self._fd, _PAGE, 0)
        if len(page) < _PAGE and page[: len(_MAGIC)] == _MAGIC[: len(page)]:  # new, or killed while it was made
            return self._create()
        if len(page) < _PAGE or not page.startswith(_MAGIC):
            raise ConfigurationError(f"{self._path} is not the memory of a worker: name another path, or remove it")
        if not page.startswith(self._head):
            heads = page[: _SLOTS_AT[0]], self._head
            found, wanted = (head[len(_MAGIC) :].rstrip(b"\0").decode(errors="replace") for head in heads)
            raise ConfigurationError(
                f"{self._path} is the memory of {found!r}, this worker is {wanted!r}: "
                "give this run a folder of its own, or resume the run that this folder belongs to"
            )
        return self._newest([_Slot.unpack(page[at : at + _SECTOR]) for at in _SLOTS_AT])

    def _create(self) -> _Slot:
        """Write a header whose two halves are both empty."""
        older, newer = _Slot(0, _PAGE, 0, 0), _Slot(1, _PAGE, 0, 0)
        _write_all(self._fd, memoryview(self._head + older.pack() + newer.pack()), 0)
        if self._sync:
            os.fsync(self._fd)
            _sync_folder(self._path.parent)
        return newer

    def _newest(self, slots: Sequence[_Slot | None]) -> _Slot | None:
        sound = sorted((slot for slot in slots if slot), key=lambda slot: slot.sequence, reverse=True)
        newest = next((slot for slot in sound if self._holds(slot)), None)
        if newest and (None in slots or newest is not sound[0]):
            self.notices.append(
                f"{self._path}: one half is damaged; the other one is used, which may be one step older: check the disk"
            )
        return newest

    def _holds(self, slot: _Slot) -> bool:
        """Whether the bytes of a half are those that were written."""

        def crc_of(start: int) -> int:
            return zlib.crc32(os.pread(self._fd, min(_BLOCK, slot.end - start), start))

        starts = range(slot.offset, slot.end, _BLOCK)
        return slot.end <= os.fstat(self._fd).st_size and slot.crc == _checksum(crc_of, starts)

    def _whole(self) -> _Slot:
        if self._current is None:
            raise DataLossError(
                f"both halves of {self._path} are damaged: what this worker had not sent yet, and whatever else it "
                "kept, is lost; check the disk, then remove the file to go on without it"
            )
        return self._current

    def _write_half(self, parts: Sequence[memoryview]) -> _Slot:
        whole, length = self._whole(), sum(map(len, parts))
        offset = _place(length, whole)

        def write(numbered: tuple[int, list[memoryview]]) -> int:
            number, pieces = numbered
            block = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
            _write_all(self._fd, block, offset + number * _BLOCK)
            return zlib.crc32(block)

        return _Slot(whole.sequence + 1, offset, length, _checksum(write, enumerate(_blocks(parts))))

    def _flip_header(self, slot: _Slot) -> None:
        if self._sync:
            os.fdatasync(self._fd)
        _write_all(self._fd, memoryview(slot.pack()), _SLOTS_AT[slot.sequence % 2])
        if self._sync:
            os.fdatasync(self._fd)
        self._current = slot

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MemoryFileError(
                f"{self._path}: {error.strerror}; what was flipped before is whole: check that the folder exists, its "
                "permissions and the room on its disk, then go on or resume the run"
            ) from error


def _place(length: int, whole: _Slot) -> int:
    """Where ``length`` bytes fit beside the half that must not be touched: before it, else behind it.

    Behind, an eighth of room is left, so that states whose sizes vary a little keep their two places.
    """
    if _PAGE + length <= whole.offset:
        return _PAGE
    return -(-(whole.end + whole.length // 8) // _PAGE) * _PAGE


def _checksum(crc_of: Callable[[Block], int], blocks: Iterable[Block]) -> int:
    """The checksum of a half; ``crc_of`` runs on as many threads as torch would use, and none is left behind."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        crcs = list(threads.map(crc_of, blocks))
    return zlib.crc32(b"".join(map(_CRC.pack, crcs))) if crcs else 0


def _blocks(parts: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Cut a row of buffers into blocks, all of one size but the last, without copying."""
    block: list[memoryview] = []
    room = _BLOCK
    for part in parts:
        rest = part
        while len(rest) >= room:
            yield [*block, rest[:room]]
            rest, block, room = rest[room:], [], _BLOCK
        block.append(rest)
        room -= len(rest)
    if room < _BLOCK:
        yield block


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
