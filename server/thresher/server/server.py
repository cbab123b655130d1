"""One shard as a gRPC server: the parts, created in order and ended in reverse."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, start_http_server

from thresher.protos.credentials import TlsFiles
from thresher.protos.errors import ConfigurationError
from thresher.protos.faults import reached
from thresher.protos.transport import SERVER_OPTIONS, check_address
from thresher.server.authorization import Gatekeeper, Tokens
from thresher.server.config import ShardConfig
from thresher.server.engine import Engine
from thresher.server.events import IterationRow
from thresher.server.iterations import IterationFile
from thresher.server.journal import Journal
from thresher.server.metrics import ShardMetrics
from thresher.server.recovery import Recovery
from thresher.server.servicer import AggregationServicer
from thresher.server.shard import Shard
from thresher.server.statistics import ShardStatistics
from thresher.v1.aggregation_pb2 import DESCRIPTOR
from thresher.v1.aggregation_pb2_grpc import add_AggregationServiceServicer_to_server

_logger = logging.getLogger(__name__)

SERVICE = DESCRIPTOR.services_by_name["AggregationService"].full_name


@final
@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How one shard is served.

    Attributes:
        shard: What the shard is told.
        listen: ``host:port``; port 0 takes a free one.
        metrics_listen: ``host:port`` of the Prometheus endpoint; None serves none.
        iterations: Where the per-iteration file goes; None writes none.
        state_dir: Where the journal lies; None keeps everything in memory, and ends with the process.
        sync: Each record is on the disk itself before anybody is told: it survives the machine, not only the process.
        checkpoints: How many are kept.
        insecure: Plain text beyond this machine is fine.
        per_worker_metrics: Give each worker a label of its own.
        tls: The shard's certificate with its key; with ``ca``, callers show certificates too. None is plain text.
        tokens: File of the tokens that callers may show, in lines of role and token; None asks for none.

    Raises:
        ConfigurationError: when TLS has no certificate for the shard, or nothing to know callers by.
    """

    shard: ShardConfig
    listen: str = "127.0.0.1:0"
    metrics_listen: str | None = None
    iterations: Path | None = None
    state_dir: Path | None = None
    sync: bool = False
    checkpoints: int = 3
    insecure: bool = False
    per_worker_metrics: bool = True
    tls: TlsFiles | None = None
    tokens: Path | None = None

    def __post_init__(self) -> None:
        """Check what must go together before anything is opened."""
        if self.tls is None:
            return
        if self.tls.certificate is None:
            raise ConfigurationError("a shard that speaks TLS shows a certificate; name --tls-cert and --tls-key")
        if self.tls.ca is None and self.tokens is None:
            raise ConfigurationError(
                "the traffic would be encrypted, but anybody could call; name the authority of the callers' "
                "certificates (--tls-ca), a file of tokens (--tokens), or both"
            )


