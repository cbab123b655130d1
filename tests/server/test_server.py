"""A served shard: health, ports, and the files and metrics that go with it."""

import asyncio
import http.client
import json
import logging
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tests.server.small_disk import fill, mounted

from thresher.protos.codec import encode
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import consistency_to_message, layout_to_message, optimizer_to_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.snapshots import pack_state
from thresher.protos.sparse import SparseGradient
from thresher.server.config import ShardConfig
from thresher.server.server import SERVICE, ServerConfig, ShardServer
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub

ALONE = ServerConfig(ShardConfig(shard=0, shards=1, workers=1))
LAYOUT = Layout((TensorSpec("w", (4,), "float32"),))
STATUS = health_pb2.HealthCheckResponse


@asynccontextmanager
async def serving(config: ServerConfig = ALONE) -> AsyncIterator[tuple[ShardServer, grpc.aio.Channel]]:
    server = ShardServer(config)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, channel
    finally:
        await server.stop(grace=0.1)


async def train(channel: grpc.aio.Channel, steps: int) -> Any:
    """One worker's whole conversation but for the leave."""
    stub: Any = AggregationServiceStub(channel)  # the stub's types know the blocking calls only
    optimizer = OptimizerSpec("SGD", ({"lr": 1.0},))
    await stub.Register(
        pb.RegisterRequest(
            workers=1, incarnation=1, shards=1, layout=layout_to_message(LAYOUT),
            fingerprint=LAYOUT.fingerprint,
            optimizer=optimizer_to_message(optimizer), method="m", consistency=consistency_to_message(Consistency()),
        )
    )  # fmt: skip
    seed = pack_state({PARAMETERS: torch.zeros(4)}, {})
    await stub.Seed(iter([pb.SeedRequest(incarnation=1, total_bytes=len(seed), chunk=seed)]))
    call = stub.Exchange()
    await call.write(pb.ExchangeRequest(hello=pb.Hello(incarnation=1)))
    for step in range(steps):
        frame = encode(SparseGradient(torch.tensor([step % 4]), torch.tensor([1.0]), 4))
        body = pb.Push(step=step, version=step, residual_squared=0.25)
        await call.write(pb.ExchangeRequest(push=body, payload_bytes=len(frame), chunk=frame))
        assert (await call.read()).update.version == step + 1
    return call


