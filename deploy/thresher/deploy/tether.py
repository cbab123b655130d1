"""Ends worker processes when their launcher is gone, whatever ended it.

A launcher that was killed cannot end anything. So it starts one small process more, whose standard input closes with
the launcher, and which then kills the process groups that it was told of.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, cast, final


@final
class Tether:
    """The launcher's end of the tether. Use as a context manager: at its end whatever is still held is killed."""

    def __init__(self) -> None:
        """Start the process; only the standard library is imported in it, from this very file."""
        self._process = subprocess.Popen(
            [sys.executable, "-IS", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._said = cast("IO[bytes]", self._process.stdin)

    def __enter__(self) -> "Tether":
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._said.close()
        self._process.wait()

    def hold(self, group: int) -> None:
        """From now on this process group ends when the launcher does."""
        self._say(f"+{group}\n")

    def let_go(self, group: int) -> None:
        """It has ended; its number may be somebody else's soon."""
        self._say(f"-{group}\n")

    def _say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # whoever killed the tether wanted it so
            self._said.write(line.encode())
            self._said.flush()


def watch(lines: Iterable[str]) -> None:
    """Listen until the lines end, then kill what is held."""
    held: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line[0] == "+":
            held.add(group)
        else:
            held.discard(group)
    for group in held:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
