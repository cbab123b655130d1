"""The endpoint of a worker: what Prometheus reads is what the session says."""

import socket
from dataclasses import replace
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from thresher.deploy.in_process import in_process
from thresher.protos.errors import ConfigurationError
from thresher.worker import Method, Settings, connect
from thresher.worker.metrics import WorkerMetrics
from thresher.worker.statistics import WorkerStatistics


def scraped(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_counter_of_the_session_is_served() -> None:
    """Parsed by Prometheus' own parser, after real steps, all values agree with ``session.statistics()``."""
    with in_process(shards=2, workers=1, method=Method(threshold=0.5)) as cluster:
        settings = Settings(cluster.addresses, 0, 1, method=Method(threshold=0.5), metrics_listen="127.0.0.1:0")
        with connect(settings=settings) as session:
            model = torch.nn.Linear(2, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            session.wrap(model, optimizer)
            for value in (1.0, 0.25):
                model.weight.grad, model.bias.grad = torch.full((2, 2), value), torch.full((2,), 2 * value)
                optimizer.step()
            address = cluster.statistics()[0].members[0].metrics_address
            found, now = scraped(address), session.statistics()
    worker = ("worker", "0")
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("thresher_worker_steps_total", (worker,)): 2,
        ("thresher_worker_skipped_steps_total", (worker,)): 0,
        ("thresher_worker_pushed_elements_total", (worker,)): 8,
        ("thresher_worker_setup_bytes_total", (worker,)): now.setup_bytes,
        ("thresher_compress_seconds_count", (worker,)): 2,
        ("thresher_compress_seconds_sum", (worker,)): now.compress_seconds,
        ("thresher_compute_seconds_count", (worker,)): 2,
        ("thresher_compute_seconds_sum", (worker,)): now.compute_seconds,
        ("thresher_exchange_seconds_count", (worker,)): 2,
        ("thresher_exchange_seconds_sum", (worker,)): now.exchange_seconds,
        ("thresher_worker_push_density", (worker,)): 2 / 6,
        ("thresher_worker_residual_norm", (worker,)): 0.5,
        ("thresher_worker_threshold", (worker,)): 0.5,
    }
    for shard in range(2):
        labels = (("shard", str(shard)), worker)
        expected["thresher_worker_push_bytes_total", labels] = now.push_bytes[shard]
        expected["thresher_worker_pull_bytes_total", labels] = now.pull_bytes[shard]
        expected["thresher_worker_resent_bytes_total", labels] = 0
    build = {key: value for key, value in found.items() if key[0] == "thresher_build_info"}
    assert list(build.values()) == [1.0]
    assert {key: value for key, value in found.items() if key not in build} == expected
    assert now.pushed_elements == 8
    assert min(now.push_bytes + now.pull_bytes) > 0


def test_a_method_without_threshold_serves_none() -> None:
    """No number is made up for what does not exist."""
    now = WorkerStatistics(rank=3)
    metrics = WorkerMetrics(lambda: replace(now, steps=4), "127.0.0.1:0")
    found = scraped(metrics.address)
    metrics.close()
    assert not [name for name, _ in found if name == "thresher_worker_threshold"]
    assert found["thresher_worker_steps_total", (("worker", "3"),)] == 4


def test_a_port_in_use_is_named() -> None:
    """The message has the address; the session has registered nowhere."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=f"cannot listen on {address}"):
            WorkerMetrics(lambda: WorkerStatistics(0), address)


def test_the_endpoint_ends_with_the_session() -> None:
    """Also when joining failed: the port is free again."""
    settings = Settings(("127.0.0.1:1",), 0, 1, connect_timeout=0.1, metrics_listen="127.0.0.1:0")
    session = connect(settings=settings)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(Exception, match="could not reach"):
        session.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert session._metrics is not None
    host, _, port = session._metrics.address.rpartition(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))
