"""What one step of a worker came to, as a row; and the file that takes one line of each."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, final

from thresher.protos.errors import ConfigurationError

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class WorkerRow:
    """The truth about one step of one worker that exchanged with the shards.

    The three durations follow each other without a gap: added up over rows, they are the time from the first row's
    beginning to the last one's end.

    Attributes:
        time: Unix seconds at its end.
        rank: The worker's.
        step: How many steps of the optimizer this worker has made, this one included.
        version: Of the model after it; the largest over shards.
        compute_seconds: From the end of the last exchange to the beginning of this step: data, forward and backward
            passes, callbacks, `Session.mean`, and steps without an exchange.
        compress_seconds: From there until frames are ready and kept: gather, check, correct, select.
        exchange_seconds: From there until the parameters are in the model: send, wait, replay, copy.
        push_bytes: Of exchange messages since the last row, to all shards.
        pull_bytes: From all shards, likewise.
        pushed_elements: Of this step; 0 where it was skipped.
        numel: Elements of the model.
        residual_norm: Norm of what is kept after it.
        threshold: The one it was made with; None for methods without one, and before it is found.
        layers: Elements pushed of each tensor, of the 256 largest, in steps 1, 10, 20, …; None in all others.
    """

    time: float
    rank: int
    step: int
    version: int
    compute_seconds: float
    compress_seconds: float
    exchange_seconds: float
    push_bytes: int
    pull_bytes: int
    pushed_elements: int
    numel: int
    residual_norm: float
    threshold: float | None
    layers: Mapping[str, int] | None

    def scalars(self) -> dict[str, float]:
        """Return all numbers of the step by name, for loggers; what is not known is left out.

        The names begin with ``thresher/``; ``push_density`` is pushed elements over those of the model, and
        ``layers/NAME`` elements pushed of a tensor.
        """
        found: dict[str, float] = {"push_density": self.pushed_elements / self.numel}
        found |= {name: value for name in _SCALARS if (value := getattr(self, name)) is not None}
        found |= {f"layers/{name}": count for name, count in (self.layers or {}).items()}
        return {f"thresher/{name}": float(value) for name, value in found.items()}


_FIELDS: Final = tuple(field.name for field in fields(WorkerRow))
_SCALARS: Final = tuple(name for name in _FIELDS if name not in ("time", "rank", "step", "numel", "layers"))


@final
class RowsFile:
    """Appends each row as a line; nothing stays in a buffer. A disk that takes no more costs rows, and not the run.

    Raises:
        ConfigurationError: when it cannot be opened, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        """Open it, and make its folder where that is missing; `keep` says what stays of an earlier life."""
        self._path = path
        self._size = self._newest = 0
        self._is_told = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._found = _whole_lines(path)
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be written: {error.strerror}; name another file as THRESHER_ROWS, or none"
            ) from error

    def keep(self, step: int) -> None:
        """Go on after the rows up to ``step``; 0 begins the file anew."""
        for size, found in self._found:
            if found <= step:
                self._size, self._newest = size, found
        self._found = []
        self._cut()

    def __call__(self, row: WorkerRow) -> None:
        """Append a row; one of a step that is there already changes nothing."""
        if row.step <= self._newest:
            return
        line = json.dumps({name: getattr(row, name) for name in _FIELDS}).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            if not self._is_told:
                _logger.error("%s takes no more rows, and lacks those until it does: %s", self._path, error.strerror)  # noqa: TRY400 - it says all
            self._is_told = True
        else:
            self._size, self._newest = self._size + len(line), row.step

    def close(self) -> None:
        """End the file."""
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        """Write a line whole, or leave the file as it was."""
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            self._cut()
            raise

    def _cut(self) -> None:
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)


def _whole_lines(path: Path) -> list[tuple[int, int]]:
    """Return the steps of all rows, each with the size of the file up to there; the last line may be torn by a kill."""
    found: list[tuple[int, int]] = []
    size = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                size += len(line)
                found.append((size, _step_of(line, path)))
    return found


def _step_of(line: bytes, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(f"{path} has a line that is no row: {line[:80]!r}; move the file away") from error
