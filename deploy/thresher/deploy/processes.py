"""Child processes: started, listened to, ended. Nothing they start outlives the launcher."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, cast, final

_TERMINATE_SECONDS: Final = 5.0


@final
class Child:
    """One process. Everything it prints goes to ``log``; a line that is a JSON object is also kept as data.

    It gets a session of its own, so that Ctrl-C reaches the launcher only, which then ends its children in order, and
    a pipe as standard input, whose end tells it that the launcher is gone.

    Args:
        name: For people: ``worker 2``.
        command: What to run.
        environment: Its variables.
        log: Where its output goes.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it."""
        self.name, self.log = name, log
        self.data: dict[str, Any] = {}  # the union of all data lines, the latest value of each key
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._output = cast("IO[bytes]", self._process.stdout)
        log.touch()
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._reader.start()

    @property
    def code(self) -> int | None:
        """Exit code; negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal to the process and everything it started."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it has ended, and so has its group

    def finish(self) -> None:
        """Wait for the last of its output, after it has ended."""
        self._process.wait()
        self.signal(signal.SIGKILL)  # what it may have left running, such as data loaders
        self._reader.join(timeout=_TERMINATE_SECONDS)  # a stray grandchild may hold the pipe open for longer
        cast("IO[bytes]", self._process.stdin).close()

    def last_lines(self, count: int = 30) -> str:
        """Return the end of its output."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])

    def ending(self) -> str:
        """Say how it ended: ``exit code 1``, ``signal SIGKILL``."""
        code = self.code
        if code is None:
            return "still running"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def _read(self) -> None:
        with self._output, self.log.open("wb", buffering=0) as log:
            for line in self._output:
                log.write(line)
                if line.startswith(b"{"):
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            return  # a line that merely begins like data
        self.data = {**self.data, **values}  # a new one, for whoever is reading the old one


def end_all(children: Sequence[Child], *, patience: float = _TERMINATE_SECONDS) -> None:
    """Ask all children to end, insist after ``patience`` seconds, and wait until they have."""
    for child in children:
        if child.code is None:
            child.signal(signal.SIGTERM)
    deadline = time.monotonic() + patience
    while any(child.code is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        if child.code is None:
            child.signal(signal.SIGKILL)
        child.finish()
