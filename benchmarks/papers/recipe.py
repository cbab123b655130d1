"""A recipe: one figure or table of a paper, made of independent runs whose rows make up one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, final

from matplotlib.figure import Figure

Form = Literal["short", "full"]
"""How long the runs are: all recipes together in 20 minutes on two cores, or as long as the figure needs."""

Row = dict[str, str | int | float]
"""One line of a CSV: its columns by name, those that say which run it is of first."""


class Oracle(TypedDict):
    """A number that is known beforehand, beside the one that came out; ok if they are within the tolerance."""

    name: str
    expected: float
    tolerance: float
    measured: float
    ok: bool


def oracle(name: str, measured: float, *, expected: float, tolerance: float) -> Oracle:
    """The number ``measured`` against ``expected``, ± ``tolerance`` in the same unit."""
    ok = abs(measured - expected) <= tolerance
    return Oracle(name=name, expected=expected, tolerance=tolerance, measured=measured, ok=ok)


def oracle_at_most(name: str, measured: float, *, most: float) -> Oracle:
    """The number ``measured``, which is at least 0 and has to be ``most`` at most: half of it ± half of it."""
    return oracle(name, measured, expected=most / 2, tolerance=most / 2)


def no_oracles(rows: Sequence[Row]) -> list[Oracle]:
    """For a recipe of which no number is known beforehand."""
    del rows
    return []


@final
@dataclass(frozen=True)
class Recipe:
    """What is run, drawn and checked for one figure or table.

    Args:
        name: of its files: results/NAME.csv, results/NAME.json and docs/images/papers-NAME.png.
        shows: which figure or table of which paper it repeats.
        cells: the form → its runs: frozen dataclasses of plain values. Equal cells give equal rows; the longest first,
            since several are run at a time.
        run: one of the cells → its rows. It runs in a process of its own, on one core, and draws random numbers only
            from generators it seeds itself.
        draw: all rows, in the order of the cells → the figure.
        oracles: all rows → what is known beforehand.
    """

    name: str
    shows: str
    cells: Callable[[Form], Sequence[Any]]
    run: Callable[[Any], list[Row]]
    draw: Callable[[list[Row]], Figure]
    oracles: Callable[[Sequence[Row]], list[Oracle]] = no_oracles
