"""`thresher status`: what it says, as a table and as JSON."""

import json
import socket
from functools import partial
from pathlib import Path

from rich.console import Console
from tests.deploy.test_watching import one_step

from thresher.deploy import status
from thresher.deploy.in_process import in_process
from thresher.deploy.watching import ShardLook
from thresher.deploy.watching_places import Access, Place, find
from thresher.v1 import aggregation_pb2 as pb

RUN = {
    "name", "shards", "serving", "iterations", "workers", "members", "push_bytes", "pull_bytes", "density",
    "compression_ratio",
}  # fmt: skip
SHARD = {
    "shard", "where", "state", "reason", "version", "numel", "members", "push_bytes", "pull_bytes", "update_density",
    "threshold", "log_bytes", "round_seconds", "residual_norm", "staleness", "last_iteration_age",
}  # fmt: skip
WORKER = {
    "rank", "state", "steps", "push_bytes", "pull_bytes", "pushed_elements", "pushable_elements", "density", "origin",
    "metrics_address", "counts",
}  # fmt: skip


def test_the_document_has_everybody_and_says_what_is_not_known() -> None:
    """One shard that serves and one that is not there: the same keys, and null."""
    with in_process(shards=1, workers=2) as cluster, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        cluster.run(one_step)
        place = find(f"{cluster.addresses[0]},127.0.0.1:{taken.getsockname()[1]}", Access())
        looks = status.look_once(place, 10.0)
        document = json.loads(json.dumps(status.document(place, looks)))
    assert document.keys() == {"run", "shards", "workers"}
    assert document["run"].keys() == RUN
    assert {frozenset(shard) for shard in document["shards"]} == {frozenset(SHARD)}
    assert {frozenset(worker) for worker in document["workers"]} == {frozenset(WORKER)}
    assert (document["run"]["shards"], document["run"]["serving"], document["run"]["iterations"]) == (2, 1, 1)
    assert [shard["state"] for shard in document["shards"]] == ["SERVING", "SILENT"]
    assert [shard["version"] for shard in document["shards"]] == [1, None]
    assert [(worker["rank"], worker["state"], worker["steps"]) for worker in document["workers"]] == [
        (0, "left", 1), (1, "left", 1),
    ]  # fmt: skip
    assert document["run"]["push_bytes"] == document["shards"][0]["push_bytes"] > 0
    serving, silent = document["shards"]
    assert (serving["residual_norm"], serving["staleness"]) == (0.0, 0)  # everything was sent
    assert serving["last_iteration_age"] >= 0
    assert silent["last_iteration_age"] is None
    assert not status.all_serve(looks)
    assert status.all_serve(looks[:1])


def test_the_table_fits_and_says_why() -> None:
    """80 characters, one table of shards and one of workers, and the reason below."""
    told = pb.StatisticsResponse(state="training", workers=[pb.WorkerStatistics(rank=0, state="exchanging", steps=7)])
    looks = [
        ShardLook(0, "100.100.100.100:50000", "SERVING", "waiting for workers", told),
        ShardLook(1, "", "SILENT", "[no] answer"),
    ]
    place, console = Place("the run", (partial(str, ""),) * 2), Console(width=80)
    with console.capture() as printed:
        status.show(place, looks, console)
    lines = printed.get().splitlines()
    assert lines[0].strip() == "the run"
    assert lines[-1] == "shard 1 is SILENT: [no] answer"
    assert max(map(len, lines)) <= 80
    for part in ("SERVING: waiting for workers", "100.100.100.100:50000", "exchanging", "version"):
        assert part in printed.get()


def test_before_anybody_answers_there_is_a_table_of_shards(tmp_path: Path) -> None:
    console = Console(width=80)
    with console.capture() as printed:
        status.show(Place("the run", (partial(str, ""),)), [ShardLook(0, "", "SILENT", "nothing")], console)
    assert "worker" not in printed.get()
