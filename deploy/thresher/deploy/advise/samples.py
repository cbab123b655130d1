"""A quantity that was measured several times."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Sample: TypeAlias = npt.NDArray[np.float64]
"""What the repetitions of one measurement came to, [repetitions] float64, at least one."""


def exactly(value: float) -> Sample:
    """Return the sample of what is known without measuring."""
    return np.array([value])


def middle(sample: Sample) -> float:
    """Return its median.

    >>> middle(np.array([3.0, 1.0, 50.0]))
    3.0
    """
    return float(np.median(sample))


def drawn(sample: Sample, count: int | tuple[int, int], generator: np.random.Generator) -> Sample:
    """Return ``count`` of the repetitions, drawn with replacement: what the quantity may be, as far as that is known.

    Source: the bootstrap, Efron, "Bootstrap methods: another look at the jackknife", doi:10.1214/aos/1176344552.
    """
    return generator.choice(sample, count)
