"""What shards wrote: a row per round, as columns, and folded into rounds of the whole model."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np

from thresher.deploy.report.rows import Numbers, Sparse, read_rows
from thresher.protos.errors import ConfigurationError

Columns = Mapping[str, Numbers]
"""Columns of one length, by name."""

WHOLE: Final = -1
"""Stands for the shard where a file says of the whole model only."""

_SUMMED: Final = ("numel", "push_bytes", "pull_bytes", "pushed_elements", "update_elements", "residual_squared")
_OF_A_ROUND: Final = ("time", "version", "only_mean", *_SUMMED, "push_density")


def read_shards(files: Sequence[Path], notices: list[str]) -> dict[int, Columns]:
    """Read per-iteration files of shards, or a merged one.

    Returns:
        The rows of each shard, by its number; `WHOLE` alone for the merged file of a run in lockstep. Beside the
        fields there are ``contributors`` (how many), ``pushable`` (elements that they could have pushed) and, where
        the shard says it, ``wait R``: seconds that the push of rank R lay there until the round closed.

    Raises:
        ConfigurationError: when a file cannot be read, or holds what is no row, or rows of two runs.
    """
    shards: dict[int, Columns] = {}
    for path in files:
        for shard, columns in _shards_of(path, notices).items():
            if shard in shards:
                raise ConfigurationError(f"{path} has rows of shard {shard}, as another file: keep one of the two")
            if not (np.diff(columns["version"]) > 0).all():
                raise ConfigurationError(
                    f"{path}: the versions of shard {shard} do not grow from line to line; these are rows of more than "
                    "one run: move them into files of their own"
                )
            shards[shard] = columns
    return shards


def fold(shards: Mapping[int, Columns], notices: list[str]) -> Columns:
    """Fold the rows of all shards by version: counts and squares add up, times are those of the slowest shard.

    Rounds that not every shard has are left out, with a notice: those after the slowest, where a run is going.
    """
    common = reduce(np.intersect1d, (columns["version"] for columns in shards.values()))
    seen = reduce(np.union1d, (columns["version"] for columns in shards.values()))
    if common.size < seen.size:
        spans = ", ".join(f"shard {shard} {_span(columns['version'])}" for shard, columns in sorted(shards.items()))
        notices.append(
            f"{seen.size - common.size} iterations are left out of what is drawn over iterations: not every shard has "
            f"them ({spans})."
        )
    parts = [
        {name: column[np.searchsorted(columns["version"], common)] for name, column in columns.items()}
        for columns in shards.values()
    ]
    numel = sum(part["numel"] for part in parts)
    waits = sorted({name for part in parts for name in part if name.startswith("wait ")})
    return {
        **{name: np.asarray(sum(part[name] for part in parts)) for name in (*_SUMMED, "pushable")},
        **{name: parts[0][name] for name in ("version", "only_mean", "threshold")},
        **{name: np.fmax.reduce([part[name] for part in parts if name in part]) for name in waits},
        "time": np.maximum.reduce([part["time"] for part in parts]),
        "push_density": np.asarray(sum(part["push_density"] * part["numel"] for part in parts)) / numel,
        "update_density": np.asarray(sum(part["update_elements"] for part in parts)) / numel,
    }


def _shards_of(path: Path, notices: list[str]) -> dict[int, Columns]:
    contributors, waits = Sparse(), Sparse()

    def take(position: int, row: dict[str, Any]) -> None:
        contributors.put(position, "contributors", len(row["contributors"]))
        seconds = row.get("barrier_seconds")
        if seconds is not None:
            for rank, wait in zip(row["contributors"], seconds, strict=True):
                waits.put(position, f"wait {rank}", wait)

    rows = read_rows(path, _OF_A_ROUND, ("shard", "threshold"), take)
    if rows.is_torn:
        notices.append(f"The last line of {path.name} is not whole, and is left out.")
    length = rows.columns["version"].size
    if not length:
        return {}
    columns = {**rows.columns, **contributors.columns(length), **waits.columns(length)}
    columns["pushable"] = columns["numel"] * columns["contributors"] * (columns["only_mean"] == 0)
    of_shard = np.nan_to_num(columns["shard"], nan=WHOLE)
    return {
        int(shard): {name: column[of_shard == shard] for name, column in columns.items()}
        for shard in np.unique(of_shard)
    }


def _span(versions: Numbers) -> str:
    return f"{versions[0]:.0f} … {versions[-1]:.0f}"
