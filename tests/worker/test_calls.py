"""Single calls to one shard: every wait ends, and every error names the shard and its address."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch
from tests.worker.conversing import LAYOUT, SGD, registration, unused_address

from thresher.deploy.in_process import in_process
from thresher.protos.errors import (
    ConnectionTimeoutError,
    LayoutError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import layout_to_message
from thresher.protos.snapshots import pack_state
from thresher.worker.calls import ShardCalls, ShardLostError


@contextmanager
def calling(address: str, shard: int = 0, who: str = "worker 0") -> Iterator[ShardCalls]:
    calls = ShardCalls(shard, address, who)
    try:
        yield calls
    finally:
        calls.close()
        calls.close()


def test_a_shard_that_is_not_there() -> None:
    """The wait ends at its deadline, which may have passed already, and names shard, address and worker."""
    address = unused_address()
    with (
        calling(address, 3, "worker 2") as calls,
        pytest.raises(ConnectionTimeoutError, match=f"worker 2 could not reach shard 3 at {address}; start it"),
    ):
        calls.wait_ready(deadline=0.0)


@pytest.mark.parametrize("call", ["register", "snapshot", "statistics", "seed", "exchange"])
def test_a_lost_shard_is_named_by_every_call(call: str) -> None:
    """Nothing of gRPC leaks out: each call raises one of ours, with shard and address."""
    address = unused_address()
    with calling(address, 1) as calls:
        makes: dict[str, Any] = {
            "register": lambda: calls.register(registration()),
            "snapshot": lambda: calls.snapshot(0.5),
            "statistics": calls.statistics,
            "seed": lambda: calls.seed(registration(), b"values"),
            "exchange": lambda: exchanged(calls),
        }
        with pytest.raises((ConnectionTimeoutError, RoundFailedError), match=f"shard 1 at {address}"):
            makes[call]()


def exchanged(calls: ShardCalls) -> None:
    with calls.translated():
        list(calls.exchange([]))


def test_a_server_of_another_kind() -> None:
    """What answers but does not speak our protocol is named as such."""
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        with calling(address) as calls, pytest.raises(ProtocolError, match=f"shard 0 at {address} .* no shard"):
            calls.statistics()
        server.stop(grace=None).wait()


def test_registering_seeding_reading() -> None:
    """The way into a run, one call after the other, and what a reader finds at its end."""
    with in_process(shards=1, workers=1) as cluster, calling(cluster.addresses[0]) as calls:
        with pytest.raises(RoundFailedError, match="worker 0, which brings them, has not come"):
            calls.snapshot(wait_seconds=0.05)
        assert not calls.register(registration()).seeded
        values = {"parameters": torch.arange(3.0)}
        data = pack_state(values, {"mean": torch.ones(2)})
        assert calls.seed(registration(), data)
        assert not calls.seed(registration(), data), "a second seed is not taken"
        assert calls.register(registration()).seeded
        before = calls.setup_bytes
        found = calls.snapshot(wait_seconds=5.0)
        assert (found.version, found.layout, found.optimizer) == (0, LAYOUT, SGD)
        assert torch.equal(found.state["parameters"], values["parameters"])
        assert torch.equal(found.untrained["mean"], torch.ones(2))
        assert (before, calls.setup_bytes > before) == (2 * len(data), True)
        assert calls.statistics().numel == 3


def test_errors_of_the_shard_keep_their_kind() -> None:
    """What the shard refuses arrives as the class it raised, with its message and the shard's name behind it."""
    other = Layout((TensorSpec("a", (4,), "float32"),))
    with in_process(shards=1, workers=2) as cluster, calling(cluster.addresses[0]) as calls:
        calls.register(registration(workers=2))
        message = registration(workers=2, rank=1, layout=layout_to_message(other), fingerprint=other.fingerprint)
        expected = rf"(?s)a float32 \[3\] is registered, here it is.*\[shard 0 at {cluster.addresses[0]}\]"
        with pytest.raises(LayoutError, match=expected):
            calls.register(message)


def test_calls_that_were_closed() -> None:
    """They say so, named or not: the shard is not to blame."""
    for address in (unused_address(), "ray://digits/0"):
        calls = ShardCalls(0, address, "worker 0", patience=60.0)
        calls.close()
        with pytest.raises(ShardLostError, match=f"the connection to {address}.* was closed on this side"):
            exchanged(calls)


def test_every_error_is_ours() -> None:
    """One ``except`` catches all of the above."""
    assert issubclass(ConnectionTimeoutError, ThresherError)
    assert str(ShardCalls(2, "127.0.0.1:7", "worker 0")) == "shard 2 at 127.0.0.1:7"
