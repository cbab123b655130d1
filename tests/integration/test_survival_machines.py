"""A machine that crashes: what was synced is there; of the rest, whatever reached the disk, nothing is wrong."""

import os
import random
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.protos.errors import ConfigurationError, DataLossError
from thresher.server.journal import Journal
from thresher.worker.memory import Memory, State

SECTOR = 512
each_disk = settings(max_examples=20)  # a law that writes and reads many files for each example


class Disk:
    """A folder on a disk that keeps what was synced; of what has changed since, it keeps what it happens to keep.

    Args:
        folder: Its files are watched, those in folders of its own are not.
        patch: Puts this disk in the place of the real one, for which nobody has to wait.
        before: Called before anything is synced.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
        """Begin empty."""
        self._folder, self._before = folder, before
        self._names: dict[str, int] = {}  # inodes, as the folder was synced last
        self._contents: dict[int, bytes] = {}  # of inodes, as they were synced last
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._sync)

    def _sync(self, fd: int) -> None:
        place, found = Path(f"/proc/self/fd/{fd}").readlink(), os.fstat(fd)
        if not place.is_relative_to(self._folder):
            return
        self._before()
        if stat.S_ISDIR(found.st_mode):
            self._names = self._inodes()
        else:
            self._contents[found.st_ino] = place.read_bytes()

    def _inodes(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self._folder.iterdir() if path.is_file()}

    def crash(self, image: Path, chance: random.Random) -> None:
        """Leave in ``image`` what is on the disk after the machine has crashed."""
        now = self._inodes()
        for name in sorted({*now, *self._names}):
            inode = chance.choice([now.get(name), self._names.get(name)])
            if inode is None:
                continue
            kept = self._contents.get(inode, b"")
            wanted = (self._folder / name).read_bytes() if now.get(name) == inode else kept
            length = max(len(kept), len(wanted))
            ways = [content.ljust(length, b"\0") for content in (kept, wanted)]
            sectors = (chance.choice(ways)[at : at + SECTOR] for at in range(0, length, SECTOR))
            (image / name).write_bytes(b"".join(sectors))


def number(state: State | None) -> int:
    """Which of the flips a state is from; any but a whole one fails."""
    if state is None:
        return 0
    assert (state["x"] == state["number"]).all()
    return int(state["number"])


@each_disk
@given(st.lists(st.integers(0, 1500), min_size=1, max_size=4), st.booleans(), st.randoms(use_true_random=False))
def test_a_worker_finds_a_whole_state(sizes: list[int], sync: bool, chance: random.Random) -> None:
    """With sync it is the last flip, or in the middle of one either; without, maybe an older one, or an error."""
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:

        def check(at_least: int, at_most: int) -> None:
            with TemporaryDirectory() as image:
                disk.crash(Path(image), chance)
                try:
                    with closing(Memory(Path(image, "memory"), "a worker")) as memory:
                        assert at_least * sync <= number(memory.load()) <= at_most
                except (ConfigurationError, DataLossError):  # it says that it is no memory, or a damaged one
                    assert not sync or not flips  # it was just being made, and is to be removed

        flips = 0
        disk = Disk(Path(place), patch, lambda: check(flips, flips + 1))
        with closing(Memory(Path(place, "memory"), "a worker", sync=sync)) as memory:
            check(0, 0)
            for size in sizes:
                memory.flip({"number": flips + 1, "x": torch.full((size,), flips + 1)})
                flips += 1
                check(flips, flips)


@each_disk
@given(st.lists(st.integers(0, 900), min_size=1, max_size=9), st.booleans(), st.randoms(use_true_random=False))
def test_a_shard_finds_all_its_records(steps: list[int], sync: bool, chance: random.Random) -> None:
    """With sync all that were appended; without, the first of them, or an error. 0 stands for a checkpoint."""
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        records: list[bytes] = []

        def check(at_least: int) -> None:
            with TemporaryDirectory() as image:
                disk.crash(Path(image), chance)
                with closing(Journal(Path(image))) as journal:
                    try:
                        found = journal.recover()
                        begin = 0 if found.checkpoint is None else int(found.checkpoint.table)
                        after = list(found.records)
                    except DataLossError:
                        assert not sync
                    else:
                        assert after == records[begin : begin + len(after)]
                        assert begin + len(after) >= at_least * sync

        disk = Disk(Path(place), patch, lambda: check(max(0, len(records) - 1)))
        with closing(Journal(Path(place), sync=sync)) as journal:
            journal.recover()
            for size in steps:
                if size:
                    records.append(chance.randbytes(size))
                    journal.append(records[-1])
                else:
                    journal.checkpoint(str(len(records)).encode(), {})
                    journal.wait()
                check(len(records))
