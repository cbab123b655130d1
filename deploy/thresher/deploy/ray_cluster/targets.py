"""Where Prometheus finds the endpoints of a run on Ray: a document of its service discovery, as a file or over HTTP."""

import json
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final, final

from thresher.deploy.discovery import target_groups
from thresher.deploy.ray_cluster.cluster import ShardStatus, status
from thresher.deploy.whole_files import write_whole
from thresher.protos.errors import ConfigurationError, ThresherError
from thresher.protos.transport import check_address

_logger = logging.getLogger(__name__)

_READER_SECONDS: Final = 10.0


def document(name: str, statuses: Sequence[ShardStatus]) -> list[dict[str, Any]]:
    """List the endpoints of the run ``name`` that are known now, with the labels that `thresher launch` gives them.

    A shard that does not answer has no address until it does, for it may come back at another one.

    Examples:
        >>> document("digits", [ShardStatus(0, "SERVING", "", "10.0.0.1", metrics_address="10.0.0.1:9100")])[0]
        {'targets': ['10.0.0.1:9100'], 'labels': {'job': 'thresher-shard', 'run': 'digits'}}
    """
    shards = [one.metrics_address for one in statuses if one.metrics_address]
    workers = sorted({address for one in statuses for address in one.worker_metrics})  # each shard knows all of them
    return target_groups(name, shards, workers)


def write(name: str, path: Path) -> None:
    """Write the document of the run ``name`` as it is now; whoever watches ``path`` sees the old one or the new one.

    Raises:
        ConfigurationError: when there is no such run, or ``path`` cannot be written.
    """
    text = _text(name)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the targets to {path}: {error}; name a file in a folder that is there"
        ) from error


@contextmanager
def serve(name: str, listen: str) -> Iterator[str]:
    """Answer every HTTP GET with the document of the run ``name`` as it is then, until the block ends.

    While the run cannot be asked the answer is 503, on which Prometheus keeps what it knows.

    Args:
        name: Of the run; it need not have begun.
        listen: ``host:port``; port 0 takes a free one.

    Yields:
        ``host:port`` where it listens.

    Raises:
        ConfigurationError: when the address is none, or taken.
    """
    check_address(listen, insecure=True)  # addresses are no secret
    host, _, port = listen.rpartition(":")
    try:
        server = _Server(name, host.strip("[]"), int(port))
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {listen} for the targets: the port is in use or the host is not here; choose another"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name=f"targets of {name}", daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _text(name: str) -> str:
    return json.dumps(document(name, status(name)))


@final
class _Server(HTTPServer):
    """Answers one request after the other: each asks all shards."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self.run = name
        self.address_family = socket.getaddrinfo(host, port, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), _Handler)


@final
class _Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = _READER_SECONDS  # for who connects and says nothing

    def do_GET(self) -> None:
        """Answer with the document."""
        assert isinstance(self.server, _Server)  # noqa: S101 - who else would ask
        try:
            self._answer(HTTPStatus.OK, "application/json", _text(self.server.run))
        except ThresherError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{error}\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as http.server has them
        """Keep quiet: requests come every minute."""
        _logger.debug(format, *args)

    def _answer(self, code: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
