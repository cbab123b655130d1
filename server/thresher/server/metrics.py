"""Prometheus: reads frozen statistics when asked, and folds rows into histograms. docs/metrics.md explains each one."""

import math
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Final, final

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from thresher.protos.accounting import compression_ratio, dense_bytes
from thresher.server.events import IterationRow
from thresher.server.statistics import ShardStatistics

_DENSITY_BUCKETS: Final = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
_SECONDS_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)
_VERSIONS_BUCKETS: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@final
class ShardMetrics(Collector):
    """All metrics of one shard, in a registry of their own.

    Args:
        statistics: Where to read the shard's counters.
        journal_bytes: Where to read the size of the journal on the disk; None without one.
        per_worker: Give each worker a label of its own; switch it off for many workers.
    """

    def __init__(
        self,
        statistics: Callable[[], ShardStatistics],
        journal_bytes: Callable[[], int] | None = None,
        *,
        per_worker: bool = True,
    ) -> None:
        """Register everything."""
        self._statistics = statistics
        self._journal_bytes = journal_bytes
        self._per_worker = per_worker
        self._last_iteration = 0.0
        self.registry = CollectorRegistry()
        shard = str(statistics().shard)
        build = Gauge("thresher_build_info", "Always 1; the version is a label.", ["version"], registry=self.registry)
        build.labels(version("thresher")).set(1)
        self._push_density = self._histogram(
            "thresher_push_density_distribution", "Density of the pushes of a round.", _DENSITY_BUCKETS, shard
        )
        self._update_density = self._histogram(
            "thresher_update_density_distribution", "Density of updates.", _DENSITY_BUCKETS, shard
        )
        self._round_seconds = self._histogram(
            "thresher_round_seconds", "Time from the first push of a round to its close.", _SECONDS_BUCKETS, shard
        )
        self._staleness = self._histogram(
            "thresher_staleness_distribution", "Staleness of the oldest push of a round.", _VERSIONS_BUCKETS, shard
        )
        self.registry.register(self)

    def observe(self, row: IterationRow) -> None:
        """Fold one round into the histograms."""
        self._last_iteration = time.time()
        if not row.only_mean:  # what is pushed for a mean only is no part of densities
            self._push_density.observe(row.push_density)
            self._update_density.observe(row.update_density)
        self._round_seconds.observe(row.round_seconds)
        self._staleness.observe(row.staleness)

    def collect(self) -> Iterator[Metric]:
        """Yield counters and last values from one frozen picture of the shard."""
        now = self._statistics()
        yield from self._traffic(now)
        yield self._waits(now)
        shard = str(now.shard)
        for name, text, value in self._totals(now):
            yield _counter(name, text, shard, value)
        for name, text, value in self._last_values(now):
            gauge = GaugeMetricFamily(name, text, labels=["shard"])
            gauge.add_metric([shard], value)
            yield gauge
        results = CounterMetricFamily("thresher_push_results", "Pushes by verdict.", labels=["shard", "result"])
        for verdict, count in now.verdicts.items():
            results.add_metric([shard, str(verdict)], count)
        yield results

    def _traffic(self, now: ShardStatistics) -> Iterator[Metric]:
        labels = ["shard", "worker"] if self._per_worker else ["shard"]
        pushed = CounterMetricFamily("thresher_push_bytes", "Exchange messages received from workers.", labels=labels)
        pulled = CounterMetricFamily("thresher_pull_bytes", "Exchange messages sent to workers.", labels=labels)
        elements = CounterMetricFamily("thresher_pushed_elements", "Gradient elements received.", labels=labels)
        for family, values in (
            (pushed, [m.push_bytes for m in now.members]),
            (pulled, [m.pull_bytes for m in now.members]),
            (elements, [m.pushed_elements for m in now.members]),
        ):
            if self._per_worker:
                for member, value in zip(now.members, values, strict=True):
                    family.add_metric([str(now.shard), str(member.rank)], value)
            else:
                family.add_metric([str(now.shard)], sum(values))
            yield family

    def _waits(self, now: ShardStatistics) -> Metric:
        text = "Time that a whole push lay here until its round was closed."
        labels = ["shard", "worker"] if self._per_worker else ["shard"]
        summary = SummaryMetricFamily("thresher_wait_seconds", text, labels=labels)
        if self._per_worker:
            for member in now.members:
                summary.add_metric([str(now.shard), str(member.rank)], member.waits, member.wait_seconds)
        else:
            waits, seconds = sum(m.waits for m in now.members), sum(m.wait_seconds for m in now.members)
            summary.add_metric([str(now.shard)], waits, seconds)
        return summary

    def _totals(self, now: ShardStatistics) -> Iterator[tuple[str, str, float]]:
        yield "thresher_iterations", "Rounds closed.", now.version
        yield (
            "thresher_total_error",
            "Sum over rounds of the mean over workers of the squared residual norm.",
            now.residual_squared_total,
        )
        yield (
            "thresher_lost_error",
            "Squared norms of what was kept back and is gone with workers' memories.",
            now.lost_squared_total,
        )
        yield (
            "thresher_dense_bytes",
            "What the same pushes and updates would be as dense float32.",
            dense_bytes(_pushable(now)),
        )

    def _last_values(self, now: ShardStatistics) -> Iterator[tuple[str, str, float]]:
        counted = [member.state for member in now.members if member.counts]
        yield "thresher_members", "Workers that belong to the run.", len(counted)
        yield "thresher_lost_members", "Those of them that were here, and are not now.", counted.count("lost")
        yield "thresher_log_bytes", "Memory of the update log.", now.log_bytes
        if self._journal_bytes is not None:
            yield "thresher_journal_bytes", "Log and checkpoints on the disk.", self._journal_bytes()
        moved = sum(member.push_bytes + member.pull_bytes for member in now.members)
        ratio = compression_ratio(_pushable(now), moved)
        yield "thresher_compression_ratio", "Dense bytes over bytes moved, both directions.", ratio
        if now.threshold is not None:
            yield "thresher_threshold", "Threshold in force, in the unit of the gradient.", now.threshold
        if now.last_row is not None:
            row = now.last_row
            yield "thresher_push_density", "Density of the last round's pushes.", row.push_density
            yield "thresher_update_density", "Density of the last update.", row.update_density
            yield "thresher_staleness", "Versions closed since the oldest push of the last round began.", row.staleness
            norm = math.sqrt(row.residual_squared)
            yield "thresher_residual_norm", "Root of the mean over workers of the squared residual norm.", norm
        if self._last_iteration:
            yield "thresher_last_iteration_timestamp_seconds", "When the last round closed.", self._last_iteration

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], shard: str) -> Histogram:
        return Histogram(name, text, ["shard"], buckets=buckets, registry=self.registry).labels(shard)


def _pushable(now: ShardStatistics) -> int:
    return sum(member.pushable_elements for member in now.members)


def _counter(name: str, text: str, shard: str, value: float) -> CounterMetricFamily:
    counter = CounterMetricFamily(name, text, labels=["shard"])
    counter.add_metric([shard], value)
    return counter
