"""A shard as an actor: served on a thread of its own, recovered from its folder in the constructor."""

import asyncio
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar, final

import ray

from thresher.deploy.lean_start import without_compiler
from thresher.deploy.ray_cluster.calls import own_ip
from thresher.deploy.ray_cluster.config import RayConfig
from thresher.deploy.ray_cluster.metrics import bridge
from thresher.protos.errors import JournalError, ProtocolError, ThresherError
from thresher.protos.timeouts import JOURNAL_SECONDS
from thresher.server.server import ServerConfig, ShardServer

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_LAST_ITERATION: Final = "thresher_last_iteration_timestamp_seconds"
_ENDING_SECONDS: Final = 5.0  # after a kill: until the kernel has unlocked what the process held
_PAUSE_SECONDS: Final = 0.5


@final
@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a shard is now.

    Attributes:
        address: ``host:port`` for workers.
        metrics_address: ``host:port`` of its Prometheus endpoint.
        node_id: Ray's name of the node.
        node_ip: The node's address.
        pid: Of the shard's process.
        seconds: Since that process began.
    """

    address: str
    metrics_address: str
    node_id: str
    node_ip: str
    pid: int
    seconds: float


@final
class ShardActor:
    """One shard of a run. Ray runs the constructor again after each death, wherever there is room.

    A shard that cannot be had, because its state is damaged or belongs to another run, does not end: it stays, and
    every method raises why. An actor that ends is forgotten by its name, and nobody could be told.
    """

    def __init__(self, config: RayConfig, shard: int) -> None:
        """Recover the shard and serve it."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        without_compiler()
        self._begin = time.monotonic()
        self._config, self._shard = config, shard
        self._ip = own_ip()
        self._failure: ThresherError | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="shard", daemon=True).start()
        try:
            self._server = self._served(config.server(shard, self._ip))
        except Exception as error:
            _logger.exception("shard %d of %s cannot be served", shard, config.name)
            told = ProtocolError(f"shard {shard} cannot be served on {self._ip}: {error!r}; its log says where")
            self._failure = error if isinstance(error, ThresherError) else told
        else:
            self._end_bridge = self._bridged()

    @ray.method(concurrency_group="look")
    def where(self) -> Whereabouts:
        """Return where the shard is. Raises ThresherError when it serves no more, or never did."""
        server, context = self._serving(), ray.get_runtime_context()
        seconds = time.monotonic() - self._begin
        return Whereabouts(
            server.address, server.metrics_address, context.get_node_id(), self._ip, os.getpid(), seconds
        )

    @ray.method(concurrency_group="look")
    def statistics(self) -> dict[str, Any]:
        """Return `ShardStatistics` as a dict, and ``last_iteration_age`` in seconds; None before the first."""
        server = self._serving()
        return {**asdict(server.statistics()), "last_iteration_age": self._last_iteration_age(server)}

    @ray.method(concurrency_group="look")
    def variables(self) -> dict[str, str]:
        """Return what a worker of the run is told."""
        return self._config.variables()

    def drain(self) -> None:
        """Finish what has come, write a checkpoint, and serve no more. A second time does nothing."""
        if self._failure is not None:
            return
        self._failure = ProtocolError(
            f"shard {self._shard} was drained, and serves no more: `thresher ray down {self._config.name}` ends the run"
        )
        self._end_bridge()
        self._do(self._server.stop())

    def _served(self, config: ServerConfig) -> ShardServer:
        """Recover and start. The shard's folder is waited for: its life before may be ending, on a node that was lost.

        Raises:
            ThresherError: as `ShardServer` raises it.
        """
        until = self._begin + (JOURNAL_SECONDS if _has_lived() else _ENDING_SECONDS)
        while True:
            try:
                server = ShardServer(config)
            except JournalError as error:
                if time.monotonic() > until:
                    raise
                _logger.warning("shard %d waits for its folder: %s", self._shard, error)
                time.sleep(_PAUSE_SECONDS)
            else:
                self._do(server.start())
                return server

    def _serving(self) -> ShardServer:
        if self._failure is not None:
            raise self._failure
        return self._server

    def _bridged(self) -> Callable[[], None]:
        registry = self._server.registry
        assert registry is not None  # noqa: S101 - RayConfig has every shard serve its metrics
        return bridge(registry, self._config.name, self._shard)

    def _last_iteration_age(self, server: ShardServer) -> float | None:
        assert server.registry is not None  # noqa: S101
        labels = {"shard": str(self._shard)}
        last = server.registry.get_sample_value(_LAST_ITERATION, labels)
        return time.time() - last if last else None

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _has_lived() -> bool:
    """True when Ray has started this actor again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's answer uses what Ray deprecates
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


RemoteShard: Final = ray.remote(concurrency_groups={"look": 4})(ShardActor)  # type: ignore[call-overload]
"""What looks at a shard has threads of its own, and never waits for what is done with it."""
