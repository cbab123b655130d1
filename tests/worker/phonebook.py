"""A directory for tests, found as any other is: by an entry point in the metadata of an installed package."""

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from thresher.worker import directory

THIS = "tests.worker.phonebook"


class Phonebook:
    """Where shards are, as the test says.

    Attributes:
        places: Of the shards of each run.
        run_variables: Of each run.
        trouble: What it raises instead of an answer; None as long as it answers.
        looks: When it was asked for a place, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}
        self.run_variables: dict[str, Mapping[str, str]] = {}
        self.trouble: Exception | None = None
        self.looks: list[float] = []

    def variables(self, run: str) -> Mapping[str, str]:
        if self.trouble is not None:
            raise self.trouble
        return self.run_variables[run]

    def locate(self, run: str, shard: int) -> str:
        self.looks.append(time.monotonic())
        if self.trouble is not None:
            raise self.trouble
        return self.places[run][shard]


_open: list[Phonebook] = []


def opened() -> directory.Directory:
    """What the entry point names."""
    return _open[-1]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **points: str) -> Phonebook:
    """Install a package that offers ``phone://``, and further schemes by their entry points; return its directory."""
    metadata = folder / "phonebook-1.0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: phonebook\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{scheme} = {point}" for scheme, point in {"phone": f"{THIS}:opened", **points}.items()]
    metadata.joinpath("entry_points.txt").write_text(
        "\n".join(["[thresher.directories]", *lines, ""]), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(folder))
    directory._directory.cache_clear()
    book = Phonebook()
    _open.append(book)
    return book
