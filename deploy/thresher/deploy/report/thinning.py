"""Long series as few points that hide nothing: the mean of each stretch, between its least and its largest value."""

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from thresher.deploy.report.rows import Numbers

POINTS: Final = 200
"""Of one curve, at most: two in a panel are a few pixels apart, and the line stays a line."""


@final
@dataclass(frozen=True, slots=True)
class Thinned:
    """A series by stretches, [points] each.

    Attributes:
        x: The mean place of a stretch.
        mean: The mean of its values.
        least: The least of them.
        most: The largest.
    """

    x: Numbers
    mean: Numbers
    least: Numbers
    most: Numbers


def thin(x: Numbers, y: Numbers, points: int = POINTS) -> Thinned:
    """Average over stretches of equal length (to one value); a series that is short enough stays as it is.

    Args:
        x: Where the values are, [n].
        y: The values, [n]; those that are not finite are left out.
        points: Stretches, at most.
    """
    is_finite = np.isfinite(y)
    x, y = x[is_finite], y[is_finite]
    if not y.size:
        return Thinned(y, y, y, y)
    starts = stretches(y.size, points)
    counts = np.diff([*starts, y.size])
    return Thinned(
        np.add.reduceat(x, starts) / counts,
        np.add.reduceat(y, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )


def thin_growing(x: Numbers, y: Numbers, points: int = POINTS) -> Thinned:
    """Take the ends of the stretches of a series that only grows: nothing is hidden between two of them."""
    ends = np.append(stretches(y.size, points)[1:], y.size) - 1 if y.size else np.arange(0)
    return Thinned(x[ends], y[ends], y[ends], y[ends])


def stretches(length: int, points: int) -> NDArray[np.intp]:
    """Return where at most ``points`` stretches of ``length`` values begin."""
    return np.linspace(0, length, min(length, points), endpoint=False).astype(np.intp)
