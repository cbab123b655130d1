"""The link: measured through real shards, described by hand, and refused in words where it cannot be had."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
import pytest
from tests.deploy.advise.known import link, way

from thresher.deploy.advise.link import given_link, measure_link
from thresher.deploy.advise.samples import middle
from thresher.deploy.in_process import in_process
from thresher.deploy.watching_places import Place
from thresher.protos.errors import BusyError, ConnectionTimeoutError, ProtocolError
from thresher.protos.transport import channel
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub

SERVICE = "thresher.v1.AggregationService"
NOWHERE = ("127.0.0.1:1", "127.0.0.1:2")


def place(*addresses: str) -> Place:
    return Place("here", tuple(partial(str, address) for address in addresses))


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, ...]]:
    with in_process(shards=2, workers=1) as cluster:
        yield tuple(cluster.addresses)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers that need not be exact."""
    monkeypatch.setattr("thresher.deploy.advise.link._MOST_BYTES", 1 << 20)


def test_a_link_is_measured_through_the_shards(addresses: tuple[str, ...]) -> None:
    """Each alone and both at once; all rates and times are positive, and repeated."""
    found = measure_link(place(*addresses), timeout=20.0, idle=0.01)
    assert [one.name for one in found.alone] == [f"shard {i} at {address}" for i, address in enumerate(addresses)]
    assert [one.host for one in found.alone] == ["127.0.0.1"] * 2
    assert [shards for shards, _ in found.hosts()] == [[0, 1]]
    for one in (found.together, *found.alone):
        for sample in (one.round_trip, one.up, one.down):
            assert sample.size > 1
            assert (sample > 0).all()
        assert 1e5 < middle(one.up) < 1e12
    for delay in (found.up_delay, found.down_delay):
        assert delay.sizes == (0, 32 << 10, 128 << 10, 512 << 10)  # both shards together
        assert all(sample.size > 1 for sample in delay.seconds)


def test_one_shard_is_all_of_them(addresses: tuple[str, ...]) -> None:
    found = measure_link(place(addresses[0]), timeout=20.0, shard_bandwidth=1e9, idle=0.0)
    assert found.together.up is found.alone[0].up
    (_, known), *others = found.hosts()
    assert (middle(known.up), middle(known.down), others) == (1e9, 1e9, [])


def test_shards_that_cannot_be_reached_are_all_named() -> None:
    with pytest.raises(ConnectionTimeoutError) as caught:
        measure_link(place(*NOWHERE), timeout=0.3)
    assert all(address in str(caught.value) for address in NOWHERE)
    assert "--bandwidth" in str(caught.value)


def test_a_shard_that_somebody_else_measures_is_asked_again_until_the_deadline(addresses: tuple[str, ...]) -> None:
    with channel(addresses[1]) as opened:
        asked = iter([pb.MeasureRequest(wanted_bytes=256 << 20)])
        going = AggregationServiceStub(opened).Measure(asked, timeout=60)
        next(going)
        with pytest.raises(BusyError, match="shard 1 is being measured"):
            measure_link(place(addresses[1]), timeout=0.3)
        going.cancel()


async def statistics(request: bytes, context: object) -> bytes:
    return pb.StatisticsResponse().SerializeToString()


@contextmanager
def older() -> Iterator[str]:
    """A shard of a release that nobody could ask yet how fast its link is."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        methods: dict[str, Any] = {"Statistics": grpc.unary_unary_rpc_method_handler(statistics)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(serve(), loop).result(20)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0.1), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_shard_of_an_older_release_is_told_apart() -> None:
    with older() as address, pytest.raises(ProtocolError, match="of another release of Thresher"):
        measure_link(place(address), timeout=20.0)


def test_shards_with_one_host_share_its_link() -> None:
    """Alone one may be slower than both together, where one stream does not fill the link."""
    both = link("a", "a")
    faster = type(both)(way("", up=3000.0, down=100.0), both.alone)
    ((shards, found),) = faster.hosts()
    assert (shards, middle(found.up), middle(found.down)) == ([0, 1], 3000.0, 1000.0)


def test_a_described_link_has_a_host_for_each_shard() -> None:
    found = given_link(1000.0, 0.01, 3, None)
    assert [shards for shards, _ in found.hosts()] == [[0], [1], [2]]
    assert middle(found.together.up) == middle(found.alone[2].down) == 1000.0
    assert middle(found.together.round_trip) == 0.01
