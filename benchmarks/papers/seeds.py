"""What runs that differ in nothing but their seed come to: mean and spread."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from benchmarks.papers.recipe import Form, Row

PILOT = 100
"""The seed of the runs that choose settings; no result is taken from them."""


def seeds(form: Form) -> range:
    """Of the deep recipes: one, or three as in paper 1."""
    return range(1 if form == "short" else 3)


class Spread(NamedTuple):
    """Mean and standard deviation (over n - 1; 0 if there is but one) of a column, and of how many rows."""

    mean: float
    deviation: float
    number: int


def final(rows: Sequence[Row]) -> list[Row]:
    """The last row of each run.

    The columns before ``round`` name the run, and its rows follow one another, ``round`` ever larger.
    """
    return [row for row, following in pairwise(rows) if not _goes_on(row, following)] + list(rows[-1:])


def over_seeds(rows: Iterable[Row], column: str, *, by: Sequence[str]) -> dict[tuple[str | float, ...], Spread]:
    """The spread of ``column`` over the rows that are alike in the columns ``by``; keys are the values of those.

    A NaN, of a run that diverged, makes the mean NaN.
    """
    groups: defaultdict[tuple[str | float, ...], list[float]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in by)].append(float(row[column]))
    return {key: _spread(group) for key, group in groups.items()}


def _spread(values: Sequence[float]) -> Spread:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), deviation, len(values))


def _goes_on(row: Row, following: Row) -> bool:
    return _run_of(row) == _run_of(following) and float(row["round"]) < float(following["round"])


def _run_of(row: Row) -> list[str | float]:
    """What names its run."""
    columns = list(row)
    return [row[name] for name in columns[: columns.index("round")]]
