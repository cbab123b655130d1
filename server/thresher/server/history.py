"""What a journal's folder holds, read without its lock and without changing anything.

Generation 0 begins with nothing, generation g with ``checkpoint-<g>.safetensors``; ``log-<g>.bin`` holds the records
since then, and exists from the moment the checkpoint was *taken*, so that the log is complete whether or not the
checkpoint ever reached the disk.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from thresher.protos.errors import DataLossError, FrameError, JournalError
from thresher.server.checkpoints import Checkpoint, read_checkpoint
from thresher.server.records import Inspection, inspect_log

FILE_NAME: Final = re.compile(
    r"(?P<kind>checkpoint|log)-(?P<generation>\d{6,})\.(safetensors|bin)(?P<damaged>\.damaged)?"
)


@final
@dataclass(frozen=True, slots=True)
class History:
    """What can be replayed from a journal's folder; read without its lock, and without changing anything.

    Attributes:
        folder: the journal's folder.
        generations: of the checkpoints that are there, oldest first; they may be damaged, which `checkpoint` finds.
    """

    folder: Path
    generations: tuple[int, ...]

    def checkpoint(self, generation: int) -> Checkpoint:
        """Read one of the checkpoints.

        Raises:
            DataLossError: it is not there, or damaged.
        """
        path = checkpoint_path(self.folder, generation)
        try:
            return read_checkpoint(path, generation)
        except FrameError as error:
            raise _data_loss(path, 0, str(error)) from error

    def records(self, generation: int = 0) -> Iterator[tuple[int, bytes]]:
        """Return each record since a checkpoint was taken, with its generation; 0 is the beginning of the run.

        A record that is being written at this moment is left out.

        Raises:
            DataLossError: some of them are damaged, or no longer there.
            JournalError: a file cannot be read, say because a living shard removed it meanwhile: then try again.
        """
        with explained(self.folder, "reading the log"):
            logs = inspect_chain(self.folder, generation, ())
        yield from replay(self.folder, logs)


def read_history(folder: Path) -> History:
    """Look at a journal's folder, also that of a living shard.

    Raises:
        JournalError: it is no folder, or cannot be read.
    """
    with explained(folder, "listing the folder"):
        return History(folder, tuple(generations_of(folder, "checkpoint")))


@contextmanager
def explained(folder: Path, doing: str) -> Iterator[None]:
    """Turn what the system or a file says into the journal's own error."""
    try:
        yield
    except (OSError, FrameError) as error:
        raise JournalError(
            f"{folder}: {doing} failed: {error}; see that it is a folder one may write to, on a disk that is sound and "
            "has space left, then try again"
        ) from error


def _data_loss(path: Path, offset: int, problem: str) -> DataLossError:
    return DataLossError(
        f"{path}, byte {offset}: {problem}. Nothing on the disk was changed; bring the file back from a copy, or move "
        "the folder away to begin without it"
    )


def checkpoint_path(folder: Path, generation: int) -> Path:
    """Return where the checkpoint of a generation is."""
    return folder / f"checkpoint-{generation:06d}.safetensors"


def log_path(folder: Path, generation: int) -> Path:
    """Return where the records since the checkpoint of a generation are."""
    return folder / f"log-{generation:06d}.bin"


def generations_of(folder: Path, kind: str) -> list[int]:
    """Return the generations of which there is a file of one kind, in order; damaged ones set aside don't count."""
    found = (FILE_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(
        int(match["generation"]) for match in found if match and match["kind"] == kind and not match["damaged"]
    )


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the newest checkpoint that can be read, and for each newer one a notice of what is wrong with it."""
    damaged: dict[Path, str] = {}
    for generation in reversed(generations_of(folder, "checkpoint")):
        path = checkpoint_path(folder, generation)
        try:
            return read_checkpoint(path, generation), damaged
        except FrameError as error:
            damaged[path] = f"{path}: {error}; what is before it serves instead, with a longer replay"
    return None, damaged


def inspect_chain(folder: Path, first: int, notices: tuple[str, ...]) -> list[Inspection]:
    """Read all log files from a generation on and say how far the last one is whole.

    Args:
        folder: the journal's folder.
        first: the generation to begin with.
        notices: what is to be said besides when something is missing.

    Raises:
        DataLossError: a file is missing, or there is damage that is no torn tail of the last one.
        OSError: a file cannot be read.
    """
    newest = max(first, *generations_of(folder, "checkpoint"), *generations_of(folder, "log"))
    logs: list[Inspection] = []
    for generation in range(first, newest + 1):
        path = log_path(folder, generation)
        if not path.exists():
            problem = f"the file is missing, and with it what came after checkpoint {generation}"
            raise _data_loss(path, 0, "; ".join((problem, *notices)))
        log = inspect_log(path, generation)
        if log.problem and not (log.torn and generation == newest):
            raise _data_loss(path, log.end, "; ".join((log.problem, *notices)))
        logs.append(log)
    return logs


def replay(folder: Path, logs: list[Inspection]) -> Iterator[tuple[int, bytes]]:
    """Return the whole records of log files, each with its generation; they are read as they are asked for.

    Raises:
        JournalError: a file has gone or changed since it was inspected.
    """
    with explained(folder, "reading the log"):
        for log in logs:
            for record in log.records():
                yield log.generation, record
