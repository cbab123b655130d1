"""Processes that are started again when something killed them."""

import logging
import signal
from collections.abc import Callable
from typing import Final, final

from thresher.deploy.processes import Child

_logger = logging.getLogger(__name__)

_LEFT: Final = 128 + signal.SIGTERM  # a worker that was asked to end has sent what it kept back, and left


@final
class Supervised:
    """One shard or worker through all its lives.

    What a signal ended (kill -9, a segmentation fault, the kernel out of memory) is started again, each time after a
    pause twice as long. What ended by itself is not: it would do so again.

    Args:
        name: For people: ``worker 2``.
        start: Begins a life.
        restarts: How many lives may follow the first.
        delay: Seconds before the second one.
        longest: Seconds to which that grows.
        may_end: It may end well, by itself; a shard may not.

    Attributes:
        child: The newest life.
        restarts: How many lives have followed the first.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Child],
        *,
        restarts: int,
        delay: float,
        longest: float,
        may_end: bool = True,
    ) -> None:
        """Begin the first life."""
        self.name = name
        self._start, self._limit, self._may_end = start, restarts, may_end
        self._delay, self._longest = delay, longest
        self._due: float | None = None
        self._over = False
        self.restarts = 0
        self.child = start()

    @property
    def is_done(self) -> bool:
        """True when it has ended well."""
        return self._over or (self._may_end and self.child.code in (0, _LEFT))

    @property
    def has_failed(self) -> bool:
        """True when it has ended, and neither well nor so that another life would help."""
        code = self.child.code
        if code is None or self.is_done:
            return False
        return code >= 0 or (self._due is None and self.restarts >= self._limit)

    def tend(self, now: float, is_over: Callable[[], bool | None]) -> None:
        """Begin another life, if a signal ended the last one and the pause is over.

        Args:
            now: Seconds, from any origin.
            is_over: Asked before that: True when nothing is left for another life to do; None when that cannot be known
                yet, and then the next call asks again.
        """
        code = self.child.code
        if code is None or code >= 0 or self._over or self.has_failed:
            return
        if self._due is None:
            pause = min(self._delay * 2.0 ** min(self.restarts, 32), self._longest)
            self._due = now + pause
            _logger.warning("%s: %s; started again in %.1f s", self.name, self.child.ending(), pause)
        if now < self._due:
            return
        over = is_over()
        if over is None:
            return
        self.child.finish()
        if over:
            self._over = True
            _logger.warning("%s had left the run: it is not started again", self.name)
            return
        self.child, self._due = self._start(), None
        self.restarts += 1
        _logger.warning("%s is started again (%d of %d)", self.name, self.restarts, self._limit)

    def ending(self) -> str:
        """Say how it ended: ``signal SIGKILL, after 3 restarts``."""
        lives = f", after {self.restarts} restart{'s' * (self.restarts > 1)}" if self.restarts else ""
        return self.child.ending() + lives
