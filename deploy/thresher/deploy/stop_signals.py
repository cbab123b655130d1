"""SIGINT and SIGTERM to a launcher: heard at any time, raised where it can be borne."""

import os
import signal
import time
from types import FrameType
from typing import Self, final

from thresher.protos.errors import ThresherError


class StopRequestedError(ThresherError, RuntimeError):
    """The user or the system asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        """Remember the signal's number."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@final
class StopSignals:
    """Hears SIGINT and SIGTERM. The first is remembered and raised by the next `pause`; a second one ends at once.

    Raising in the handler itself would strike anywhere, also where an exception is swallowed.
    """

    def __init__(self) -> None:
        """Hear nothing yet: entering the block begins."""
        self._number: int | None = None

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pause(self, seconds: float) -> None:
        """Sleep. Raises StopRequestedError as soon as a signal has come."""
        end = time.monotonic() + seconds
        while self._number is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        if self._number is not None:
            raise StopRequestedError(self._number)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            os._exit(128 + number)  # the shards see their standard input close and end; the tether ends the workers
        self._number = number
