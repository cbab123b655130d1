"""A shard's counters and last values among Ray's own metrics, for those who scrape Ray's nodes and nothing else."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from ray.util.metrics import Gauge

_logger = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 5.0  # half of Ray's own period, twice of which is how long it keeps a value without a new one
_GOODBYE_SECONDS: Final = 5.0


class Registry(Protocol):
    """What is read of a ``prometheus_client.CollectorRegistry``."""

    def collect(self) -> Iterable[Any]:
        """Return families with ``type``, ``documentation`` and ``samples``."""
        ...


def bridge(registry: Registry, run: str, shard: int) -> Callable[[], None]:
    """Copy what ``registry`` counts into Ray's metrics every few seconds, until the function it returns is called.

    Names and labels are the registry's, and so are their bounds, but for the label ``run``: a node may have shards of
    several. Ray puts ``ray_`` before each name and adds labels of its own. Histograms are left out, for Ray takes
    single observations only, and no boundary at 0: they are found at the shard's own endpoint.

    A counter goes over as a gauge of the same name, ``…_total``. A shard's totals outlive its process; those of a
    Ray counter are sums of increments, which a node keeps for processes that are gone: after a restart it would show
    the sum of both lives. Values of a gauge are the shard's own at any time, and go with its process.

    Args:
        registry: Of the shard's metrics.
        run: Name of the shard's run.
        shard: Its position, for the log.

    Returns:
        A function that copies a last time and ends the thread. Neither it nor the thread raises anything.
    """
    stopped = threading.Event()

    def copy() -> None:
        gauges: dict[str, Gauge] = {}
        told, ended = "", False
        while not ended:
            ended = stopped.wait(_PAUSE_SECONDS)
            try:
                _copy(registry, run, gauges)
            except Exception as error:  # noqa: BLE001 - a shard goes on without a copy of its metrics
                if told != repr(error):
                    told = repr(error)
                    _logger.warning("the metrics of shard %d of %s could not be handed to Ray: %s", shard, run, told)

    thread = threading.Thread(target=copy, name=f"metrics of shard {shard}", daemon=True)
    thread.start()

    def stop() -> None:
        stopped.set()
        thread.join(_GOODBYE_SECONDS)

    return stop


def _copy(registry: Registry, run: str, gauges: dict[str, Gauge]) -> None:
    for family in registry.collect():
        if family.type not in {"counter", "gauge"}:
            continue
        for sample in family.samples:
            if sample.name not in gauges:
                gauges[sample.name] = Gauge(sample.name, family.documentation, ("run", *sample.labels))
            gauges[sample.name].set(sample.value, {"run": run, **sample.labels})
