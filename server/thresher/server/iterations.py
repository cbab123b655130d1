"""The per-iteration file: one JSON line per round, exact where a scrape is a sample."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import final

from thresher.server.events import IterationRow


@final
class IterationFile:
    """Appends each row as a line, with the wall-clock time, and leaves nothing in a buffer that the disk would take."""

    def __init__(self, path: Path, version: int = 0) -> None:
        """Go on after ``version``, with the rows up to there that the file has; 0 begins it anew.

        Raises:
            OSError: when it cannot be read or written.
            ValueError: when it holds something else.
        """
        kept = _rows_up_to(path, version) if version else b""
        path.write_bytes(kept)
        self._newest = json.loads(kept.splitlines()[-1])["version"] if kept else 0
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()  # what a full disk has not taken yet

    def write(self, row: IterationRow) -> None:
        """Append one row; one that is there already changes nothing.

        Raises:
            OSError: when the disk does not take it; it is written with the next one.
        """
        if row.version > self._newest:
            self._waiting += json.dumps({"time": time.time(), **asdict(row)}).encode() + b"\n"
            self._newest = row.version
        self._write_waiting()

    def close(self) -> None:
        """End the file. Raises OSError when rows that wait cannot be written even now."""
        try:
            self._write_waiting()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]


def _rows_up_to(path: Path, version: int) -> bytes:
    """Return the whole lines of an earlier life: its last one may be torn, or be of a round that nobody heard of."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return b"".join(line for line in lines if line.endswith(b"\n") and _version_of(line, path) <= version)


def _version_of(line: bytes, path: Path) -> int:
    try:
        return int(json.loads(line)["version"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} has a line that is no row: {line[:80]!r}; move the file away") from error
