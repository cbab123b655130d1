"""`thresher top` on real runs: that begin later, end, fail, lose a shard, or are not there at all."""

import io
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.integration import launching

from thresher.deploy.in_process import InProcess, in_process
from thresher.deploy.stop_signals import StopRequestedError
from thresher.deploy.top import View, follow
from thresher.deploy.watching import ShardLook
from thresher.deploy.watching_places import Access, Place, find
from thresher.deploy.watching_rates import Rates
from thresher.protos.errors import ConnectionTimeoutError
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Session


class Said(io.StringIO):
    """What is printed, for another thread to wait on."""

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 60
        while not re.search(pattern, self.getvalue()):
            assert time.monotonic() < deadline, (pattern, self.getvalue())
            time.sleep(0.01)


def followed(
    place: Place, *, seconds: float = 90.0, meanwhile: Callable[[Said], None] = lambda _: None
) -> tuple[bool, str]:
    """Follow a run, and do something with it on another thread; what is printed, which is checked for nonsense."""
    said = Said()
    thread = threading.Thread(target=meanwhile, args=(said,))
    thread.start()
    try:
        ended_well = follow(place, Console(file=said, width=80), seconds=seconds, interval=0.05)
    finally:
        thread.join()
    assert not re.search(r"\s-\d|\bnan\b|\binf\b", said.getvalue())
    return ended_well, said.getvalue()


