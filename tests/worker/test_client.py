"""One shard as a worker sees it: every wait ends, and every error names the shard and its address."""

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from thresher.deploy.in_process import in_process
from thresher.protos.errors import (
    ConnectionTimeoutError,
    LayoutError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import layout_to_message, optimizer_to_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.snapshots import pack_state
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.client import ShardClient

LAYOUT = Layout((TensorSpec("a", (3,), "float32"),), (TensorSpec("mean", (2,), "float32"),))
SGD = OptimizerSpec("SGD", ({"lr": 1.0, "weight_decay": 0.0},))
INCARNATION = 7


def registration(**changes: Any) -> pb.RegisterRequest:
    fields: dict[str, Any] = {
        "rank": 0,
        "workers": 1,
        "incarnation": INCARNATION,
        "shard": 0,
        "shards": 1,
        "layout": layout_to_message(LAYOUT),
        "fingerprint": LAYOUT.fingerprint,
        "optimizer": optimizer_to_message(SGD),
        "method": "everything",
    }
    return pb.RegisterRequest(**{**fields, **changes})


def unused_address() -> str:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{reserved.getsockname()[1]}"


def test_a_shard_that_is_not_there() -> None:
    """The wait ends at its deadline, which may have passed already, and names shard, address and worker."""
    address = unused_address()
    client = ShardClient(3, address, rank=2, incarnation=1)
    with pytest.raises(ConnectionTimeoutError, match=f"worker 2 could not reach shard 3 at {address}; start it"):
        client.wait_ready(deadline=0.0)
    client.close()


@pytest.mark.parametrize("call", ["register", "snapshot", "statistics", "seed", "wait_update"])
def test_a_lost_shard_is_named_by_every_call(call: str) -> None:
    """Nothing of gRPC leaks out: each call raises one of ours, with shard and address."""
    address = unused_address()
    client = ShardClient(1, address, rank=0, incarnation=1)
    arguments: dict[str, tuple[Any, ...]] = {
        "register": (registration(),),
        "snapshot": (0.5,),
        "statistics": (),
        "seed": (b"values",),
        "wait_update": (LAYOUT.shard_slice(0, 1),),
    }
    if call == "wait_update":
        client.open(0)
        client.push(pb.Push(), b"")
    with pytest.raises(RoundFailedError, match=f"worker 0 has lost shard 1 at {address}"):
        getattr(client, call)(*arguments[call])
    client.close()


def test_a_server_of_another_kind() -> None:
    """What answers but does not speak our protocol is named as such."""
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        client = ShardClient(0, address, rank=0, incarnation=1)
        with pytest.raises(ProtocolError, match=f"shard 0 at {address}: UNIMPLEMENTED"):
            client.statistics()
        client.close()
        server.stop(grace=None).wait()


def test_registering_seeding_reading() -> None:
    """The way into a run, one call after the other, and what a reader finds at its end."""
    with in_process(shards=1, workers=1) as cluster:
        client = ShardClient(0, cluster.addresses[0], 0, INCARNATION)
        with pytest.raises(RoundFailedError, match="worker 0, which brings them, has not come"):
            client.snapshot(wait_seconds=0.05)
        assert not client.register(registration()).seeded
        values = {"parameters": torch.arange(3.0)}
        data = pack_state(values, {"mean": torch.ones(2)})
        assert client.seed(data)
        assert not client.seed(data), "a second seed is not taken"
        assert client.register(registration()).seeded
        before = client.setup_bytes
        found = client.snapshot(wait_seconds=5.0)
        assert (found.version, found.layout, found.optimizer) == (0, LAYOUT, SGD)
        assert torch.equal(found.state["parameters"], values["parameters"])
        assert torch.equal(found.untrained["mean"], torch.ones(2))
        assert (before, client.setup_bytes > before) == (2 * len(data), True)
        assert (client.push_bytes, client.pull_bytes) == (0, 0)
        assert client.statistics().numel == 3
        client.close()


def test_errors_of_the_shard_keep_their_kind() -> None:
    """What the shard refuses arrives as the class it raised, with its message and the shard's name behind it."""
    other = Layout((TensorSpec("a", (4,), "float32"),))
    with in_process(shards=1, workers=2) as cluster:
        address = cluster.addresses[0]
        client = ShardClient(0, address, 0, INCARNATION)
        client.register(registration(workers=2))
        message = registration(workers=2, rank=1, layout=layout_to_message(other), fingerprint=other.fingerprint)
        with pytest.raises(
            LayoutError, match=rf"(?s)a float32 \[3\] is registered, here it is.*\[shard 0 at {address}\]"
        ):
            client.register(message)
        client.close()


def test_a_push_that_is_rejected() -> None:
    """The verdict and its reason become the error of the step."""
    with in_process(shards=1, workers=1) as cluster:
        client = ShardClient(0, cluster.addresses[0], 0, INCARNATION)
        client.register(registration())
        client.seed(pack_state({"parameters": torch.zeros(3)}, {}))
        client.open(0)
        client.push(pb.Push(step=5, version=5, skipped=True), b"")
        with pytest.raises(RoundFailedError, match=r"push 5 was REJECTED: .* round 0 is open"):
            client.wait_update(LAYOUT.shard_slice(0, 1))
        client.leave(0, b"")
        client.close()
        assert cluster.statistics()[0].state == "finished"


def test_an_exchange_that_was_not_registered() -> None:
    """A stranger's hello ends the stream with an error, not with silence."""
    with in_process(shards=1, workers=1) as cluster:
        client = ShardClient(0, cluster.addresses[0], 0, INCARNATION)
        client.open(0)
        with pytest.raises(ProtocolError, match="register first"):
            client.wait_update(LAYOUT.shard_slice(0, 1))
        client.close()


def test_closing_twice_and_unopened() -> None:
    """Closing is always possible."""
    client = ShardClient(0, unused_address(), 0, 1)
    client.close()
    client.close()


def test_every_error_is_ours() -> None:
    """One ``except`` catches all of the above."""
    assert issubclass(ConnectionTimeoutError, ThresherError)
    assert str(ShardClient(2, "127.0.0.1:7", 0, 1)) == "shard 2 at 127.0.0.1:7"
