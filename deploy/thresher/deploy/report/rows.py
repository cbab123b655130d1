"""The lines of a run's files as columns, read one by one: a file may be longer than its rows would fit in memory."""

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from thresher.protos.errors import ConfigurationError

Numbers = NDArray[np.float64]
"""A column."""

_decode: Final = json.JSONDecoder().decode  # `json.loads` would look for the encoding of each line

Take = Callable[[int, dict[str, Any]], None]
"""Takes what no column holds of a row: its position from 0, and the row."""


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one file.

    Attributes:
        path: Where they are from.
        columns: By field, all of one length; NaN where a field that may be null is.
        is_torn: The last line was not whole, as a kill leaves it, or a writer that is at work.
    """

    path: Path
    columns: Mapping[str, Numbers]
    is_torn: bool


def read_rows(path: Path, numbers: Sequence[str], nullable: Sequence[str] = (), take: Take | None = None) -> Rows:
    """Read a file of JSON objects, one a line. Fields that are not asked for are passed over.

    Args:
        path: The file.
        numbers: Fields that each row has, numbers all.
        nullable: Fields that may be null, or missing.
        take: Is shown each row, for all else; a KeyError, TypeError or ValueError that it raises says: this is no row.

    Raises:
        ConfigurationError: when it cannot be read, or a line is no such row; it names the file and the line.
    """
    columns = {name: array("d") for name in (*numbers, *nullable)}
    required = [(name, columns[name].append) for name in numbers]
    optional = [(name, columns[name].append) for name in nullable]
    is_torn = False
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = _parsed(line)
                if row is None:
                    is_torn = True
                    break
                for name, append in required:
                    append(row[name])
                for name, append in optional:
                    value = row.get(name)
                    append(np.nan if value is None else value)
                if take is not None:
                    take(number - 1, row)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise _no_row(path, number, f"the field {error} is missing") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _no_row(path, number, str(error)) from None
    return Rows(path, {name: np.frombuffer(column) for name, column in columns.items()}, is_torn)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the row; None for the torn end of a file. Raises ValueError for a whole line that is none."""
    try:
        row: dict[str, Any] = _decode(line.decode())
    except ValueError:
        if line.endswith(b"\n"):
            raise
        return None
    return row


def _no_row(path: Path, line: int, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path}, line {line} is no row that this version of Thresher knows: {why}; report on it with the version that "
        "wrote it, or move the file away"
    )


@final
class Sparse:
    """Columns that come up while rows are read, and that not each row has a value of: NaN there.

    >>> waits = Sparse()
    >>> waits.put(1, "rank 0", 0.5)
    >>> waits.columns(3)
    {'rank 0': array([nan, 0.5, nan])}
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._columns: dict[str, array[float]] = {}

    def put(self, position: int, name: str, value: float) -> None:
        """Set the value of a row: positions only grow."""
        column = self._columns.setdefault(name, array("d"))
        _fill(column, position)
        column.append(value)

    def columns(self, length: int) -> dict[str, Numbers]:
        """Return all, each of ``length``."""
        for column in self._columns.values():
            _fill(column, length)
        return {name: np.frombuffer(column) for name, column in self._columns.items()}


def _fill(column: "array[float]", length: int) -> None:
    if len(column) < length:
        column.extend([np.nan] * (length - len(column)))
