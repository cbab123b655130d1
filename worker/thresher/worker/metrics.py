"""Prometheus: reads frozen statistics when asked. docs/metrics.md explains each one."""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import final

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from thresher.protos.errors import ConfigurationError
from thresher.protos.transport import check_address
from thresher.worker.statistics import WorkerStatistics


@final
class WorkerMetrics(Collector):
    """All metrics of one worker, in a registry of their own, served over HTTP from a daemon thread.

    Args:
        statistics: Where to read the worker's counters.
        listen: ``host:port``; port 0 takes a free one, see `address`.

    Raises:
        ConfigurationError: when the port is taken.
    """

    def __init__(self, statistics: Callable[[], WorkerStatistics], listen: str) -> None:
        """Begin to serve."""
        self._statistics = statistics
        registry = CollectorRegistry()
        build = Gauge("thresher_build_info", "Always 1; the version is a label.", ["version"], registry=registry)
        build.labels(version("thresher")).set(1)
        registry.register(self)
        check_address(listen, insecure=True)  # metrics are no secret; only the form is looked at
        host, _, port = listen.rpartition(":")
        try:
            self._server, _ = start_http_server(int(port), host, registry)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {listen} for the metrics endpoint: the port is in use or the host is not here"
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """End the endpoint."""
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """Yield everything from one frozen picture of the worker."""
        now = self._statistics()
        worker = str(now.rank)
        for name, text, values in (
            ("thresher_worker_push_bytes", "Exchange messages sent to a shard.", now.push_bytes),
            ("thresher_worker_pull_bytes", "Exchange messages received from a shard.", now.pull_bytes),
            ("thresher_worker_resent_bytes", "Exchange messages sent again to a shard.", now.resent_bytes),
        ):
            traffic = CounterMetricFamily(name, text, labels=["worker", "shard"])
            for shard, value in enumerate(values):
                traffic.add_metric([worker, str(shard)], value)
            yield traffic
        for name, text, total in (
            ("thresher_worker_steps", "Steps made.", now.steps),
            ("thresher_worker_skipped_steps", "Steps without a contribution.", now.skipped),
            ("thresher_worker_pushed_elements", "Gradient elements sent.", now.pushed_elements),
            ("thresher_worker_setup_bytes", "Bytes of seeds and snapshots.", now.setup_bytes),
        ):
            counter = CounterMetricFamily(name, text, labels=["worker"])
            counter.add_metric([worker], total)
            yield counter
        for name, text, seconds in (
            ("thresher_compute_seconds", "The script's own work, between exchanges.", now.compute_seconds),
            ("thresher_compress_seconds", "Gather, correct, select, frame and keep.", now.compress_seconds),
            ("thresher_exchange_seconds", "Send, wait for updates, replay and copy them.", now.exchange_seconds),
        ):
            summary = SummaryMetricFamily(name, text, labels=["worker"])
            summary.add_metric([worker], count_value=now.timed_steps, sum_value=seconds)
            yield summary
        for name, text, last in (
            ("thresher_worker_push_density", "Density of the last push.", now.density),
            ("thresher_worker_residual_norm", "Norm of what this worker keeps.", now.residual_norm),
            ("thresher_worker_threshold", "Threshold in force for the next step.", now.threshold),
        ):
            if last is not None:
                gauge = GaugeMetricFamily(name, text, labels=["worker"])
                gauge.add_metric([worker], last)
                yield gauge
