"""Child processes: started, listened to, ended. Nothing they start outlives the launcher."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, cast, final

_TERMINATE_SECONDS: Final = 5.0


@final
class Child:
    """One process. Everything it prints is added to ``log``; a line that is a JSON object is also kept as data.

    It gets a session of its own, so that Ctrl-C reaches the launcher only, which then ends its children in order, and
    a pipe as standard input, whose end tells it that the launcher is gone.

    Args:
        name: For people: ``worker 2``.
        command: What to run.
        environment: Its variables.
        log: Where its output goes.
        directory: Where it is started.
        data: What an earlier life has printed.
        printed: File that data lines are added to, each with its ``time`` in Unix seconds; None for none.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        directory: Path | None = None,
        data: Mapping[str, Any] | None = None,
        printed: Path | None = None,
    ) -> None:
        """Start it."""
        self.name, self.log, self._printed = name, log, printed
        self.data: dict[str, Any] = dict(data or {})  # the union of all data lines, the latest value of each key
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=directory,
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
        missing = 0
        with self._output, self.log.open("ab", buffering=0) as log:
            for line in self._output:
                try:
                    if missing:
                        log.write(b"[%d lines are missing here: the disk was full]\n" % missing)
                        missing = 0
                    log.write(line)
                except OSError:  # who stopped reading would end the child, at the next line that it prints
                    missing += 1
                if line.startswith(b"{"):
                    self._take(line)

    def _take(self, line: bytes) -> None:
        values = _values(line)
        self.data = {**self.data, **values}  # a new one, for whoever is reading the old one
        if self._printed is not None and values:
            with suppress(OSError):  # a full disk
                _append(self._printed, json.dumps({**values, "time": time.time()}).encode() + b"\n")


def printed_data(log: Path) -> dict[str, Any]:
    """Return the data that is in a log: what the lives of a process have printed so far."""
    lines = log.read_bytes().splitlines() if log.exists() else []
    return {key: value for line in lines if line.startswith(b"{") for key, value in _values(line).items()}


def _values(line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}  # a line that merely begins like data


def _append(path: Path, line: bytes) -> None:
    """Add a line whole, or leave the file as it was."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):
            file.truncate(size)


@final
class ReservedPort:
    """A port of this machine that is kept for processes which come and go.

    A socket that is bound and never listens keeps everybody else from being given the port, also the workers who look
    for their shard there, while a server of ours may listen on it. Close it in the end.

    Attributes:
        address: ``127.0.0.1:port``.
    """

    def __init__(self) -> None:
        """Find a free one."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: else it were taken
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Give it back."""
        self._socket.close()


def kill_all(children: Sequence[Child]) -> None:
    """End all children at once, and wait until they have."""
    for child in children:
        child.signal(signal.SIGKILL)
    for child in children:
        child.finish()


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
