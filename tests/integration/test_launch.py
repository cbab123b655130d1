"""`thresher launch` as a user runs it: real processes, real gRPC, good days and bad ones."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.integration import launching
from tests.integration.launching import Launched, write_script
from torch import nn

Starter = Callable[..., Launched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Start launchers in a folder of the test, and leave none behind."""
    started: list[Launched] = []

    def one(*options: str, extra: str = "pass", epochs: int = 5, script: list[str] | None = None) -> Launched:
        script = script if script is not None else [str(write_script(tmp_path, extra=extra, epochs=epochs))]
        started.append(launching.start(tmp_path, *options, script=script))
        return started[-1]

    yield one
    for launched in started:
        launching.kill(launched)


def test_a_run_leaves_result_model_rows_and_logs(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder holds what the README promises, the numbers agree with each other, and no process is left."""
    # A variable of another run must not reach this one's workers.
    monkeypatch.setenv("THRESHER_PAPER_RULE", "1")
    launched = start("--shards", "2", "--workers", "2", "--density", "0.05", "--baseline", "--json", "--seed", "3")
    code, out, err = launched.finish(150)
    assert code == 0, err
    document = launching.result(launched)
    assert {key: document[key] for key in ("workers", "shards", "seed")} == {"workers": 2, "shards": 2, "seed": 3}
    assert json.loads(out) == {name: document[name] for name in ("sparse", "dense")}
    for name, folder in (("sparse", launched.run), ("dense", launched.run / "dense")):
        one = document[name]
        rows = [json.loads(line) for line in (folder / "iterations.jsonl").read_text().splitlines()]
        assert len(rows) == one["steps"] == 40
        for key in ("push_bytes", "pull_bytes"):
            assert sum(row[key] for row in rows) == one[key]
        assert all(len(row["barrier_seconds"]) == 2 for row in rows)
        check_rows_of_workers(folder, one)
        elements = sum(row["pushed_elements"] for row in rows)
        assert math.isclose(one["mean_density"], elements / (2 * 40 * rows[0]["numel"]))
        assert one["dense_bytes"] == 2 * 4 * 2 * 40 * rows[0]["numel"]
        assert math.isclose(one["compression_ratio"], one["dense_bytes"] / (one["push_bytes"] + one["pull_bytes"]))
        assert {path.name for path in folder.glob("*.log")} == {
            f"{kind}-{i}.log" for kind in ("shard", "worker") for i in "01"
        }
    assert document["dense"]["mean_density"] == 1.0
    assert document["sparse"]["push_bytes"] < document["dense"]["push_bytes"] / 3
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    model.load_state_dict(load_file(launched.run / "model.safetensors"))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(256, 20, generator=generator)
    labels = (images[:, :4].sum(1) > 0).long()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert accuracy == document["sparse"]["accuracy"]
    assert not launched.left_over()


def check_rows_of_workers(folder: Path, result: dict[str, Any]) -> None:
    """A row for each step of each worker, which add up to the result; and what rank 0 printed, with times."""
    paths = sorted(folder.glob("worker-*.iterations.jsonl"))
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    assert [[row["step"] for row in one] for one in rows] == [list(range(1, 41))] * 2
    assert [{row["rank"] for row in one} for one in rows] == [{0}, {1}]
    for key in ("push_bytes", "pull_bytes"):
        assert sum(row[key] for one in rows for row in one) == result[key]
    printed = [json.loads(line) for line in (folder / "printed.jsonl").read_text().splitlines()]
    assert printed[-1]["accuracy"] == result["accuracy"]
    assert all(row["time"] > 1e9 for row in printed)


@pytest.mark.slow  # `test_any_number_of_shards_gives_the_same_bits` says so without processes
def test_the_number_of_shards_does_not_change_a_bit(start: Starter) -> None:
    """One shard process or three: the same final parameters."""
    models = []
    for index, shards in enumerate(("1", "3")):
        launched = start("--shards", shards, "--workers", "2", "--threshold", "0.01", "--name", f"run-{index}")
        code, _, err = launched.finish()
        assert code == 0, err
        models.append(load_file(launched.run / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_script_that_raises_ends_the_run_with_its_traceback(start: Starter) -> None:
    """The traceback is shown, the others say whom they missed, the exit code is 1, and all processes are gone."""
    extra = "if session.step == 3 and session.rank == 1: raise KeyError('no such pixel')"
    launched = start("--shards", "2", "--workers", "2", "--density", "0.05", extra=extra)
    code, _, err = launched.finish()
    assert code == 1
    assert "worker 1 failed: exit code 1" in err
    assert "Traceback" in err
    assert "no such pixel" in err
    other = (launched.run / "worker-0.log").read_text()
    assert "worker 1" in other
    assert "no such pixel" in other
    assert not launched.left_over()


def test_restarts_are_used_up(start: Starter) -> None:
    """A worker that is killed in each of its lives: the run fails, and says how often it was started again."""
    extra = "if session.step == 3 and session.rank == 1: os.kill(os.getpid(), signal.SIGKILL)"
    options = ("--workers", "2", "--density", "0.05", "--restarts", "1", "--restart-delay", "0.1")
    launched = start(*options, extra=extra)
    code, _, err = launched.finish()
    assert code == 1
    assert "worker 1 failed: signal SIGKILL, after 1 restart\n" in err
    assert "worker 1 is started again (1 of 1)" in (launched.run / "launch.log").read_text()
    assert not launched.left_over()


def test_a_shard_that_dies_is_named(start: Starter) -> None:
    """Kill -9 of one shard that may not be started again: the run fails, names it, and nothing is left."""
    launched = start("--shards", "2", "--workers", "1", "--density", "0.05", "--restarts", "0", epochs=10_000)
    launched.wait_step(3)
    os.kill(launched.pids("--shard 1")[0], signal.SIGKILL)
    code, _, err = launched.finish()
    assert code == 1
    assert "shard 1 failed: signal SIGKILL\n" in err
    assert "has lost shard 1 at 127.0.0.1:" in (launched.run / "worker-0.log").read_text()
    assert not launched.left_over()


def test_ctrl_c_ends_the_run(start: Starter) -> None:
    """Exit code 128 + signal, one line that says so, and nothing is left; test_launch_survives.py has SIGTERM."""
    launched = start("--workers", "1", "--density", "0.05", "--durability", "none", epochs=10_000)
    launched.wait_step(3)
    launched.process.send_signal(signal.SIGINT)
    code, _, err = launched.finish()
    assert code == 128 + signal.SIGINT
    assert "stopped by SIGINT" in err
    assert "--resume" not in err
    assert "Traceback" not in err
    assert not (launched.run / "state").exists()
    assert not launched.left_over()


def test_a_launcher_that_is_killed_leaves_nothing(start: Starter) -> None:
    """Kill -9 of the launcher itself: shards see their standard input close, the tether kills the workers."""
    launched = start("--workers", "2", "--density", "0.05", epochs=10_000)
    launched.wait_step(3)
    launched.process.kill()
    launched.process.communicate(timeout=10)
    assert not launched.left_over()


def test_nan_is_named_and_nothing_is_sent(start: Starter) -> None:
    """A gradient with NaN: worker, step and parameter are named; the step never reaches the shards."""
    extra = "model[2].weight.grad[0, 0] = float('nan') if session.step == 4 and session.rank == 1 else 0.0"
    launched = start("--workers", "2", "--density", "0.05", extra=extra)
    code, _, err = launched.finish()
    assert code == 1
    assert "gradient of worker 1 at step 4: 2.weight (1 of 128 elements)" in err
    assert (launched.run / "shard-0.iterations.jsonl").read_text().count("\n") == 4


def test_nan_is_skipped_when_asked_for(start: Starter) -> None:
    """The same with --nonfinite skip: the run goes on, and that round has one contributor."""
    extra = "model[2].weight.grad[0, 0] = float('nan') if session.step == 4 and session.rank == 1 else 0.0"
    launched = start("--workers", "2", "--density", "0.05", "--nonfinite", "skip", extra=extra)
    code, _, err = launched.finish()
    assert code == 0, err
    rows = [json.loads(line) for line in (launched.run / "iterations.jsonl").read_text().splitlines()]
    assert [row["contributors"] for row in rows[3:6]] == [[0, 1], [0], [0, 1]]


def test_a_script_that_never_connects_is_told(start: Starter, tmp_path: Path) -> None:
    """A script without connect(): the workers end well, the run does not, and the message says why."""
    script = tmp_path / "plain.py"
    script.write_text("print('hello')\n", encoding="utf-8")
    launched = start("--workers", "2", "--density", "0.05", script=[str(script)])
    code, _, err = launched.finish()
    assert code == 1
    assert "connect()" in err
    assert not launched.left_over()


def test_more_shards_than_parameters(start: Starter, tmp_path: Path) -> None:
    """A model of one element on two shards: refused with both numbers."""
    script = tmp_path / "one.py"
    script.write_text(
        "import torch\nfrom thresher.worker import connect\n"
        "model = torch.nn.Linear(1, 1, bias=False)\n"
        "connect().wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))\n",
        encoding="utf-8",
    )
    launched = start("--shards", "2", "--workers", "1", "--threshold", "0", script=[str(script)])
    code, _, err = launched.finish()
    assert code == 1
    assert "2 shards are more than the model's 1 trained elements" in " ".join(err.split())


def test_a_port_in_use_is_named() -> None:
    """`thresher serve` on a port that is taken: exit code 2 and the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        served = subprocess.run(
            [sys.executable, "-m", "thresher.deploy", "serve", "--listen", address],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert served.returncode == 2
    assert address in served.stderr
    assert "in use" in " ".join(served.stderr.split())


def test_plain_text_beyond_this_machine_must_be_typed() -> None:
    """`thresher serve` on all interfaces without --insecure: exit code 2, and the message says what to type."""
    served = subprocess.run(
        [sys.executable, "-m", "thresher.deploy", "serve", "--listen", "0.0.0.0:0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert served.returncode == 2
    assert "--insecure" in served.stderr
