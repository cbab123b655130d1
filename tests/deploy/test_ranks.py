"""`thresher worker`: ranks are taken, held, given back by a kill, and never taken again from who has left."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import grpc
import pytest

from thresher.deploy.in_process import in_process
from thresher.deploy.ranks import Seat, take_rank
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError
from thresher.server.server import SERVICE
from thresher.v1 import aggregation_pb2 as pb

COMMAND = """
import typer
from thresher.deploy.ranks import worker
app = typer.Typer()
app.command(context_settings={"allow_interspersed_args": False})(worker)
app()
"""

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
from thresher.worker import connect

model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
session = connect().wrap(model, optimizer)
death = Path(sys.argv[1])
while session.step < 6:
    if session.step == 3 and session.rank == 1 and not death.exists():
        death.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
print(json.dumps({"steps": session.step, "own": os.environ["THRESHER_OWN"]}))
"""


@contextmanager
def seats(environment: dict[str, str], count: int) -> Iterator[list[Seat]]:
    """Take some ranks, and let go of them in the end."""
    taken: list[Seat] = []
    try:
        for _ in range(count):
            seat = take_rank(environment)
            assert seat is not None
            taken.append(seat)
        yield taken
    finally:
        for seat in taken:
            os.close(seat.lock)


def of(folder: Path, addresses: tuple[str, ...], workers: int) -> dict[str, str]:
    return {
        "THRESHER_SHARDS": ",".join(addresses),
        "THRESHER_WORKERS": str(workers),
        "THRESHER_STATE_DIR": str(folder / "new" / "folder"),
        "THRESHER_OWN": "/rows-{rank}.jsonl",
        "OTHER": "{rank}",
    }


def test_each_rank_is_taken_once_and_again_when_it_is_free(tmp_path: Path) -> None:
    with in_process(shards=2, workers=3) as cluster:
        environment = of(tmp_path, cluster.addresses, 3)
        with seats(environment, 3) as taken:
            assert [seat.rank for seat in taken] == [0, 1, 2]
            with pytest.raises(ConfigurationError, match=r"all 3 ranks in .* are taken"):
                take_rank(environment)
        with seats(environment, 1) as (again,):
            assert again.rank == 0


def test_a_seat_says_its_rank_in_all_settings_and_nowhere_else(tmp_path: Path) -> None:
    with in_process(shards=1, workers=2) as cluster:
        environment = of(tmp_path, cluster.addresses, 2)
        with seats(environment, 2) as (_, second):
            assert second.variables == {
                **environment, "THRESHER_RANK": "1", "THRESHER_OWN": "/rows-1.jsonl",
            }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_worker_finds_its_memory_and_one_that_has_left_is_not_begun_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", COMMAND, str(tmp_path / "script.py"), str(tmp_path / "death")]
        return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)

    def end(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
        out, _ = process.communicate(timeout=60)
        return process.returncode, out.splitlines()

    with in_process(shards=2, workers=2) as cluster:
        environment = of(tmp_path, cluster.addresses, 2)
        lives = [start(), start()]
        killed = next(life for life in iter_ended(lives) if life.returncode == -9)
        assert end(killed) == (-9, ['{"rank": 1}'])
        next_life = start()
        ends = [end(next_life), end(next(life for life in lives if life is not killed))]
        assert ends == [(0, [f'{{"rank": {rank}}}', f'{{"steps": 6, "own": "/rows-{rank}.jsonl"}}']) for rank in (1, 0)]
        assert [shard.version for shard in cluster.statistics()] == [6, 6]
        assert end(start()) == (0, [])


def iter_ended(processes: "list[subprocess.Popen[str]]") -> "Iterator[subprocess.Popen[str]]":
    """Yield processes as they end; pytest's time limit is the deadline."""
    while True:
        for process in processes:
            if process.poll() is not None:
                yield process


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"THRESHER_RANK": "0"}, "THRESHER_RANK is set"),
        ({"THRESHER_STATE_DIR": None}, "THRESHER_STATE_DIR is not set"),
        ({"THRESHER_STATE_DIR": "/proc/nothing"}, "/proc/nothing cannot be made"),
        ({"THRESHER_WORKERS": None}, "THRESHER_WORKERS must be"),
        ({"THRESHER_WORKERS": "0"}, "THRESHER_WORKERS must be"),
        ({"THRESHER_WORKERS": "two"}, "THRESHER_WORKERS must be"),
        ({"THRESHER_SHARDS": "nowhere"}, "is not an address"),
        ({"THRESHER_SHARDS": "10.0.0.7:5000"}, "would not be encrypted"),
    ],
)
def test_settings_that_make_no_sense_are_told(tmp_path: Path, changed: dict[str, str | None], message: str) -> None:
    settings = {**of(tmp_path, ("127.0.0.1:1",), 2), **changed}
    with pytest.raises(ConfigurationError, match=message):
        take_rank({name: value for name, value in settings.items() if value is not None})


def test_shards_that_are_not_there_are_waited_for_and_named(tmp_path: Path) -> None:
    environment = {**of(tmp_path, ("127.0.0.1:1",), 1), "THRESHER_CONNECT_TIMEOUT": "0.3"}
    for _ in range(2):  # the rank is free again
        with pytest.raises(ConnectionTimeoutError, match=r"shard 0 at 127\.0\.0\.1:1"):
            take_rank(environment)


@contextmanager
def hanging() -> Iterator[str]:
    """A shard that answers once, and then no more: its disk or its machine hangs. Yields its address."""
    asked, over = Event(), Event()

    def answer(request: pb.StatisticsRequest, context: grpc.ServicerContext) -> pb.StatisticsResponse:
        if asked.is_set():
            over.wait()
        asked.set()
        return pb.StatisticsResponse()

    method = grpc.unary_unary_rpc_method_handler(
        answer, pb.StatisticsRequest.FromString, pb.StatisticsResponse.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Statistics": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        over.set()
        server.stop(None).wait()


@pytest.mark.timeout(30)
def test_a_shard_that_hangs_keeps_a_rank_no_longer_than_the_connect_timeout(tmp_path: Path) -> None:
    """The rank is locked all the while: nobody else could take it, and the caller said how long is too long."""
    with hanging() as address:
        environment = {**of(tmp_path, (address,), 1), "THRESHER_CONNECT_TIMEOUT": "1"}
        with pytest.raises(ConnectionTimeoutError, match=f"shard 0 at {address} did not answer worker 0 in time"):
            take_rank(environment)
