"""Joining: all shards or none, and the same beginning for everybody."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from thresher.deploy.in_process import in_process
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, LayoutError, RegistrationError
from thresher.protos.optimizers import OptimizerSpec
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Method, Settings, connect
from thresher.worker.joining import _listed, join
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import GradientPlaced

SPEC = OptimizerSpec("SGD", ({"lr": 1.0},))


def model_parameters(model: nn.Module) -> ModelParameters:
    return ModelParameters(model, torch.optim.SGD(model.parameters(), lr=1.0))


def settings_of(addresses: tuple[str, ...]) -> Settings:
    return Settings(addresses, rank=0, workers=1, method=Method(threshold=0.0), connect_timeout=5.0)


def exchange_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shard-")]


def test_replicas_begin_as_the_model() -> None:
    """Each shard's replica holds the shard's slice of rank 0's parameters, at version 0."""
    model = nn.Linear(3, 2)
    parameters = model_parameters(model)
    with in_process(shards=3, workers=1) as cluster:
        joined = join(settings_of(cluster.addresses), parameters, SPEC, GradientPlaced(SPEC), "")
        flat = torch.cat([shard.follower.parameters for shard in joined])
        assert torch.equal(flat, torch.cat([parameter.detach().view(-1) for parameter in model.parameters()]))
        assert [shard.slice for shard in joined] == list(parameters.layout.slices(3))
        assert {shard.follower.version for shard in joined} == {0}
        for shard in joined:
            shard.client.leave(pb.Leave(), b"")
            shard.client.wait_left()
            shard.client.close()


def test_a_missing_shard_is_found_before_any_is_joined() -> None:
    """Nobody is registered anywhere when one shard is not there, and no stream stays open."""
    with in_process(shards=1, workers=1) as cluster:
        settings = replace(settings_of((*cluster.addresses, "127.0.0.1:1")), connect_timeout=0.2)
        with pytest.raises(ConnectionTimeoutError, match=r"shard 1 at 127\.0\.0\.1:1"):
            join(settings, model_parameters(nn.Linear(3, 2)), SPEC, GradientPlaced(SPEC), "")
        assert cluster.statistics()[0].members[0].state == "waited for"
    assert not exchange_threads()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reconnect_timeout": 4.0}, "lease of 5 s is longer than reconnect timeout of 4 s: a worker would give up"),
        ({"consistency": Consistency(quorum=1, grace=10.0)}, "grace of 10 s is longer than round timeout of 9 s"),
    ],
)
def test_time_outs_that_cannot_work_with_those_of_a_shard_are_refused(change: dict[str, Any], message: str) -> None:
    """The shard says how long it waits; a worker that was told what does not go with that says both, and why."""
    with in_process(shards=1, workers=1, lease=5.0, round_timeout=9.0) as cluster:
        settings = replace(settings_of(cluster.addresses), **change)
        with pytest.raises(ConfigurationError, match=f"worker 0 and shard 0 at .* cannot work together: {message}"):
            join(settings, model_parameters(nn.Linear(3, 2)), SPEC, GradientPlaced(SPEC), "")
        assert not exchange_threads()


def test_shards_in_another_order_are_refused() -> None:
    """A worker that lists the shards differently would write to the wrong slices."""
    with in_process(shards=2, workers=1) as cluster:
        settings = settings_of(cluster.addresses[::-1])
        with pytest.raises(RegistrationError, match="takes this for shard 0 of 2, it is shard 1 of 2"):
            join(settings, model_parameters(nn.Linear(3, 2)), SPEC, GradientPlaced(SPEC), "")


def many_tensors(count: int) -> ModelParameters:
    """A model whose layout takes about a kilobyte for each tensor, and whose state is larger than a chunk."""
    model = nn.Module()
    model.register_parameter("large", nn.Parameter(torch.zeros(300_000)))
    for index in range(count):
        model.register_parameter(f"{'deep_' * 200}{index}", nn.Parameter(torch.zeros(1)))
    return model_parameters(model)


def test_a_model_of_too_many_tensors_is_refused() -> None:
    """What gRPC would refuse without a word on why: a layout larger than its messages."""
    with pytest.raises(LayoutError, match="of 3501 trained and 0 other tensors take 3,5"):
        join(settings_of(("127.0.0.1:1",)), many_tensors(3500), SPEC, GradientPlaced(SPEC), "")


def test_the_largest_layout_that_is_not_refused_joins() -> None:
    """It fits a registration, and a snapshot too, whose first message has a chunk of the state beside the layout."""
    parameters = many_tensors(3000)
    with in_process(shards=1, workers=1) as cluster:
        (joined,) = join(settings_of(cluster.addresses), parameters, SPEC, GradientPlaced(SPEC), "")
        assert joined.follower.parameters.numel() == 303_000
        joined.client.leave(pb.Leave(), b"")
        joined.client.wait_left()
        joined.client.close()


def test_registration_tells_who_and_where() -> None:
    """The shard knows the worker's host, process and metrics endpoint."""
    with in_process(shards=1, workers=1) as cluster:
        settings = replace(settings_of(cluster.addresses), metrics_listen="127.0.0.1:0")
        with connect(settings=settings) as session:
            model = nn.Linear(1, 1)
            session.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
            member = cluster.statistics()[0].members[0]
    assert member.origin.count(":") == 1
    assert member.metrics_address.startswith("127.0.0.1:")


def test_long_lists_of_names_are_cut() -> None:
    """A large model does not fill the log."""
    assert _listed(["a", "b"]) == "a, b"
    assert _listed(list("abcdefg"), limit=5) == "a, b, c, d, e and 2 more"
