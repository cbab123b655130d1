"""A run's folder, read: its settings, its result, and its rows."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from thresher.deploy.report.rounds import Columns, fold, read_shards
from thresher.deploy.report.rows import Numbers
from thresher.deploy.report.steps import Printed, Worker, read_layer_sizes, read_printed, read_workers
from thresher.protos.accounting import compression_ratio
from thresher.protos.errors import ConfigurationError

_EVERYTHING: Final = {"compressor": "HardThreshold", "threshold": 0.0}  # what a baseline sends


@final
@dataclass(frozen=True, slots=True)
class Run:
    """All that a report shows of one run.

    Attributes:
        name: For people; no two runs of a report have the same.
        settings: ``launch.json``; empty where there is none.
        result: Its part of ``result.json``; None where there is none.
        shards: The rows of each shard, as `read_shards` returns them.
        rounds: The rounds that all shards have, as `fold` returns them.
        workers: By rank; none where they have written no rows.
        printed: By name; without those that were not printed.
        layer_sizes: Elements of each tensor of the model; none before it is saved.
        notices: What a reader has to know.
    """

    name: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any] | None
    shards: Mapping[int, Columns]
    rounds: Columns
    workers: Mapping[int, Worker]
    printed: Mapping[str, Printed]
    layer_sizes: Mapping[str, int]
    notices: tuple[str, ...]

    @property
    def moved(self) -> Numbers:
        """Bytes of both directions up to each round, that one included."""
        return np.cumsum(self.rounds["push_bytes"] + self.rounds["pull_bytes"])

    def number(self, name: str) -> float | None:
        """Return a number of the result; where there is no result, what the rounds say of it."""
        if self.result is None:
            return self._counted().get(name)
        value = self.result.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _counted(self) -> dict[str, float]:
        rounds = self.rounds
        pushable = int(rounds["pushable"].sum())
        return {
            **{name: float(printed.value[-1]) for name, printed in self.printed.items()},
            "steps": float(rounds["version"][-1]),
            "push_bytes": float(rounds["push_bytes"].sum()),
            "pull_bytes": float(rounds["pull_bytes"].sum()),
            "mean_density": float((rounds["pushed_elements"] * (rounds["only_mean"] == 0)).sum()) / max(1, pushable),
            "compression_ratio": compression_ratio(pushable, int(self.moved[-1])),
            "seconds": float(rounds["time"][-1] - rounds["time"][0]),
        }


def read_runs(folders: Sequence[Path], now: float | None = None) -> list[Run]:
    """Read runs, each with its dense baseline where it has one.

    Args:
        folders: Of the runs, in the order in which they are to be shown.
        now: Unix seconds, from which the age of what is still going is counted; the present by default.

    Raises:
        ConfigurationError: when a folder is none of a run, has no iterations yet, is named twice, or holds a file that
            cannot be read; the message says which, and what to do.
    """
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise ConfigurationError(f"{folder} is named twice, if under another name: name each run once")
    stamp = time.time() if now is None else now
    return [run for place, name in zip(places, _names(places), strict=True) for run in _stages(place, name, stamp)]


def _names(places: Sequence[Path]) -> list[str]:
    """Call each by the last part of its path, or by as many as it takes to tell all from each other."""
    for parts in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _stages(folder: Path, name: str, now: float) -> list[Run]:
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}: name one that thresher launch has made")
    settings, results = _document(folder / "launch.json"), _document(folder / "result.json")
    runs = [_run(folder, name, settings, results.get("sparse"), now)]
    dense = folder / "dense"
    if any(path.stat().st_size for path in _round_files(dense)):
        runs.append(_run(dense, f"{name}/dense", {**settings, "method": _EVERYTHING}, results.get("dense"), now))
    return runs


def _run(folder: Path, name: str, settings: Mapping[str, Any], result: Any, now: float) -> Run:  # noqa: ANN401 - JSON
    files = _round_files(folder)
    if not files:
        raise ConfigurationError(
            f"{folder} is no folder of a run: it has neither shard-N.iterations.jsonl nor iterations.jsonl; name one "
            "that thresher launch has made, or start thresher serve with --iterations FOLDER/shard-N.iterations.jsonl"
        )
    notices: list[str] = []
    shards = read_shards(files, notices)
    if not shards:
        raise ConfigurationError(
            f"{folder} has no iterations yet: {files[0].name} has no rows; wait until the first round has closed, or "
            "see in the logs there why none does"
        )
    rounds = fold(shards, notices)
    if not rounds["version"].size:
        raise ConfigurationError(f"{folder}: its shards have no iteration in common; are these files of one run?")
    if not isinstance(result, Mapping):
        result = None
        notices.insert(0, _unfinished(folder, settings, rounds, now))
    workers = read_workers(_files(folder, "worker"), notices)
    printed = read_printed(folder / "printed.jsonl", notices)
    sizes = read_layer_sizes(folder / "model.safetensors")
    return Run(name, settings, result, shards, rounds, workers, printed, sizes, tuple(notices))


def _round_files(folder: Path) -> list[Path]:
    """Return the shards' own files, else the merged one."""
    return _files(folder, "shard") or sorted(folder.glob("iterations.jsonl"))


def _files(folder: Path, role: str) -> list[Path]:
    """Return the files of all shards or workers: beside each other, or each in a folder of its own."""
    return sorted(folder.glob(f"{role}-*.iterations.jsonl")) or sorted(folder.glob(f"{role}-*/*iterations.jsonl"))


def _document(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no file."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; restore it, or move it away") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path} holds no JSON object; restore it, or move it away")
    return document


def _unfinished(folder: Path, settings: Mapping[str, Any], rounds: Columns, now: float) -> str:
    last, seen = rounds["version"][-1], rounds["time"][-1]
    until = f"up to iteration {last:.0f}, closed {datetime.fromtimestamp(seen, UTC):%Y-%m-%d %H:%M:%S} UTC"
    age = f"{max(0.0, now - seen):.0f} s before this report"
    if not settings:
        return f"It has no result.json, which thresher launch writes. What is shown is from its rows, {until} ({age})."
    return (
        f"It has no result: it is still going, or was stopped or killed. What is shown is what there is {until} "
        f"({age}). A run that has ended early goes on with: thresher launch --resume {folder}"
    )