def health_stub(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    answer = await health_stub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


def test_health_is_serving_until_the_run_fails() -> None:
    """An orchestrator that asks sees a failed shard as NOT_SERVING, for the server and for the service."""

    async def scenario() -> None:
        async with serving() as (_, channel):
            assert await health_of(channel) == await health_of(channel, SERVICE) == STATUS.SERVING
            watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == STATUS.SERVING
            call = await train(channel, 1)
            await call.write(pb.ExchangeRequest(abort=pb.Abort(reason="diverged")))
            assert (await watch.read()).status == STATUS.NOT_SERVING
            watch.cancel()

    asyncio.run(scenario())


def test_a_stopping_server_says_so_first() -> None:
    """NOT_SERVING is told before the port closes, and the one who watches hears it."""

    async def scenario() -> None:
        server = ShardServer(ALONE)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == STATUS.SERVING
            await server.stop(grace=0.1)
            assert (await watch.read()).status == STATUS.NOT_SERVING

    asyncio.run(scenario())


def test_two_shards_take_free_ports() -> None:
    """Port 0 takes a free one, and the address says which."""

    async def scenario() -> None:
        async with serving() as (one, _), serving() as (other, _):
            assert one.address != other.address
            assert not one.address.endswith(":0")

    asyncio.run(scenario())


@pytest.mark.parametrize("field", ["listen", "metrics_listen"])
def test_a_port_in_use_is_named_and_nothing_stays_open(field: str, tmp_path: Path) -> None:
    """The message has the address; afterwards the other port and the file are free, so a second try can succeed."""
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as reserved:
        busy, free = (f"127.0.0.1:{one.getsockname()[1]}" for one in (taken, reserved))
        reserved.close()
        other = "metrics_listen" if field == "listen" else "listen"
        changed: dict[str, Any] = {field: busy, other: free}
        again: dict[str, Any] = {field: "127.0.0.1:0"}
        config = replace(ALONE, iterations=tmp_path / "rows.jsonl", **changed)

        async def scenario() -> None:
            with pytest.raises(ConfigurationError, match=f"cannot listen on {busy} for the .*in use"):
                await ShardServer(config).start()
            async with serving(replace(config, **again)) as (server, channel):
                assert free in (server.address, server.metrics_address)
                assert await health_of(channel) == STATUS.SERVING

        asyncio.run(scenario())


@pytest.mark.parametrize(
    "wrong",
    [{"listen": "0.0.0.0:0"}, {"listen": "nonsense"}, {"metrics_listen": "nonsense"}, {"metrics_listen": "host:99999"}],
)
def test_an_address_that_cannot_be_is_refused_before_anything_starts(wrong: dict[str, Any]) -> None:
    """No address, or plain text beyond this machine unasked, is a configuration error."""
    with pytest.raises(ConfigurationError):
        ShardServer(replace(ALONE, **wrong))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The folder is missing: a configuration error with its path, not a foreign one."""
    config = replace(ALONE, iterations=tmp_path / "missing" / "rows.jsonl")
    with pytest.raises(ConfigurationError, match=r"cannot write the per-iteration file.*missing/rows\.jsonl"):
        asyncio.run(ShardServer(config).start())


def test_a_file_of_something_else_is_refused_and_its_folder_is_free_again(tmp_path: Path) -> None:
    """A run that goes on does not cut what is no per-iteration file; then nothing is left open or locked."""
    config = replace(ALONE, iterations=tmp_path / "rows.jsonl", state_dir=tmp_path / "state")

    async def scenario() -> None:
        async with serving(config) as (_, channel):
            await train(channel, 2)
        (tmp_path / "rows.jsonl").write_text("a diary\n", encoding="utf-8")
        with pytest.raises(ConfigurationError, match=r"rows.jsonl has a line that is no row"):
            await ShardServer(config).start()
        (tmp_path / "rows.jsonl").unlink()
        async with serving(config) as (server, _):
            assert server.statistics().version == 2

    asyncio.run(scenario())


def test_a_disk_that_stays_full_under_the_rows_does_not_keep_a_shard_from_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be written is told once more at the end, and everything else is closed."""

    async def scenario() -> None:
        async with serving(replace(ALONE, iterations=tmp_path / "rows.jsonl")) as (server, channel):
            fill(tmp_path / "ballast")
            await train(channel, 40)
            assert server.statistics().version == 40

    with mounted(tmp_path, "size=64k"), caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert "the row of version 40 could not be recorded" in caplog.text
    assert "rows.jsonl are lost: [Errno 28] No space left on device" in caplog.text


def test_rows_metrics_and_statistics_agree(tmp_path: Path) -> None:
    """After some rounds the file, the scrape and the counters tell the same bytes, elements and rounds."""
    path = tmp_path / "rows.jsonl"
    config = replace(ALONE, metrics_listen="127.0.0.1:0", iterations=path, state_dir=tmp_path / "state")

    async def scenario() -> tuple[str, ShardServer]:
        async with serving(config) as (server, channel):
            call = await train(channel, 5)
            await call.write(pb.ExchangeRequest(leave=pb.Leave()))
            assert (await call.read()).left.version == 5
            url = f"http://{server.metrics_address}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
            return text, server

    text, server = asyncio.run(scenario())
    now = server.statistics()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    (member,) = now.members
    assert [row["version"] for row in rows] == [1, 2, 3, 4, 5]
    assert samples["thresher_iterations_total"] == now.version == 5
    assert samples["thresher_push_bytes_total"] == member.push_bytes == sum(row["push_bytes"] for row in rows)
    assert samples["thresher_pull_bytes_total"] == member.pull_bytes == sum(row["pull_bytes"] for row in rows)
    assert samples["thresher_pushed_elements_total"] == member.pushed_elements == 5
    assert samples["thresher_total_error_total"] == sum(row["residual_squared"] for row in rows) == 1.25
    assert samples["thresher_push_density_distribution_count"] == samples["thresher_staleness_distribution_count"] == 5
    assert samples["thresher_staleness"] == 0
    assert samples["thresher_journal_bytes"] > 0


class Scraper(threading.Thread):
    """Scrapes as fast as it can until the connection is refused or closed; keeps the status and text of each answer."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.answers: list[tuple[int, str]] = []
        self.has_begun = threading.Event()

    def run(self) -> None:
        while True:
            connection = http.client.HTTPConnection(self.address, timeout=10)
            try:
                connection.request("GET", "/metrics")
                answer = connection.getresponse()
                self.answers.append((answer.status, answer.read().decode()))  # a torn one raises IncompleteRead
            except ConnectionError:
                return
            finally:
                connection.close()
                self.has_begun.set()


def test_a_scrape_while_a_shard_drains_is_whole_or_refused(tmp_path: Path) -> None:
    """From the first notice to the closed journal: every answer has all counters as they are, and none is an error."""
    config = replace(ALONE, metrics_listen="127.0.0.1:0", state_dir=tmp_path / "state")

    async def scenario() -> list[Scraper]:
        server = ShardServer(config)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            await train(channel, 5)
            scrapers = [Scraper(server.metrics_address) for _ in range(3)]
            for scraper in scrapers:
                scraper.start()
                assert await asyncio.to_thread(scraper.has_begun.wait, 30)
            await server.stop(grace=0.1)
        for scraper in scrapers:
            await asyncio.to_thread(scraper.join, 30)
        return scrapers

    for scraper in asyncio.run(scenario()):
        assert not scraper.is_alive()
        assert scraper.answers
        for status, text in scraper.answers:
            samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
            assert (status, samples["thresher_iterations_total"]) == (200, 5)
            assert samples["thresher_push_density_distribution_count"] == 5
            assert samples["thresher_build_info"] == 1
