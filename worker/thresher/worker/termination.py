"""A spot notice: SIGTERM asks a worker to send what it has kept back with its next step, and to leave."""

import signal
import threading
from typing import Final, final

EXIT_STATUS: Final = 128 + signal.SIGTERM


@final
class Termination:
    """Hears SIGTERM. A second one ends the process at once.

    Attributes:
        noticed: True once it has come.
    """

    def __init__(self) -> None:
        """Begin deaf."""
        self.noticed = False

    def listen(self) -> None:
        """Take over SIGTERM, unless the script has a handler of its own, or this is not the main thread."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._heard)

    def ignore(self) -> None:
        """Give SIGTERM back its usual effect, if it was taken over here."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == self._heard:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _heard(self, *_: object) -> None:
        if self.noticed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self.noticed = True
