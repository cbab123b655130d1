"""A Ray cluster on this machine, for measurements and tests; nothing of it is left, and no other one is disturbed."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster


@contextmanager
def local_cluster(**head: Any) -> Iterator[Cluster]:
    """Start a cluster, connect this process to it, and end it with the block.

    It is in a folder of its own, where Ray also notes its address: what ``auto`` means on this machine stays as it is,
    inside of the block too.

    Args:
        head: Of the head node, as ``Cluster.add_node`` takes them.
    """
    # A socket's path must be short. Ray's processes may still write when it goes.
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder, ExitStack() as held:
        held.enter_context(_ray_folder(folder))  # until it has ended: then it strikes out what it has noted
        cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
        held.callback(cluster.shutdown)
        ray.init(str(cluster.address), log_to_driver=False, logging_level=logging.ERROR)
        held.callback(ray.shutdown)
        yield cluster


@contextmanager
def _ray_folder(folder: str) -> Iterator[None]:
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        del os.environ["RAY_TMPDIR"]
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
