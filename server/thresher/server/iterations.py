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

    def __init__(self, path: Path) -> None:
        """Begin the file anew."""
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def write(self, row: IterationRow) -> None:
        """Append one row."""
        self._file.write(json.dumps({"time": time.time(), **asdict(row)}) + "\n")

    def close(self) -> None:
        """End the file."""
        self._file.close()
