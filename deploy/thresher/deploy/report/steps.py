"""What workers wrote and printed: seconds of each step, what of each layer was pushed, loss and accuracy."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from safetensors import SafetensorError, safe_open

from thresher.deploy.report.rounds import Columns
from thresher.deploy.report.rows import Numbers, Sparse, read_rows

_OF_A_STEP: Final = ("rank", "version", "compute_seconds", "compress_seconds", "exchange_seconds")
_EVALUATED: Final = "loss of an evaluation"


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """The rows of one worker.

    Attributes:
        columns: ``version`` of the model after each step, and where its seconds went, [steps] each.
        layer_versions: The versions whose rows say what of each tensor was pushed, [rows].
        layers: Elements pushed, by tensor, [rows] each; NaN where a row has none of that name.
    """

    columns: Columns
    layer_versions: Numbers
    layers: Columns


@final
@dataclass(frozen=True, slots=True)
class Printed:
    """What rank 0 printed under one name: Unix seconds and values, [n] each."""

    time: Numbers
    value: Numbers


def read_workers(files: Sequence[Path], notices: list[str]) -> dict[int, Worker]:
    """Read the files of workers, by rank.

    Raises:
        ConfigurationError: when one cannot be read, or holds what is no row.
    """
    workers = [worker for path in files if (worker := _worker(path, notices)) is not None]
    return {int(worker.columns["rank"][0]): worker for worker in workers}


def _worker(path: Path, notices: list[str]) -> Worker | None:
    versions, layers = array("d"), Sparse()

    def take(_: int, row: dict[str, Any]) -> None:
        if row.get("layers") is not None:
            for name, pushed in row["layers"].items():
                layers.put(len(versions), name, pushed)
            versions.append(row["version"])

    rows = read_rows(path, _OF_A_STEP, take=take)
    if rows.is_torn:
        notices.append(f"The last line of {path.name} is not whole, and is left out.")
    if not rows.columns["rank"].size:
        return None
    return Worker(rows.columns, np.array(versions), layers.columns(len(versions)))


def read_printed(path: Path, notices: list[str]) -> dict[str, Printed]:
    """Read what rank 0 printed: ``loss`` and ``accuracy``, where they are numbers, whatever else a script says there.

    A loss beside an accuracy is that of an evaluation: it is no point of the curve of those that were printed without,
    and taken only where there are no others.

    Raises:
        ConfigurationError: when it cannot be read, or a line is no JSON object with a time.
    """
    if not path.exists():
        return {}
    found: dict[str, tuple[list[float], list[float]]] = {}

    def take(_: int, row: dict[str, Any]) -> None:
        numbers = {name: float(row[name]) for name in ("loss", "accuracy") if _is_number(row.get(name))}
        for name, value in numbers.items():
            times, values = found.setdefault(_EVALUATED if name == "loss" and "accuracy" in numbers else name, ([], []))
            times.append(float(row["time"]))
            values.append(value)

    if read_rows(path, ("time",), take=take).is_torn:
        notices.append(f"The last line of {path.name} is not whole, and is left out.")
    evaluated = found.pop(_EVALUATED, None)
    if evaluated is not None:
        found.setdefault("loss", evaluated)
    return {name: Printed(np.array(times), np.array(values)) for name, (times, values) in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_layer_sizes(path: Path) -> Mapping[str, int]:
    """Return how many elements each tensor of a saved model has; none where there is no model, or it is not whole."""
    try:
        with safe_open(path, framework="numpy") as model:
            return {name: int(np.prod(model.get_slice(name).get_shape())) for name in model.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}
