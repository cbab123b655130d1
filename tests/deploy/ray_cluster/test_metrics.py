"""A shard's metrics among Ray's: what a node's endpoint shows is what the shard's registry holds."""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from thresher.deploy.in_process import in_process
from thresher.deploy.ray_cluster import metrics
from thresher.deploy.ray_cluster.local import local_cluster
from thresher.deploy.ray_cluster.metrics import bridge
from thresher.server.metrics import ShardMetrics
from thresher.worker import Session

pytestmark = pytest.mark.xdist_group("ray")

SECONDS = 60.0
OWN_LABELS = ("run", "shard", "worker", "result", "version")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The port of the only node's metrics. Ray hands them over each second instead of each ten."""
    with local_cluster(num_cpus=1, _system_config={"metrics_report_interval_ms": 1000}):
        (node,) = ray.nodes()  # type: ignore[no-untyped-call]
        yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PAUSE_SECONDS", 0.2)


def shown(endpoint: str) -> Samples:
    """What the node shows of ours, without the labels that Ray adds."""
    try:
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}  # the agent that serves them is still starting
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    ours = [s for s in found if s.name.startswith("ray_thresher_")]
    return {(s.name, frozenset((k, v) for k, v in s.labels.items() if k in OWN_LABELS)): s.value for s in ours}


def held(registry: CollectorRegistry, run: str) -> Samples:
    """What the registry holds, histograms apart, as the node should show it."""
    samples = [s for family in registry.collect() if family.type != "histogram" for s in family.samples]
    return {(f"ray_{s.name}", frozenset({"run": run, **s.labels}.items())): s.value for s in samples}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def train(session: Session) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.wrap(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4) * (session.rank + 1)).sum().backward()
        optimizer.step()


@pytest.mark.slow
def test_the_node_shows_what_the_shard_counts(endpoint: str) -> None:
    with in_process(shards=1, workers=2) as cluster:
        cluster.run(train)
        of_shard = ShardMetrics(lambda: cluster.statistics()[0], lambda: 7)
        stop = bridge(of_shard.registry, "digits", 0)
        wait_for(lambda: bool(shown(endpoint)))
        expected = held(of_shard.registry, "digits")
        found = shown(endpoint)
        stop()
    assert found == expected
    assert found["ray_thresher_iterations_total", frozenset({("run", "digits"), ("shard", "0")})] == 3


@pytest.mark.slow
def test_shards_of_two_runs_on_a_node_are_told_apart(endpoint: str) -> None:
    """They have the same position, and the same names for everything."""
    expected: Samples = {}
    for number, run in enumerate(("left", "right")):
        registry = CollectorRegistry()
        Gauge("thresher_apart", "Another one in each run.", ["shard"], registry=registry).labels("0").set(number)
        expected |= held(registry, run)
        bridge(registry, run, 0)()
    wait_for(lambda: expected.items() <= shown(endpoint).items())


def test_a_failing_registry_is_told_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Semaphore(0)

    class Failing:
        def collect(self) -> list[Any]:
            asked.release()
            raise RuntimeError("the shard has ended")

    stop = bridge(Failing(), "digits", 3)
    for _ in range(3):
        assert asked.acquire(timeout=SECONDS)
    stop()
    assert [r.getMessage() for r in caplog.records] == [
        "the metrics of shard 3 of digits could not be handed to Ray: RuntimeError('the shard has ended')"
    ]


def test_stopping_copies_a_last_time_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PAUSE_SECONDS", 1000.0)
    asked: list[int] = []

    class Counting:
        def collect(self) -> list[Any]:
            asked.append(1)
            return []

    stop = bridge(Counting(), "digits", 4)
    stop()
    assert len(asked) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics of shard 4"]
    stop()


class Shard:
    """Comes back with the total that its journal would have kept, and one gauge that only the first life has."""

    def __init__(self, seen: str) -> None:
        registry = CollectorRegistry()
        Gauge("thresher_kept_total", "Survives.", ["shard"], registry=registry).labels("9").set(100)
        Histogram("thresher_spread", "Left out.", buckets=(0.0, 1.0), registry=registry).observe(0.5)
        if not Path(seen).exists():
            Gauge("thresher_first_life", "Ends.", ["shard"], registry=registry).labels("9").set(1)
        Path(seen).touch()
        bridge(registry, "digits", 9)

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.slow
def test_a_total_is_not_counted_twice_after_a_restart(endpoint: str, tmp_path: Path) -> None:
    """What the first life has shown goes with it, while the second one shows the same total."""
    shard: Any = ray.remote(Shard).options(max_restarts=-1, num_cpus=0).remote(str(tmp_path / "seen"))
    total, first = (
        (f"ray_thresher_{name}", frozenset({("run", "digits"), ("shard", "9")}))
        for name in ("kept_total", "first_life")
    )
    wait_for(lambda: first in shown(endpoint))
    os.kill(ray.get(shard.pid.remote()), signal.SIGKILL)
    wait_for(lambda: first not in shown(endpoint))
    wait_for(lambda: total in shown(endpoint))
    assert shown(endpoint)[total] == 100
    assert not [name for name, _ in shown(endpoint) if "spread" in name]
