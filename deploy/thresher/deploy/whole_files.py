"""Files that are there as a whole or not at all, whatever ends the process or the machine."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` into the place of what is at ``path``: written beside, synced, renamed.

    Raises:
        OSError: when there is no room, or no permission; what was there before still is.
    """
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)
