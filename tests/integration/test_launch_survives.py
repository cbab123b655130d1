"""What `thresher launch` survives: kills of shards and workers, a stop tonight and a start tomorrow."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.integration import launching
from tests.integration.launching import Launched, write_script

from thresher.deploy import launch
from thresher.deploy.display import Picture
from thresher.deploy.launch import Launch, RunFailedError
from thresher.deploy.launch_config import LaunchConfig
from thresher.deploy.results import RunResult
from thresher.deploy.stop_signals import StopSignals
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConnectionTimeoutError
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Method
from thresher.worker.calls import ShardCalls

pytestmark = pytest.mark.xdist_group("launch_survives")  # its runs are made once, by one process

OPTIONS = ("--workers", "2", "--density", "0.05", "--restart-delay", "0.1")
EPOCHS = 15  # of 8 steps each
TROUBLE = "if session.rank == 1 and session.step == 30: raise KeyError('no such pixel')"

MISSED = 8  # questions to shards, at a quarter of a second each: in that time a process begins

# Shard 0 takes the only push of worker 1, shard 1 returns it for its age. Then worker 1 leaves, and is killed; worker 0
# stays until it is told to go on.
PARTING = """
print("begins")
import os, signal, sys, time
from pathlib import Path
import torch
from thresher.protos import faults
from thresher.worker import connect

folder = Path(sys.argv[1])

def wait_for(name):
    while not (folder / name).exists() or not (folder / name).stat().st_size:
        time.sleep(0.01)

def strike(who, phase):
    if (who, phase) == ("worker 1", "in flight") and not (folder / "on its way").exists():
        (folder / "on its way").write_text("to shard 0, and not to shard 1")
        wait_for("too old")

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
session = connect().wrap(model, optimizer)
if session.rank == 0:
    wait_for("on its way")
    wait_for("shard-0.iterations.jsonl")
while session.step < 2 - session.rank:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with faults.plan(strike):
        optimizer.step()
if session.rank == 0:
    (folder / "too old").write_text("by two rounds")
    wait_for("go on")
else:
    print("is leaving")
    session.close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Runs:
    """Launchers in one folder, with one script."""

    def __init__(self, folder: Path) -> None:
        """Write the script."""
        self.folder = folder
        self.script = str(
            write_script(folder, extra="time.sleep(0.02); exec(os.environ.get('TROUBLE', ''))", epochs=EPOCHS)
        )
        self.started: list[Launched] = []

    def start(self, name: str, *options: str, script: bool = True, trouble: str = "") -> Launched:
        """Start one, whose run is `latest` in a folder of that name; ``trouble`` is what its loop runs into."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        command = [self.script] if script else []
        self.started.append(launching.start(folder, *options, script=command, TROUBLE=trouble))
        return self.started[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Launch in a folder of this module, and leave nothing behind."""
    runs = Runs(tmp_path_factory.mktemp("survives"))
    yield runs
    for launched in runs.started:
        launching.kill(launched)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> dict[str, torch.Tensor]:
    """The model of a run that nothing has happened to."""
    launched = runs.start("undisturbed", *OPTIONS)
    code, _, err = launched.finish()
    assert code == 0, err
    return load_file(launched.run / "model.safetensors")


@pytest.fixture(scope="module")
def resumed(runs: Runs) -> Path:
    """The folder of a run that was stopped and resumed, with the assertions on how it went."""
    launched = runs.start("resumed", *OPTIONS, "--name", "tonight")
    run = launched.run.with_name("tonight")
    launched.wait_step(40)
    launched.process.terminate()
    code, _, err = launched.finish()
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in err
    assert f"thresher launch --resume {run}\n" in err
    assert "Traceback" not in err
    assert not launched.left_over()
    assert not (run / "result.json").exists()
    code, out, err = runs.start("resumed", "--resume", str(run), "--json", "--restarts", "1", script=False).finish()
    assert code == 0, err
    assert json.loads(out)["sparse"]["steps"] == 8 * EPOCHS
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "iterations.jsonl").read_text(encoding="utf-8").splitlines()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_kills_of_a_shard_and_a_worker_change_no_bit(runs: Runs, undisturbed: dict[str, torch.Tensor]) -> None:
    """Kill -9 of both in mid-run: they come back, the log says so, the final model is that of the undisturbed run."""
    launched = runs.start("killed", *OPTIONS)
    launched.wait_step(20)
    os.kill(launched.pids("--shard 0")[0], signal.SIGKILL)
    launched.wait_step(60)
    os.kill(launched.pids(runs.script)[-1], signal.SIGKILL)
    code, _, err = launched.finish()
    assert code == 0, err
    assert same(load_file(launched.run / "model.safetensors"), undisturbed)
    assert [row["version"] for row in rows(launched.run)] == list(range(1, 8 * EPOCHS + 1))
    told = (launched.run / "launch.log").read_text(encoding="utf-8")
    assert told.count("signal SIGKILL; started again in 0.1 s") == 2
    assert "shard 0 is started again (1 of 3)" in told
    assert not launched.left_over()


