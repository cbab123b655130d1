"""Runs on real nodes: started, trained on while a shard is killed, looked at, and ended without a trace."""

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table

from thresher.deploy.in_process import in_process
from thresher.deploy.ray_cluster import RayConfig, down, status, up
from thresher.deploy.ray_cluster.calls import actor_of, namespace_of
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, DataLossError, JournalError
from thresher.worker import Method, Session, connect
from thresher.worker.settings import settings_from

pytestmark = [pytest.mark.usefixtures("two_nodes"), pytest.mark.xdist_group("ray")]

SECONDS = 100.0
STEPS = 20
METHOD = Method(density=0.25)


def a_run(name: str, folder: Path, shards: int = 3, workers: int = 0) -> RayConfig:
    return RayConfig(name, shards, workers, METHOD, state_dir=folder, insecure=True)


@contextmanager
def running(config: RayConfig) -> Iterator[RayConfig]:
    up(config, deadline=SECONDS)
    try:
        yield config
    finally:
        down(config.name)


def left_of(run: str) -> list[object]:
    """What Ray still holds of a run."""
    everything: Any = list_named_actors(all_namespaces=True)
    actors = [named for named in everything if named["namespace"] == namespace_of(run)]
    groups = [group for group in placement_group_table().values() if run in group["name"]]
    return [*actors, *(group for group in groups if group["state"] != "REMOVED")]