@final
class ShardServer:
    """Serves one shard until it is stopped. Belongs to one asyncio loop, but for `statistics`."""

    def __init__(self, config: ServerConfig) -> None:
        """Build the parts; `start` opens the port.

        Raises:
            ConfigurationError: when the address is none, plain text would leave this machine unasked, or the tokens
                cannot be read.
            JournalError: when the state folder cannot be used.
            DataLossError: when what it holds is damaged, or belongs to another shard.
        """
        check_address(config.listen, insecure=config.insecure, encrypted=config.tls is not None)
        if config.metrics_listen is not None:
            check_address(config.metrics_listen, insecure=True)  # Prometheus reads from elsewhere; it is no secret
        self._config = config
        self._tokens = None if config.tokens is None else Tokens.read(config.tokens)
        shard = replace(config.shard, run=secrets.randbits(63) | 1)
        self._rows: list[Callable[[IterationRow], None]] = []
        self._iterations: IterationFile | None = None
        self._metrics_server: WSGIServer | None = None
        self._registry: CollectorRegistry | None = None
        self._journal = None
        if config.state_dir is not None:
            half = partial(reached, f"shard {shard.shard}", "append")
            self._journal = Journal(config.state_dir, keep=config.checkpoints, sync=config.sync, between=half)
        try:
            self._recovery = None if self._journal is None else Recovery(self._journal, shard)
        except BaseException:
            self._close_journal()
            raise
        state = None if self._recovery is None else self._recovery.state
        name, patience = f"shard {shard.shard}", shard.round_timeout
        self._engine = Engine(Shard(shard, state), name, self._record, self._journal, patience)
        self._servicer = AggregationServicer(self._engine, shard)
        if state is not None and state.opened is not None:
            _logger.info("shard %d goes on at version %d", shard.shard, state.version)
            self._servicer.recover(state.opened.registration.layout, seeded=state.replica is not None)
        self._servicer.on_failure = self._not_serving
        self._health = health.aio.HealthServicer()
        self._background: set[asyncio.Task[None]] = set()
        self.address = self.metrics_address = ""

    async def start(self) -> None:
        """Open the ports and begin to serve; afterwards `address` and `metrics_address` are known.

        Raises:
            ConfigurationError: when a port is taken or the per-iteration file cannot be written; nothing is left open.
        """
        certificates = self._config.tls is not None and self._config.tls.ca is not None
        gatekeeper = Gatekeeper(self._tokens, certificates=certificates)
        self._server = grpc.aio.server(interceptors=[gatekeeper], options=SERVER_OPTIONS)
        add_AggregationServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            self._open_iterations()
            self._serve_metrics()
            self.address = self._bind()  # last: gRPC keeps the port of a server that was never started
        except ConfigurationError:
            await self._server.stop(None)
            await self._close_outlets()
            raise
        self._engine.start(asyncio.get_running_loop(), self._servicer)
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = 2.0) -> None:
        """Refuse what is new, give calls in flight ``grace`` seconds, write a checkpoint, end."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace)
        await asyncio.to_thread(self._engine.stop)
        await self._close_outlets()

    async def kill(self) -> None:
        """End as ``kill -9`` would end the process: connections break, nobody is told, and no checkpoint is written.

        What is left of the shard's thread can neither write nor speak, and ends by itself: in the default executor of
        the loop, because a plan of faults waits for this on that very thread.
        """
        await self._server.stop(None)
        await self._close_outlets()
        asyncio.get_running_loop().run_in_executor(None, self._engine.stop)

    def statistics(self) -> ShardStatistics:
        """Return the shard's counters; from any thread."""
        return self._engine.statistics()

    @property
    def registry(self) -> CollectorRegistry | None:
        """What the Prometheus endpoint shows; None where none is served. To be read from any thread."""
        return self._registry

    def _record(self, row: IterationRow) -> None:
        for take in self._rows:
            take(row)

    def _open_iterations(self) -> None:
        if self._config.iterations is None:
            return
        version = self._engine.statistics().version
        try:
            self._iterations = IterationFile(self._config.iterations, version)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot write the per-iteration file: {error}") from error
        for row in self._recovery.rows if self._recovery is not None else ():
            self._iterations.write(row)
        self._rows.append(self._iterations.write)

    async def _close_outlets(self) -> None:
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        self._close_journal()
        if self._iterations is not None:
            try:
                self._iterations.close()
            except OSError as error:  # a disk that is still full
                _logger.error("the last rows of %s are lost: %s", self._config.iterations, error)  # noqa: TRY400

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _bind(self) -> str:
        host = self._config.listen.rpartition(":")[0]
        try:
            port = self._open_port()
        except RuntimeError as error:
            raise ConfigurationError(_taken("shard", self._config.listen)) from error
        if port == 0:
            raise ConfigurationError(_taken("shard", self._config.listen))
        return f"{host}:{port}"

    def _open_port(self) -> int:
        if self._config.tls is None:
            return self._server.add_insecure_port(self._config.listen)
        ca, key, certificate = self._config.tls.read()
        assert key is not None  # noqa: S101 - ServerConfig has checked it
        assert certificate is not None  # noqa: S101
        credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)
        return self._server.add_secure_port(self._config.listen, credentials)

    def _serve_metrics(self) -> None:
        if self._config.metrics_listen is None:
            return
        journal = self._journal
        metrics = ShardMetrics(
            self._engine.statistics,
            None if journal is None else lambda: journal.bytes,
            per_worker=self._config.per_worker_metrics,
        )
        host, _, port = self._config.metrics_listen.rpartition(":")
        try:
            self._metrics_server, _ = start_http_server(int(port), host.strip("[]"), metrics.registry)
        except OSError as error:
            raise ConfigurationError(_taken("metrics endpoint", self._config.metrics_listen)) from error
        self._rows.append(metrics.observe)
        self._registry = metrics.registry
        self.metrics_address = f"{host}:{self._metrics_server.server_port}"

    def _not_serving(self) -> None:
        task = asyncio.ensure_future(self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _set_health(self, status: int) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


def _taken(what: str, address: str) -> str:
    return f"cannot listen on {address} for the {what}: the port is in use or the host is not here; choose another"