def test_a_stopped_run_goes_on(resumed: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """SIGTERM in mid-run, then --resume: the final model is that of the undisturbed run, no row is lost or doubled."""
    assert same(load_file(resumed / "model.safetensors"), undisturbed)
    assert [row["version"] for row in rows(resumed)] == list(range(1, 8 * EPOCHS + 1))


@pytest.mark.slow
def test_a_failed_run_and_a_dead_launcher_can_be_resumed(runs: Runs, undisturbed: dict[str, torch.Tensor]) -> None:
    """An exception in a script ends the run, kill -9 of the launcher ends the next; the third one has the same bits."""
    launched = runs.start("unlucky", *OPTIONS, "--name", "unlucky", trouble=TROUBLE)
    code, _, err = launched.finish()
    assert code == 1
    assert "no such pixel" in err
    run = launched.run.with_name("unlucky")
    second = runs.start("unlucky", "--resume", str(run), script=False)
    second.wait_step(60)
    second.process.kill()
    second.process.communicate(timeout=10)
    assert not second.left_over()
    code, _, err = runs.start("unlucky", "--resume", str(run), script=False).finish()
    assert code == 0, err
    assert same(load_file(run / "model.safetensors"), undisturbed)
    assert [row["version"] for row in rows(run)] == list(range(1, 8 * EPOCHS + 1))


@pytest.mark.slow
def test_without_a_folder_a_killed_worker_ends_the_run(runs: Runs) -> None:
    """With --durability none nobody could go on as that worker: the run fails, and names it."""
    launched = runs.start("volatile", *OPTIONS, "--durability", "none")
    launched.wait_step(3)
    os.kill(launched.pids(runs.script)[-1], signal.SIGKILL)
    code, _, err = launched.finish()
    assert code == 1
    assert re.search(r"worker \d failed: signal SIGKILL", err), err
    assert not launched.left_over()


def test_a_finished_run_says_so(runs: Runs, resumed: Path) -> None:
    """--resume of a finished run starts nothing, and shows its results again."""
    before = (resumed / "worker-0.log").read_bytes()
    code, out, err = runs.start("resumed", "--resume", str(resumed), "--json", script=False).finish()
    assert code == 0, err
    assert "is finished" in err
    assert json.loads(out)["sparse"]["steps"] == 8 * EPOCHS
    assert (resumed / "worker-0.log").read_bytes() == before


def test_what_would_make_it_another_run_is_refused(runs: Runs, resumed: Path) -> None:
    """The method, the mode or another script beside --resume: exit code 2, each named."""
    code, _, err = runs.start("resumed", "--resume", str(resumed), "--density", "0.1", "--mode", "async").finish()
    assert code == 2
    assert "leave out --density, --mode, the script beside --resume" in " ".join(err.split())


class EndedError(Exception):
    """Raised from a picture, to end a launch."""


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, RunResult]]:
    """A run that one worker leaves early, stopped and resumed, whose shards miss questions at the worst times."""
    folder = tmp_path_factory.mktemp("parted")
    script = folder / "script.py"
    script.write_text(PARTING, encoding="utf-8")
    consistency = Consistency("async", max_staleness=1)
    method = Method(threshold=0.0)
    config = LaunchConfig((str(script), str(folder)), 2, 2, method, consistency, restart_delay=0.1)
    log, answer = folder / "worker-1.log", ShardCalls.statistics
    missed = 0

    def missing(shard: ShardCalls, timeout: float) -> pb.StatisticsResponse:
        nonlocal missed
        if missed < MISSED and log.exists() and "is leaving" in log.read_text(encoding="utf-8"):
            missed += 1
            raise ConnectionTimeoutError("the shard is busy")
        return answer(shard, timeout)

    def end(picture: Picture) -> None:
        if missed == MISSED and all(shard.workers[1].state == "left" for shard in picture.shards):
            raise EndedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardCalls, "statistics", missing)
        with pytest.raises(EndedError), Launch(config, folder, "stopped", StopSignals()) as stopped:
            stopped.watch(end)
        missed = 0
        (folder / "go on").write_text("and leave", encoding="utf-8")
        with Launch(config, folder, "resumed", StopSignals()) as goes_on:
            yield folder, goes_on.watch(lambda _: None)


@pytest.mark.slow
def test_who_has_left_is_never_started_again(parted: tuple[Path, RunResult]) -> None:
    """Neither when it is killed behind its goodbye nor on --resume, also where shards do not answer at once."""
    assert (parted[0] / "worker-1.log").read_text(encoding="utf-8").count("begins") == 1


@pytest.mark.slow
def test_shards_that_end_at_different_versions_end_a_run_well(parted: tuple[Path, RunResult]) -> None:
    """With --max-staleness each shard returns pushes for itself: the model is saved, and says of which versions."""
    folder, result = parted
    assert (result.steps, result.versions) == (3, [3, 2])
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"versions": "[3, 2]"}
    assert [(row["shard"], row["version"]) for row in rows(folder)] == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]


def test_a_shard_that_never_answers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves, says the launcher's picture of it, but a run is not resumed without knowing who has left it."""

    def never(shard: ShardCalls, timeout: float) -> pb.StatisticsResponse:
        raise ConnectionTimeoutError(f"{shard} is silent for {timeout} s")

    monkeypatch.setattr(ShardCalls, "statistics", never)
    monkeypatch.setattr(launch, "JOURNAL_SECONDS", 3.0)
    (tmp_path / "state").mkdir()
    config = LaunchConfig((__file__,), 1, 1, Method(threshold=0.0), lease=1.0, restart_delay=0.1)
    with pytest.raises(RunFailedError, match=r"shard 0 failed: it has not answered for \d+ s"):
        Launch(config, tmp_path, "silent", StopSignals()).__enter__()
