"""A file that is replaced is the old one or the new one."""

import errno
import os
from pathlib import Path

import pytest

from thresher.deploy.whole_files import write_whole


def test_text_is_replaced(tmp_path: Path) -> None:
    """And nothing else is left in the folder."""
    path = tmp_path / "launch.json"
    for text in ("one", "two\n"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the system's, and the old text is whole."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "launch.json"
    write_whole(path, "one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two")
    assert path.read_text(encoding="utf-8") == "one"
