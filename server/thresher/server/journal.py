"""A shard's folder on disk: records are appended, checkpoints written behind, and both come back after any crash."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from thresher.protos.errors import ConfigurationError, DataLossError, JournalError, ProtocolError
from thresher.server.checkpoints import UNFINISHED, Checkpoint, write_checkpoint
from thresher.server.history import (
    FILE_NAME,
    History,
    checkpoint_path,
    explained,
    generations_of,
    inspect_chain,
    log_path,
    newest_checkpoint,
    read_history,
    replay,
)
from thresher.server.records import MOST_RECORD_BYTES, Inspection, LogFile, sync_path

__all__ = ["Checkpoint", "DataLossError", "History", "Journal", "JournalError", "Recovered", "read_history"]


@final
@dataclass(frozen=True, slots=True)
class Recovered:
    """What a journal holds when it is opened.

    Attributes:
        checkpoint: the newest one that is whole; None when the records begin with nothing.
        records: all that came after it, in order; read them before the next checkpoint, which may remove their files.
        notices: what was mended, as sentences for people.
    """

    checkpoint: Checkpoint | None
    records: Iterator[bytes]
    notices: tuple[str, ...]


@final
class Journal:
    """Appends records, writes checkpoints behind, and gives both back after any crash.

    Law: what `recover` returns is a prefix of what was appended, and holds every record whose `append` returned: after
    the death of the process always, after the death of the machine with ``sync``.

    It belongs to one thread; checkpoints are written by a thread of the journal's own.

    Args:
        folder: of this shard alone; made where it is missing, and locked until `close` or the end of the process.
        keep: checkpoints that are kept. The log since the oldest of them is kept too, so that a damaged checkpoint
            costs a longer replay and nothing else. The beginning counts as one until there are enough.
        sync: whether `append` waits for the disk.
        between: called when half of a record is written.

    Raises:
        ConfigurationError: ``keep`` is less than 1.
        JournalError: the folder is in use by another process, cannot be written to, or is none.
    """

    def __init__(
        self, folder: Path, *, keep: int = 3, sync: bool = False, between: Callable[[], None] = lambda: None
    ) -> None:
        """Make and lock the folder; `recover` opens what is in it."""
        if keep < 1:
            raise ConfigurationError(f"a journal must keep at least 1 checkpoint, not {keep}")
        self._folder, self._keep, self._sync, self._between = folder, keep, sync, between
        self._log: LogFile | None = None
        self._records_behind = 0  # bytes of records since the last checkpoint that are not in the file appended to
        self._bytes_behind = 0  # bytes of all other files
        self._writing: Future[str] | None = None
        self._lock: int | None = _lock(folder)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def recover(self) -> Recovered:
        """Read what is there, mend what a crash left half done, and be ready to append. Called once, before all else.

        Returns:
            The newest good checkpoint and every record since.

        Raises:
            DataLossError: records or every checkpoint behind them are damaged or missing; nothing was changed.
            JournalError: the folder cannot be read or written.
            ProtocolError: on a second call, or after `close`.
        """
        if self._log is not None or self._lock is None:
            raise ProtocolError("the journal was recovered before: that is done once; open another one to do it again")
        with explained(self._folder, "recovery"):
            if not any(FILE_NAME.fullmatch(path.name) for path in self._folder.iterdir()):
                self._log = self._begin(0)
                return Recovered(None, iter(()), ())
            checkpoint, damaged = newest_checkpoint(self._folder)
            logs = inspect_chain(self._folder, checkpoint.generation if checkpoint else 0, tuple(damaged.values()))
            notices = (*damaged.values(), *self._mend(list(damaged), logs))
            self._bytes_behind = self._measure(but=logs[-1].generation)
        self._records_behind = sum(log.record_bytes for log in logs[:-1])
        return Recovered(checkpoint, (record for _, record in replay(self._folder, logs)), notices)

    def append(self, record: bytes) -> None:
        """Write a record behind the others; with ``sync`` it is on the disk when this returns.

        Raises:
            JournalError: it could not be written or synced, and the log is as it was before. A later append may
                succeed; this record has to be appended again to be there, even after a sync that failed, because the
                kernel may have dropped what it could not write.
            ProtocolError: before `recover` or after `close`.
        """
        log = self._open_log()
        if len(record) > MOST_RECORD_BYTES:
            raise JournalError(f"{self._folder}: a record of {len(record)} bytes; split it at {MOST_RECORD_BYTES}")
        with explained(self._folder, "appending a record"):
            log.append(record)

    def checkpoint(self, table: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Begin a new log file, and have a checkpoint written behind; returns before it is. Waits for one in progress.

        Args:
            table: the shard's own bytes.
            tensors: by any name but ``table``. They are read later: hand over copies.

        Raises:
            ConfigurationError: a tensor is named ``table``.
            JournalError: the new log file could not be begun; the present one goes on, and nothing else happened.
            ProtocolError: before `recover` or after `close`.
        """
        log = self._open_log()
        taken = Checkpoint(log.generation + 1, table, tensors)
        if self._writing is not None:
            self._writing.result()  # what came of it is told by `failure` until the next one begins
        with explained(self._folder, "beginning a new log file"):
            log.mend()
            self._log = self._begin(taken.generation)
        log.close()
        self._records_behind = 0
        self._bytes_behind += log.end
        self._writing = self._writer.submit(self._write, taken)

    @property
    def checkpointing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return self._writing is not None and not self._writing.done()

    @property
    def failure(self) -> str:
        """Why the last checkpoint could not be written; empty when it could, or nothing is known yet.

        Nothing is lost by it: the log since the checkpoint before is kept, and the next one may succeed.
        """
        return "" if self._writing is None or not self._writing.done() else self._writing.result()

    def wait(self) -> None:
        """Wait until the last checkpoint that was begun is on the disk.

        Raises:
            JournalError: it could not be written.
        """
        if self._writing is not None and (failure := self._writing.result()):
            raise JournalError(failure)

    @property
    def bytes(self) -> int:
        """Size in bytes of log and checkpoints on the disk; one that is being written is counted when it is whole."""
        log = self._log  # read once: who scrapes may come while it is closed
        return self._bytes_behind + (0 if log is None else log.end)

    @property
    def log_bytes(self) -> int:
        """Bytes of the records since the last checkpoint was taken: what a recovery would have to replay."""
        log = self._log
        return self._records_behind + (0 if log is None else log.record_bytes)

    def close(self) -> None:
        """Finish the checkpoint in progress, close the files and unlock the folder. A second call does nothing."""
        self._writer.shutdown()
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_log(self) -> LogFile:
        if self._log is None:
            raise ProtocolError(
                "the journal is not open: call recover() once before the first append, and none after close()"
            )
        return self._log

    def _begin(self, generation: int) -> LogFile:
        path = log_path(self._folder, generation)
        try:
            return LogFile(path, generation, sync=self._sync, between=self._between)
        except OSError:
            with suppress(OSError):
                path.unlink()  # records still go to the file before, which would no longer be the last
            raise

    def _mend(self, damaged: list[Path], logs: list[Inspection]) -> list[str]:
        """Change the folder as little as it takes to go on; every check is behind us."""
        last = logs[-1]
        shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)
        for path in damaged:
            path.rename(path.with_name(f"{path.name}.damaged"))
        if self._sync:  # what comes back now will be told: a life before may have ended between write and sync
            for path in (*(log.path for log in logs), self._folder):
                sync_path(path)
        self._prune()  # a life that ends between two steps of this leaves something, and so might the next
        self._log = LogFile(last.path, last.generation, end=last.end, sync=self._sync, between=self._between)
        if not last.problem:
            return []
        return [f"{last.path}: {last.problem} at byte {last.end}; this torn tail was cut off"]

    def _write(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint and remove what it makes superfluous, on the thread for that; return what failed.

        In words, because an error would hold on to the tensors for as long as it is kept.
        """
        try:
            write_checkpoint(checkpoint_path(self._folder, checkpoint.generation), checkpoint)
            self._prune()
            self._bytes_behind = self._measure(but=checkpoint.generation)
        except Exception as error:  # noqa: BLE001 - whatever it is, the shard goes on without this checkpoint
            return (
                f"{self._folder}: checkpoint {checkpoint.generation} could not be written: {error}; free space or "
                "repair the disk; nothing is lost: the log since the one before is kept, and the next one may succeed"
            )
        return ""

    def _prune(self) -> None:
        """Remove what is behind the oldest checkpoint kept, oldest first: wherever that stops, the rest is a chain."""
        beginning = [0] if log_path(self._folder, 0).exists() else []
        oldest = (beginning + generations_of(self._folder, "checkpoint"))[-self._keep :][0]
        found = ((path, FILE_NAME.fullmatch(path.name)) for path in self._folder.iterdir())
        behind = [(int(match["generation"]), match["kind"], path) for path, match in found if match]
        for generation, _, path in sorted(behind):
            if generation < oldest:
                path.unlink()

    def _measure(self, but: int) -> int:
        """Return the bytes of log and checkpoints on the disk, without the log file that is being appended to."""
        current = log_path(self._folder, but)
        files = (path for path in self._folder.iterdir() if FILE_NAME.fullmatch(path.name) and path != current)
        return sum(path.stat().st_size for path in files)


def _lock(folder: Path) -> int:
    """Make the folder and return the descriptor of its lock; the kernel unlocks it however the process ends."""
    with explained(folder, "opening the folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"{folder} is read-only")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise JournalError(
            f"{folder} cannot be locked ({error.strerror}): another process uses it, or its file system has no locks; "
            "end that process, or choose another folder"
        ) from error
    return lock
