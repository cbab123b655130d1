"""How a worker's process ends: by SIGTERM, a spot notice; at the end of its script; or by an exception."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final, final

from thresher.protos.errors import ThresherError

_logger = logging.getLogger(__name__)

EXIT_STATUS: Final = 128 + signal.SIGTERM


def failure(error: BaseException | None) -> str | None:
    """Say what failed; None where nothing did, as after ``sys.exit(0)``."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return None
    return f"{type(error).__name__}: {error}"


@final
class Termination:
    """Hears that the process is to end, or ends.

    SIGTERM asks a worker to send what it has kept back with its next step, and to leave. A second one ends the process
    at once; so does the first one in a process that was forked from this one.

    Args:
        leave: Called at the end of the script, with the exception that has ended it, if one has.

    Attributes:
        noticed: True once SIGTERM has come.
    """

    def __init__(self, leave: Callable[[BaseException | None], None]) -> None:
        """Begin deaf."""
        self._leave = leave
        self.noticed = False
        self._process = 0
        self._earlier: object = None
        self._thread = threading.current_thread()

    def listen(self) -> None:
        """Wait for the end; take over SIGTERM, unless the script has a handler, or this is not the main thread."""
        self._process, self._earlier = os.getpid(), getattr(sys, "last_value", None)
        self._thread = threading.current_thread()
        atexit.register(self.at_exit)
        main = self._thread is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._heard)

    def ignore(self) -> None:
        """Wait no longer; give SIGTERM back its usual effect, if it was taken over here."""
        atexit.unregister(self.at_exit)
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == self._heard:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def at_exit(self) -> None:
        """Leave; an exception that a notebook's cell had left before `listen` has not ended the script.

        A process may also end around a thread that is in the middle of its loop, as that of an actor whose owner is
        gone. That worker has not left: it is lost, and its next life goes on with its memory.
        """
        if self._thread is not threading.main_thread() and self._thread.is_alive():
            return
        error = getattr(sys, "last_value", None)
        try:
            self._leave(None if error is self._earlier else error)
        except ThresherError as failed:
            _logger.error("%s", failed)  # noqa: TRY400 - it says all; a traceback of the exit would not help

    def _heard(self, *_: object) -> None:
        if self.noticed or os.getpid() != self._process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self.noticed = True
