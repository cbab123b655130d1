"""A real Prometheus for a test: its data in a folder of the test, at a port of its own."""

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`; skip where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return path


class Prometheus:
    """A server with the configuration ``prometheus.yml`` of a folder."""

    def __init__(self, folder: Path, configuration: str) -> None:
        """Start it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        path = folder / "prometheus.yml"
        path.write_text(configuration, encoding="utf-8")
        self._log = (folder / "prometheus.log").open("wb")
        command = [
            program("prometheus"),
            f"--config.file={path}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
        ]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query; none while the server is starting.

        Raises:
            AssertionError: when the query is refused, with what Prometheus says of it.
        """
        address = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return list(json.load(answer)["data"]["result"])
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return []
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        except OSError:
            return []

    def query(self, expression: str) -> float | None:
        """Return the value of an instant query's first series, None while there is none."""
        found = self.ask(expression)
        return float(found[0]["value"][1]) if found else None

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()
