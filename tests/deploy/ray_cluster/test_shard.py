"""One shard as an actor: it says where it is, ends in peace, and stays to tell why it cannot serve."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from thresher.deploy.in_process import in_process
from thresher.deploy.ray_cluster.config import RayConfig
from thresher.deploy.ray_cluster.shard import RemoteShard, Whereabouts
from thresher.protos.errors import JournalError, ProtocolError
from thresher.worker.calls import ShardCalls

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_node"), pytest.mark.xdist_group("ray")]

SECONDS = 60.0


@contextmanager
def acting(folder: Path) -> Iterator[Any]:
    """The only shard of a run, on a thread of nobody but Ray."""
    config = RayConfig("acts", state_dir=folder, insecure=True)
    actor: Any = RemoteShard.options(num_cpus=0).remote(config, 0)
    try:
        yield actor
    finally:
        ray.kill(actor)


def test_it_says_where_it_is_and_serves_there(tmp_path: Path) -> None:
    """The address is that of a shard, the process one that lives here, and the variables those of the run."""
    with acting(tmp_path) as actor:
        where = ray.get(actor.where.remote(), timeout=SECONDS)
        assert isinstance(where, Whereabouts)
        os.kill(where.pid, 0)
        assert where.node_id in {node["NodeID"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
        calls = ShardCalls(0, where.address, "the test")
        try:
            assert calls.statistics(timeout=SECONDS).version == 0
        finally:
            calls.close()
        told: Any = ray.get(actor.statistics.remote(), timeout=SECONDS)
        assert (told["shard"], told["version"], told["last_iteration_age"]) == (0, 0, None)
        variables: Any = ray.get(actor.variables.remote(), timeout=SECONDS)
        assert variables["THRESHER_SHARDS"] == "ray://acts/0"


def test_a_drained_shard_has_let_go_of_its_folder_and_says_so(tmp_path: Path) -> None:
    """Once and again; who looks is told at once, however long the drain takes."""
    with acting(tmp_path) as actor:
        ray.get(actor.where.remote(), timeout=SECONDS)
        ray.get(actor.drain.remote(), timeout=SECONDS)
        ray.get(actor.drain.remote(), timeout=SECONDS)
        for question in (actor.where, actor.statistics):
            with pytest.raises(ProtocolError, match="was drained"):
                ray.get(question.remote(), timeout=SECONDS)
        with in_process(shards=1, workers=1, state_dir=tmp_path) as next_one:
            assert [one.version for one in next_one.statistics()] == [0]


def test_a_shard_that_cannot_be_had_stays_to_say_why(tmp_path: Path) -> None:
    """Whatever is asked of it; to drain it is no error."""
    (tmp_path / "shard-0").touch()  # a file, where its folder should be
    for folder, error in ((tmp_path, JournalError), (Path("/no\0path"), ProtocolError)):
        with acting(folder) as actor:
            for question in (actor.where, actor.statistics):
                with pytest.raises(error, match="shard-0" if error is JournalError else "cannot be served on"):
                    ray.get(question.remote(), timeout=SECONDS)
            ray.get(actor.drain.remote(), timeout=SECONDS)