def steps(count: int, pause: float = 0.0) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        model = torch.nn.Linear(20, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.wrap(model, optimizer)
        for _ in range(count):
            time.sleep(pause)
            model.weight.grad, model.bias.grad = torch.ones(10, 20), torch.ones(10)
            optimizer.step()

    return work


def place_of(cluster: InProcess) -> Place:
    return Place("run", tuple(partial(str, address) for address in cluster.addresses))


def test_a_run_that_begins_later_is_followed_to_its_end() -> None:
    """First there are no shards, then no workers, then iterations; and it ends by itself."""
    found: list[InProcess] = []
    over = threading.Event()

    def where() -> str:
        if not found:
            raise ConnectionTimeoutError("nobody knows yet")
        return found[0].addresses[0]

    def meanwhile(said: Said) -> None:
        said.wait_for("shard 0 is SILENT")
        with in_process(shards=1, workers=2) as cluster:
            found.append(cluster)
            said.wait_for(r"iteration 0, .* 2 of 2 workers\n")
            cluster.run(steps(40, pause=0.01))
            over.wait(60)

    said = Said()
    thread = threading.Thread(target=meanwhile, args=(said,))
    thread.start()
    ended_well = follow(Place("run", (where,)), Console(file=said, width=80), seconds=90.0, interval=0.05)
    over.set()
    thread.join()
    assert ended_well
    assert re.search(r"per iteration [\d.]+ k?B up and [\d.]+ k?B down", said.getvalue())
    assert said.getvalue().splitlines()[-1].startswith("run has ended. 40 iterations, ")


def test_a_shard_that_is_killed_and_comes_back_is_shown_as_such(tmp_path: Path) -> None:
    """Its row says so while it is gone, the rates go on afterwards, and none is ever negative."""
    with in_process(shards=2, workers=1, state_dir=tmp_path) as cluster:

        def meanwhile(said: Said) -> None:
            training = threading.Thread(target=cluster.run, args=(steps(150, pause=0.01),))
            training.start()
            said.wait_for(r"iteration \d\d")
            cluster.kill(1)
            said.wait_for("shard 1 is SILENT")
            cluster.start(1)
            training.join()

        ended_well, said = followed(place_of(cluster), meanwhile=meanwhile)
    assert ended_well
    silent = [line for line in said.splitlines() if "shard 1 is SILENT" in line]
    assert 0 < len(silent) < len(said.splitlines()) - 3
    assert said.splitlines()[-1].startswith("run has ended. 150 iterations, ")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_launch_is_followed_through_kill_9_of_a_shard(tmp_path: Path) -> None:
    """By its folder, from before it has begun to its last line, which has the numbers of result.json."""
    script = launching.write_script(tmp_path, extra="time.sleep(0.02)", epochs=25)
    launched = launching.start(tmp_path, "--shards", "2", "--density", "0.1", script=[str(script)])
    try:
        while not (launched.run / "launch.json").exists():
            assert launched.process.poll() is None
            time.sleep(0.05)

        def meanwhile(said: Said) -> None:
            said.wait_for(r"iteration \d\d")
            (pid,) = launched.pids("serve --shard 0")
            os.kill(pid, signal.SIGKILL)
            said.wait_for("shard 0 is SILENT")

        ended_well, said = followed(find(str(launched.run), Access()), seconds=150.0, meanwhile=meanwhile)
        assert ended_well
        assert launched.finish()[0] == 0
        result = launching.result(launched)["sparse"]
        assert f"has ended. sparse: {result['steps']:,} iterations in {result['seconds']:,.1f} s" in said
    finally:
        launching.kill(launched)


def test_a_run_that_cannot_be_reached_is_said_to_be_so_and_nothing_hangs() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        place = find(f"127.0.0.1:{taken.getsockname()[1]}", Access())
        ended_well, said = followed(place, seconds=0.3)
    assert not ended_well
    assert "shard 0 is SILENT" in said
    assert " goes on. 0 iterations" in said.splitlines()[-1]


def test_a_run_that_has_failed_is_over_and_says_why() -> None:
    with in_process(shards=2, workers=2, start_timeout=0.2) as cluster:
        session = cluster.connect(0)
        with pytest.raises(Exception, match="worker 1 has never registered"):
            steps(1)(session)
        session.abort("nobody else came")
        ended_well, said = followed(place_of(cluster))
    assert not ended_well
    assert "run has failed: " in said.splitlines()[-1]
    assert "worker 1" in said.splitlines()[-1]


def test_after_its_seconds_it_ends_and_the_run_goes_on() -> None:
    with in_process(shards=1, workers=1) as cluster:
        ended_well, said = followed(place_of(cluster), seconds=0.2)
    assert ended_well
    assert said.splitlines()[-1].startswith("run goes on. 0 iterations, ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_well_and_sigterm_is_told(number: signal.Signals) -> None:
    with in_process(shards=1, workers=1) as cluster:

        def meanwhile(said: Said) -> None:
            said.wait_for("iteration 0")
            os.kill(os.getpid(), number)

        if number == signal.SIGINT:
            ended_well, said = followed(place_of(cluster), meanwhile=meanwhile)
            assert ended_well
            assert "run goes on" in said.splitlines()[-1]
        else:
            with pytest.raises(StopRequestedError, match="SIGTERM"):
                followed(place_of(cluster), meanwhile=meanwhile)


def test_finished_shards_are_not_the_end_of_a_launch() -> None:
    """It may run the baseline next: only its outcome is the end."""
    outcome: list[str] = []
    with in_process(shards=1, workers=1) as cluster:
        cluster.run(steps(2))
        place = Place("run", place_of(cluster).shards, outcome=lambda: "".join(outcome))
        assert followed(place, seconds=0.3)[1].splitlines()[-1].startswith("run goes on. 2 iterations")
        outcome.append("it came to this")
        ended_well, said = followed(place)
    assert ended_well
    assert "0 of 0 workers, shard 0 is ENDED\n" in said
    assert said.splitlines()[-1] == "run has ended. it came to this"


def test_a_terminal_of_80_columns_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn in place, both tables, the bars, what is late, and why a shard is silent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    worker = pb.WorkerStatistics(rank=0, state="exchanging", steps=12_345_678, push_bytes=10**12, origin="a-host:12345")
    told = pb.StatisticsResponse(version=12_345_678, workers=[worker], state="waiting for workers", numel=1)
    looks = [
        ShardLook(0, "100.100.100.100:50000", "SERVING", "waiting for workers", told),
        ShardLook(1, "", "SILENT", "a reason " * 20),
    ]
    rates = [Rates(123_456.0, 123_456.0, 1234.5, 99_999.0, is_late=True), Rates()]
    view = View("the run", looks, rates, [1.0, 2.0, 4.0], is_over=False)
    console = Console(width=80)
    with console.capture() as printed:
        console.print(view.drawing(console))
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed.get()
    shown = (
        "▃▅█",
        "12,345,678",
        "1,234.5",
        "123 kB",
        "99,999.0 s ago",
        "waiting for workers",
        "exchanging",
        "a reason",
    )
    for part in shown:
        assert part in printed.get()


def test_a_terminal_is_drawn_on_in_place_and_keeps_the_last_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with in_process(shards=1, workers=1) as cluster:
        follow(place_of(cluster), console, seconds=0.2, interval=0.05)
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert drawn.count("waiting for workers") > 1
    assert "\x1b[?1049h" not in drawn  # no other screen: what was seen last stays
