"""What the tables say of shards and workers."""

from rich.text import Text

from thresher.deploy.watching import ShardLook
from thresher.deploy.watching_rates import Rates
from thresher.deploy.watching_tables import pace_rows, shard_rows, troubles, worker_rows
from thresher.v1 import aggregation_pb2 as pb

TOLD = pb.StatisticsResponse(
    shard=1,
    state="training",
    version=1234,
    numel=100,
    update_density=0.05,
    threshold=0.00123,
    log_bytes=4096,
    residual_norm=0.25,
    staleness=3,
    last_iteration_age=1.5,
    workers=[
        pb.WorkerStatistics(rank=0, state="exchanging", steps=1234, push_bytes=1000, pull_bytes=3000, density=0.01,
                            pushable_elements=8000, origin="host[1]:7", metrics_address="127.0.0.1:9000", counts=True),
        pb.WorkerStatistics(rank=1, state="lost", steps=1233, push_bytes=500, pull_bytes=1500, density=0.02,
                            pushable_elements=8000, counts=True),
        pb.WorkerStatistics(rank=2, state="lost", density=0.02),
        pb.WorkerStatistics(rank=3, state="left"),
    ],
)  # fmt: skip
SERVING = ShardLook(1, "127.0.0.1:5000", "SERVING", "training", TOLD)
SILENT = ShardLook(0, "", "SILENT", "it has not answered yet")


def test_a_shard_has_a_row_whether_it_is_known_or_not() -> None:
    silent, serving = shard_rows([SILENT, SERVING])
    assert serving == {
        "shard": "1", "state": "SERVING: training", "where": "127.0.0.1:5000", "version": "1,234", "members": "2",
        "last iteration": "1.5 s ago",
        "bytes up": "1,500", "bytes down": "4,500", "density": "5.00%", "ratio": "21.3", "threshold": "0.00123",
        "residual": "0.25", "staleness": "3",
        "log": "4.1 kB",
    }  # fmt: skip
    assert silent.keys() == serving.keys()
    assert [silent["shard"], silent["state"]] == ["0", "SILENT"]
    assert set(list(silent.values())[2:]) == {"–"}


def test_a_pace_is_shown_as_far_as_it_is_known() -> None:
    rates = [Rates(age=12.0), Rates(1000.0, 2500.0, 31.25, 0.25)]
    silent, serving = pace_rows([SILENT, SERVING], rates)
    assert [str(serving[one]) for one in ("state", "/s", "up", "down", "last")] == [
        "training", "31.2", "1 kB", "2.5 kB", "0.2 s ago",
    ]  # fmt: skip
    assert [str(silent[one]) for one in ("state", "/s", "up", "last")] == ["SILENT", "–", "–", "12.0 s ago"]


def test_what_is_late_or_lost_is_loud() -> None:
    row, calm = (pace_rows([SERVING], [Rates(age=60.0, is_late=late)])[0]["last"] for late in (True, False))
    assert isinstance(row, Text)
    assert isinstance(calm, Text)
    assert (row.style, calm.style) == ("bold red", "")
    workers = worker_rows([SERVING])
    assert [isinstance(worker["state"], Text) for worker in workers] == [False, True, True, False]


def test_a_worker_has_a_row() -> None:
    first = worker_rows([SILENT, SERVING])[0]
    assert first == {
        "worker": "0", "state": "exchanging", "steps": "1,234", "density": "1.00%", "ratio": "16.0",
        "bytes up": "1,000", "bytes down": "3,000", "where": "host[1]:7", "metrics": "127.0.0.1:9000",
    }  # fmt: skip
    assert worker_rows([SILENT]) == []


def test_why_shards_do_not_serve_is_said_once() -> None:
    other = ShardLook(2, "", "FAILED", "another reason")
    silent = ShardLook(3, "", "SILENT", SILENT.reason)
    assert list(troubles([SILENT, SERVING, other, silent])) == [
        "shards 0, 3 are SILENT: it has not answered yet",
        "shard 2 is FAILED: another reason",
    ]
    assert list(troubles([SERVING])) == []