def train(session: Session, strike: int = -1, victim: int = 0) -> list[torch.Tensor]:
    """Make all steps; kill the process ``victim`` before step ``strike``."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    seeded = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.wrap(model, optimizer)
    while session.step < STEPS:
        if session.step == strike:
            os.kill(victim, signal.SIGKILL)
        data = torch.randn(8, 20, generator=torch.Generator().manual_seed(1000 * session.rank + session.step))
        optimizer.zero_grad()
        loss: torch.Tensor = (model(data) - 1.0).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def work(run: str, rank: int, strike: int = -1, victim: int = 0) -> list[torch.Tensor]:
    """One of two workers, which knows its rank, and nothing else of the run than its name."""
    place = {"THRESHER_RANK": str(rank), "THRESHER_WORKERS": "2"}
    settings = settings_from(place, addresses=f"ray://{run}")
    with connect(settings=settings) as session:
        return train(session, strike, victim)


def lock_is_free(folder: Path) -> bool:
    with (folder / "lock").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_refused(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_run_goes_on_when_a_shard_is_killed_and_leaves_nothing_when_it_ends(tmp_path: Path) -> None:
    """The same bits as where nothing happened; at the end neither actor, group, port nor lock, but a checkpoint."""
    with in_process(shards=2, workers=2, method=METHOD) as undisturbed:
        expected = undisturbed.run(train)

    with running(replace(a_run("life", tmp_path, shards=2), strict_spread=True)), ThreadPoolExecutor(2) as pool:
        begun = status("life")
        assert [one.state for one in begun] == ["SERVING"] * 2
        assert len({one.address for one in begun}) == 2
        workers = [pool.submit(work, "life", 0, 10, begun[1].pid), pool.submit(work, "life", 1)]
        results = [worker.result(timeout=SECONDS) for worker in workers]
        ended = status("life")
    assert all(torch.equal(one, other) for got in results for one, other in zip(got, expected[0], strict=True))
    assert [(one.state, one.reason, one.version) for one in ended] == [("SERVING", "finished", STEPS)] * 2
    assert [one.pid == before.pid for one, before in zip(ended, begun, strict=True)] == [True, False]
    assert all(one.bytes_up and one.bytes_down and one.last_iteration_age is not None for one in ended)

    assert left_of("life") == []
    assert not list(tmp_path.glob(".probe*"))
    assert all(is_refused(address) for one in ended for address in (one.address, one.metrics_address))
    assert all(lock_is_free(tmp_path / f"shard-{shard}") for shard in range(2))
    assert all(list((tmp_path / f"shard-{shard}").glob("checkpoint*")) for shard in range(2))


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    """From its folder; and what goes on there is kept from everybody else. Damage is told, and leaves nothing."""
    with running(a_run("whole", tmp_path, shards=1)), ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["whole"] * 2, range(2)))
    with running(a_run("whole", tmp_path, shards=1)):
        assert [(one.state, one.version) for one in status("whole")] == [("SERVING", STEPS)]
        with pytest.raises(JournalError, match="another process uses it"):
            up(a_run("thief", tmp_path, shards=1), deadline=SECONDS)
        with pytest.raises(ConfigurationError, match="thresher ray down whole"):
            up(a_run("whole", tmp_path, shards=1), deadline=SECONDS)
        assert [(one.state, one.version) for one in status("whole")] == [("SERVING", STEPS)]
    with pytest.raises(DataLossError, match="shard 0 of 1"):
        up(a_run("other", tmp_path, shards=2), deadline=SECONDS)
    for file in [path for path in (tmp_path / "shard-0").rglob("*") if path.is_file()]:
        file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()))
    with pytest.raises(DataLossError):
        up(a_run("damaged", tmp_path, shards=1), deadline=SECONDS)
    assert [left_of(run) for run in ("whole", "thief", "other", "damaged")] == [[], [], [], []]


@pytest.mark.slow
def test_two_runs_do_not_see_each_other(tmp_path: Path) -> None:
    """One ends, and the other has not noticed."""
    with running(a_run("right", tmp_path / "right", shards=1)) as right:
        with running(a_run("left", tmp_path / "left", shards=2)):
            assert not {one.address for one in status("left")} & {one.address for one in status("right")}
        assert left_of("left") == []
        assert [one.state for one in status(right.name)] == ["SERVING"]


@pytest.mark.slow
def test_no_room_is_told_and_leaves_nothing() -> None:
    """With and without a wish for nodes of their own; what was asked and what there is."""
    asked = RayConfig("wide", 3, cpus=1.5, insecure=True, durability="none")
    with pytest.raises(ConfigurationError, match=r"3 shards with 1.5 CPU each.*2 CPU on .*of which 4 CPU are free"):
        up(asked, deadline=2)
    with pytest.raises(ConfigurationError, match="each on a node of its own"):
        up(replace(asked, shards=4, cpus=0.5, strict_spread=True), deadline=2)
    assert left_of("wide") == []


@pytest.mark.slow
def test_shards_that_do_not_serve_in_time_are_named_and_cleared_away() -> None:
    config = RayConfig("late", 2, insecure=True, durability="none")
    with pytest.raises(ConnectionTimeoutError, match="shard 0, shard 1 did not serve within"):
        up(config, deadline=0.1)
    assert left_of("late") == []


def test_what_makes_no_sense_is_refused_before_anything_is_placed(tmp_path: Path) -> None:
    """No such run, a name that is none, plain text between nodes that nobody asked for."""
    for verb in (status, down):
        with pytest.raises(ConfigurationError, match="there is no run nobody on this cluster"):
            verb("nobody")
        with pytest.raises(ConfigurationError, match="is no name of a run"):
            verb("two words")
    with pytest.raises(ConfigurationError, match="would not be encrypted"):
        up(replace(a_run("plain", tmp_path), insecure=False))
    assert left_of("plain") == []


@pytest.mark.slow
def test_what_cannot_answer_is_told_as_such_and_still_ended(tmp_path: Path) -> None:
    """A shard that is stopped is silent, one that was ended by hand has failed; both have their rows, and go."""
    up(a_run("sick", tmp_path), deadline=SECONDS)
    healthy = status("sick")
    os.kill(healthy[0].pid, signal.SIGSTOP)
    ray.kill(actor_of("sick", 1), no_restart=True)
    while True:
        seen = status("sick", timeout=1)
        if [one.state for one in seen] == ["SILENT", "FAILED", "SERVING"]:
            break
    assert "has not answered in 1 s" in seen[0].reason
    assert "Ray has given it up" in seen[1].reason
    assert [one.node for one in seen] == [one.node for one in healthy]
    down("sick", timeout=10)
    assert left_of("sick") == []


@pytest.mark.slow
def test_an_end_that_was_asked_for_before_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever asked first may be gone; the checkpoints are written all the same."""
    up(a_run("again", tmp_path), deadline=SECONDS)
    for shard in range(3):
        actor_of("again", shard).drain.remote()
    down("again")
    assert left_of("again") == []
    assert [record.getMessage() for record in caplog.records if record.name.startswith("thresher")] == []


@pytest.mark.slow
@pytest.mark.timeout(300)  # it begins three times
def test_a_run_ends_at_once_and_while_a_shard_is_started_again(tmp_path: Path) -> None:
    """Without a drain, and whatever Ray was doing; the next one goes on with the folder, however lately it was used."""
    for timeout in (0.0, 10.0):
        up(a_run("hasty", tmp_path, shards=2), deadline=SECONDS)
        os.kill(status("hasty")[1].pid, signal.SIGKILL)
        down("hasty", timeout=timeout)
        assert left_of("hasty") == []
    with running(a_run("hasty", tmp_path, shards=2)):
        assert [one.state for one in status("hasty")] == ["SERVING"] * 2


@pytest.mark.slow
def test_of_two_that_begin_the_same_run_one_is_refused(tmp_path: Path) -> None:
    """In the same instant; the other one's shards are left alone."""

    def begin(_: int) -> ConfigurationError | None:
        try:
            up(a_run("twins", tmp_path, shards=1), deadline=SECONDS)
        except ConfigurationError as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(begin, range(2)))
    (refused,) = (error for error in told if error is not None)
    assert "there is a run twins" in str(refused)
    assert [one.state for one in status("twins")] == ["SERVING"]
    down("twins")
    assert left_of("twins") == []
