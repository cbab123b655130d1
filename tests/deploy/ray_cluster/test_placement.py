"""Room for shards on real nodes: one bundle each, on different nodes; what cannot be had is told, and not kept."""

import time
from pathlib import Path

import pytest
import ray

from thresher.deploy.ray_cluster import placement
from thresher.deploy.ray_cluster.config import RayConfig
from thresher.protos.errors import ConfigurationError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("three_nodes"), pytest.mark.xdist_group("ray")]

SECONDS = 60.0


def a_run(name: str, shards: int, cpus: float = 1.0, *, strict: bool = False) -> RayConfig:
    return RayConfig(name, shards, state_dir=Path("/shared"), cpus=cpus, strict_spread=strict)


def wait_until_free(cpus: float) -> None:
    """Return once so many CPUs are free; the test's own deadline is the limit."""
    while ray.available_resources().get("CPU", 0) != cpus:  # type: ignore[no-untyped-call]
        time.sleep(0.1)


@pytest.mark.parametrize("strict", [False, True])
def test_each_shard_has_a_node_of_its_own_and_gives_it_back(strict: bool) -> None:
    config = a_run("roomy", 3, strict=strict)
    group = placement.reserve(config, until=time.monotonic() + SECONDS)
    assert list(placement.find("roomy")) == [group.id.hex()]
    nodes = placement.nodes_of("roomy")
    assert sorted(nodes) == [0, 1, 2]
    assert len(set(nodes.values())) == 3
    assert placement.find("other") == {}
    assert placement.remove([group], until=time.monotonic() + SECONDS)
    assert (placement.find("roomy"), placement.nodes_of("roomy")) == ({}, {})
    wait_until_free(3)


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (a_run("many", 4), "no room for 4 shards with 1 CPU each, and"),
        (a_run("wide", 1, 1.5), "no room for 1 shards with 1.5 CPU each, and"),
        (a_run("strict", 4, 0.5, strict=True), "no room for 4 shards with 0.5 CPU each, each on a node of its own"),
    ],
)
def test_what_there_is_no_room_for_is_told_and_not_kept(config: RayConfig, asked: str) -> None:
    """Both what was asked and what each node has; afterwards nothing is reserved or waits to be."""
    with pytest.raises(ConfigurationError) as told:
        placement.reserve(config, until=time.monotonic() + 1)
    assert asked in str(told.value)
    assert str(told.value).count("1 CPU on ") == 3
    assert "of which 3 CPU are free" in str(told.value)
    assert placement.find(config.name) == {}
    wait_until_free(3)
