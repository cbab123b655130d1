"""What a message takes beyond its bytes at the full rate, on a link that was idle while workers computed."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from thresher.deploy.advise.samples import Sample, drawn, exactly


@final
@dataclass(frozen=True, slots=True)
class Delay:
    """Measured for messages of a few sizes, in one direction.

    Attributes:
        sizes: Bytes to or from all shards together, ascending from 0 on.
        seconds: For each, what it took beyond a round trip and its bytes over the rate of the link; below 0 where it
            took less, because a link let it pass at once.
    """

    sizes: tuple[int, ...]
    seconds: tuple[Sample, ...]

    def drawn(self, size: int, count: int, generator: np.random.Generator) -> Sample:
        """Return what a message of ``size`` bytes may take, [count]: in between sizes on a line, and then constant.

        Source: a connection that has come up to speed stays there, so what that took is paid once a message.
        """
        above = bisect_right(self.sizes, size)
        below = drawn(self.seconds[above - 1], count, generator)
        if above == len(self.sizes):
            return below
        part = (size - self.sizes[above - 1]) / (self.sizes[above] - self.sizes[above - 1])
        return (1 - part) * below + part * drawn(self.seconds[above], count, generator)


NO_DELAY: Final = Delay((0,), (exactly(0.0),))
"""Of a link that somebody describes."""
