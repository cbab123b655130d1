"""The per-iteration file: one JSON line per round, exact where a scrape is a sample."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import final

from thresher.server.events import IterationRow


@final
class IterationFile:
    """Appends each row as a line, with the wall-clock time, and leaves nothing in a buffer."""

    def __init__(self, path: Path, version: int = 0) -> None:
        """Go on after ``version``, with the rows up to there that the file has; 0 begins it anew."""
        kept = _rows_up_to(path, version) if version else b""
        path.write_bytes(kept)
        self._newest = json.loads(kept.splitlines()[-1])["version"] if kept else 0
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: IterationRow) -> None:
        """Append one row; one that is there already changes nothing."""
        if row.version > self._newest:
            self._file.write(json.dumps({"time": time.time(), **asdict(row)}) + "\n")
            self._newest = row.version

    def close(self) -> None:
        """End the file."""
        self._file.close()


def _rows_up_to(path: Path, version: int) -> bytes:
    """Return the whole lines of an earlier life: its last one may be torn, or be of a round that nobody heard of."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["version"] <= version)
