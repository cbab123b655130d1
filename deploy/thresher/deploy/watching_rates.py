"""How fast counters move: differences between looks, by the clock of whoever looks."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, final

from thresher.v1 import aggregation_pb2 as pb

KEPT: Final = 240
"""Looks at which iterations were seen that are remembered: four minutes of one a second."""

_LATE: Final = 10.0  # times the usual
_LEVELS: Final = "▁▂▃▄▅▆▇█"


@final
@dataclass(frozen=True, slots=True)
class Rates:
    """What a shard does at the moment. Means are over the iterations between the last two looks that saw any.

    Attributes:
        up: Bytes per iteration from all workers; None before an iteration was seen.
        down: Bytes per iteration to all workers; likewise.
        per_second: Iterations per second; 0 when they are late, None before two looks saw some.
        age: Seconds since a look saw an iteration, or since the first look.
        is_late: The age is more than ten times the median time of an iteration.
    """

    up: float | None = None
    down: float | None = None
    per_second: float | None = None
    age: float = 0.0
    is_late: bool = False


@final
class Pace:
    """Follows the counters of one shard.

    A shard that was started again goes on with its counters or begins them anew; in the latter case the difference is
    unknown, and none is taken. So no rate is ever negative.
    """

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._then: tuple[int, int, int] | None = None
        self._begin: float | None = None
        self._changed: float | None = None  # when iterations were last seen
        self._up: float | None = None
        self._down: float | None = None
        self._per_second: float | None = None
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self.history: deque[float] = deque(maxlen=KEPT)
        """Bytes per iteration, both directions, the latest last."""

    def see(self, shard: pb.StatisticsResponse | None, now: float) -> Rates:
        """Take what a look has found.

        Args:
            shard: The counters; None when it did not answer.
            now: Of a clock that does not go back, in seconds.
        """
        if self._begin is None:
            self._begin = now
        if shard is not None:
            self._count(shard, now)
        age = now - (self._begin if self._changed is None else self._changed)
        late = bool(self._seconds) and age > _LATE * median(self._seconds)
        return Rates(self._up, self._down, 0.0 if late else self._per_second, age, late)

    def _count(self, shard: pb.StatisticsResponse, now: float) -> None:
        counters = (
            shard.version,
            sum(worker.push_bytes for worker in shard.workers),
            sum(worker.pull_bytes for worker in shard.workers),
        )
        then, self._then = self._then, counters
        if then is None or counters[0] == then[0]:
            return
        last, self._changed = self._changed, now
        iterations, up, down = (new - old for new, old in zip(counters, then, strict=True))
        if min(iterations, up, down) < 0:
            return
        self._up, self._down = up / iterations, down / iterations
        self.history.append((up + down) / iterations)
        if last is not None and now > last:  # the first ones began nobody knows when
            self._per_second = iterations / (now - last)
            self._seconds.append((now - last) / iterations)


def total(shards: Sequence[Rates]) -> Rates:
    """Return the rates of a run: bytes over all shards, and the pace of the one that is furthest behind."""
    ups, downs = [one.up for one in shards if one.up is not None], [one.down for one in shards if one.down is not None]
    paces = [one.per_second for one in shards if one.per_second is not None]
    return Rates(
        sum(ups) if ups else None,
        sum(downs) if downs else None,
        min(paces, default=None),
        max((one.age for one in shards), default=0.0),
        any(one.is_late for one in shards),
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the last ``width`` values as bars from zero to the largest of them.

    >>> sparkline([0, 1, 2, 4], 8)
    '▁▃▅█'
    """
    shown = values[-width:]
    most = max(shown, default=0.0)
    return "".join(_LEVELS[min(7, int(8 * value / most))] if most > 0 else _LEVELS[0] for value in shown)
