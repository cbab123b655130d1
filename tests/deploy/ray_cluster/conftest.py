"""Ray clusters for the tests of this folder: each in a session folder of its own, one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from thresher.deploy.ray_cluster.local import local_cluster


@contextmanager
def started(nodes: int, cpus: int) -> Iterator[str]:
    """Start a cluster, connect this process to it, and end it with the block. Yields its address."""
    with local_cluster(num_cpus=cpus) as cluster:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cpus)
        yield str(cluster.address)


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[str]:
    """Three nodes with one CPU each."""
    with started(nodes=3, cpus=1) as address:
        yield address


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Two nodes with two CPUs each."""
    with started(nodes=2, cpus=2) as address:
        yield address


@pytest.fixture(scope="module")
def one_node() -> Iterator[str]:
    """One node with two CPUs."""
    with started(nodes=1, cpus=2) as address:
        yield address
