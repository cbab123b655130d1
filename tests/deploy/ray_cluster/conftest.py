"""Ray clusters for the tests of this folder: each in a session folder of its own, one at a time."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster


@contextmanager
def started(nodes: int, cpus: int) -> Iterator[str]:
    """Start a cluster, connect this process to it, and end it with the block. Yields its address."""
    session = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    head = {"num_cpus": cpus, "temp_dir": str(session), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cpus)
        ray.init(cluster.address, log_to_driver=False)
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(session, ignore_errors=True)


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
