"""One shard as a gRPC server: the parts, created in order and ended in reverse."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from thresher.protos.errors import ConfigurationError
from thresher.protos.transport import SERVER_OPTIONS, check_address
from thresher.server.engine import Engine
from thresher.server.events import IterationRow
from thresher.server.iterations import IterationFile
from thresher.server.metrics import ShardMetrics
from thresher.server.servicer import AggregationServicer
from thresher.server.shard import Shard, ShardConfig
from thresher.server.statistics import ShardStatistics
from thresher.server.stream import encoded
from thresher.v1.aggregation_pb2 import DESCRIPTOR
from thresher.v1.aggregation_pb2_grpc import add_AggregationServiceServicer_to_server

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
        insecure: Plain text beyond this machine is fine.
        per_worker_metrics: Give each worker a label of its own.
    """

    shard: ShardConfig
    listen: str = "127.0.0.1:0"
    metrics_listen: str | None = None
    iterations: Path | None = None
    insecure: bool = False
    per_worker_metrics: bool = True


@final
class ShardServer:
    """Serves one shard until it is stopped. Belongs to one asyncio loop, but for `statistics`."""

    def __init__(self, config: ServerConfig) -> None:
        """Build the parts; `start` opens the port.

        Raises:
            ConfigurationError: when the address is none, or plain text would leave this machine unasked.
        """
        check_address(config.listen, insecure=config.insecure)
        if config.metrics_listen is not None:
            check_address(config.metrics_listen, insecure=True)  # Prometheus reads from elsewhere; it is no secret
        self._config = config
        shard = replace(config.shard, run=secrets.randbits(63))
        self._rows: list[Callable[[IterationRow], None]] = []
        self._iterations: IterationFile | None = None
        self._metrics_server: WSGIServer | None = None
        self._engine = Engine(Shard(shard), encoded, self._record)
        self._servicer = AggregationServicer(self._engine, shard)
        self._servicer.on_failure = self._not_serving
        self._health = health.aio.HealthServicer()
        self._background: set[asyncio.Task[None]] = set()
        self.address = self.metrics_address = ""

    async def start(self) -> None:
        """Open the ports and begin to serve; afterwards `address` and `metrics_address` are known.

        Raises:
            ConfigurationError: when a port is taken or the per-iteration file cannot be written; nothing is left open.
        """
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
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
        """Refuse what is new, give calls in flight ``grace`` seconds, end."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace)
        await asyncio.to_thread(self._engine.stop)
        await self._close_outlets()

    def statistics(self) -> ShardStatistics:
        """Return the shard's counters; from any thread."""
        return self._engine.statistics()

    def _record(self, row: IterationRow) -> None:
        for take in self._rows:
            take(row)

    def _open_iterations(self) -> None:
        if self._config.iterations is None:
            return
        try:
            self._iterations = IterationFile(self._config.iterations)
        except OSError as error:
            raise ConfigurationError(f"cannot write the per-iteration file: {error}") from error
        self._rows.append(self._iterations.write)

    async def _close_outlets(self) -> None:
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        if self._iterations is not None:
            self._iterations.close()

    def _bind(self) -> str:
        host = self._config.listen.rpartition(":")[0]
        try:
            port = self._server.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise ConfigurationError(_taken("shard", self._config.listen)) from error
        if port == 0:
            raise ConfigurationError(_taken("shard", self._config.listen))
        return f"{host}:{port}"

    def _serve_metrics(self) -> None:
        if self._config.metrics_listen is None:
            return
        metrics = ShardMetrics(self._engine.statistics, per_worker=self._config.per_worker_metrics)
        host, _, port = self._config.metrics_listen.rpartition(":")
        try:
            self._metrics_server, _ = start_http_server(int(port), host.strip("[]"), metrics.registry)
        except OSError as error:
            raise ConfigurationError(_taken("metrics endpoint", self._config.metrics_listen)) from error
        self._rows.append(metrics.observe)
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
