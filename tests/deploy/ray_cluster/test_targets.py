"""Service discovery for Prometheus: all endpoints that are known, in the form it reads, as they are when it asks."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.ray_cluster.cluster import ShardStatus, down, status, up
from thresher.deploy.ray_cluster.config import RayConfig
from thresher.deploy.ray_cluster.local import local_cluster
from thresher.deploy.ray_cluster.targets import document, serve, write
from thresher.protos.errors import ConfigurationError
from thresher.worker import Method, Settings, connect

pytestmark = pytest.mark.xdist_group("ray")

SECONDS = 60.0
RUN = "targets-test"

addresses = st.integers(1, 65535).map("10.0.0.1:{}".format)
statuses = st.builds(
    ShardStatus,
    shard=st.integers(0, 9),
    state=st.just("SERVING"),
    reason=st.just(""),
    node=st.just("10.0.0.1"),
    metrics_address=st.one_of(st.just(""), addresses),
    worker_metrics=st.lists(addresses, max_size=4).map(tuple),
)


@given(st.lists(statuses, max_size=4))
def test_every_endpoint_that_is_known_is_listed(seen: list[ShardStatus]) -> None:
    """Shards as often as they are, workers once, and what is not known not at all."""
    shards, workers = document(RUN, seen)
    assert shards == {
        "targets": [one.metrics_address for one in seen if one.metrics_address],
        "labels": {"job": "thresher-shard", "run": RUN},
    }
    assert workers["labels"] == {"job": "thresher-worker", "run": RUN}
    assert set(workers["targets"]) == {address for one in seen for address in one.worker_metrics}
    assert len(set(workers["targets"])) == len(workers["targets"])


@pytest.mark.parametrize("listen", ["9100", "nowhere.invalid:0", "127.0.0.1:port"])
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ConfigurationError), serve(RUN, listen):
        pytest.fail("it listens")


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match="the port is in use"), serve(RUN, listen):
            pytest.fail("it listens")


@pytest.fixture(scope="module")
def run() -> Iterator[None]:
    """Two shards on a Ray of our own, and a worker that was there for a step and stays."""
    method = Method(threshold=0.0)
    with local_cluster(num_cpus=2):
        up(RayConfig(RUN, shards=2, method=method, durability="none", insecure=True), deadline=SECONDS)
        shards = tuple(one.address for one in status(RUN))
        settings = Settings(shards, 0, 1, method=method, insecure=True, metrics_listen="127.0.0.1:0")
        with connect(settings=settings) as worker:
            model = torch.nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            worker.wrap(model, optimizer)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            yield
        down(RUN, timeout=SECONDS)


def got(address: str) -> tuple[int, Message, bytes]:
    """Status, headers and body of an answer."""
    try:
        with urllib.request.urlopen(f"http://{address}", timeout=SECONDS) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


@pytest.mark.slow
def test_file_and_http_name_the_endpoints_of_the_run(run: None, tmp_path: Path) -> None:
    """In the form that Prometheus asks for: 200, JSON, a list of groups with targets and labels that are text."""
    with serve(RUN, "127.0.0.1:0") as address:
        code, headers, body = got(address)
    write(RUN, tmp_path / "targets.json")
    found: list[dict[str, Any]] = json.loads(body)
    assert (code, headers["Content-Type"]) == (200, "application/json")
    assert json.loads((tmp_path / "targets.json").read_text(encoding="utf-8")) == found
    assert found[0]["targets"] == [one.metrics_address for one in status(RUN)]
    assert [len(group["targets"]) for group in found] == [2, 1]
    for group, name in zip(found, (b"thresher_iterations_total", b"thresher_worker_steps_total"), strict=True):
        for endpoint in group["targets"]:
            assert name in got(f"{endpoint}/metrics")[2]


@pytest.mark.slow
def test_a_run_that_is_not_there_is_unavailable(run: None, tmp_path: Path) -> None:
    """So Prometheus keeps what it knows; a file is not written at all."""
    with serve("another", "127.0.0.1:0") as address:
        code, _, body = got(address)
    assert code == 503
    assert b"there is no run another" in body
    with pytest.raises(ConfigurationError, match="there is no run another"):
        write("another", tmp_path / "targets.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_told(run: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name a file in a folder that is there"):
        write(RUN, tmp_path / "nowhere" / "targets.json")


@pytest.mark.slow
def test_prometheus_finds_all_endpoints(run: None, tmp_path: Path) -> None:
    """A real one, through HTTP service discovery: two shards and a worker are up."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian's package has it)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = f"127.0.0.1:{free.getsockname()[1]}"
    with serve(RUN, "127.0.0.1:0") as address:
        configuration = tmp_path / "prometheus.yml"
        discovery = f"http_sd_configs: [{{url: 'http://{address}/', refresh_interval: 1s}}]"
        configuration.write_text(
            "global: {scrape_interval: 500ms, scrape_timeout: 500ms}\n"
            f"scrape_configs: [{{job_name: ray, {discovery}}}]",
            encoding="utf-8",
        )
        command = [program, f"--config.file={configuration}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        process = subprocess.Popen([*command, f"--web.listen-address={own}"], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + SECONDS
            while (found := scraped(own)) != {"thresher-shard": 2, "thresher-worker": 1}:
                assert time.monotonic() < deadline, found
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait(timeout=SECONDS)


def scraped(prometheus: str) -> dict[str, int]:
    """How many endpoints of each job are up."""
    try:
        found = json.loads(got(f"{prometheus}/api/v1/query?query=sum%20by%20(job)(up)")[2])["data"]["result"]
    except (OSError, ValueError):
        return {}  # it is still starting
    return {one["metric"]["job"]: int(one["value"][1]) for one in found}
