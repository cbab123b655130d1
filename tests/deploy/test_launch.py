"""The parts of the launcher that need no processes; tests/integration/test_launch*.py have the rest."""

import fcntl
import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from thresher.deploy.display import Picture
from thresher.deploy.launch import launch, name_of, state_of
from thresher.deploy.launch_config import LaunchConfig
from thresher.deploy.results import RunResult, write_results
from thresher.deploy.stop_signals import StopSignals
from thresher.protos.errors import ConfigurationError
from thresher.worker import Method

CONFIG = LaunchConfig((__file__,), 1, 1, Method(threshold=0.0))


def unseen(picture: Picture) -> None:
    raise AssertionError("something was started")


def test_a_finished_run_starts_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its results are returned, and it is said that it is finished."""
    one = RunResult(0.5, 1.0, 10, [10], 1, 2, 3, 0.1, 1.0, 2.0)
    write_results(tmp_path / "result.json", {"sparse": one}, workers=1)
    with caplog.at_level(logging.INFO):
        assert launch(CONFIG, tmp_path, unseen, StopSignals()) == {"sparse": one}
    assert f"{tmp_path} is finished" in caplog.text
    assert asdict(LaunchConfig.read(tmp_path / "launch.json")) == asdict(CONFIG)


def test_two_launchers_are_not_at_work_in_one_folder(tmp_path: Path) -> None:
    """The second one is refused before it starts anything."""
    CONFIG.write(tmp_path / "launch.json")
    with (tmp_path / "launch.json").open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="another launcher is at work"):
            launch(CONFIG, tmp_path, unseen, StopSignals())


def test_a_run_is_called_as_its_folder_and_its_baseline_by_both(tmp_path: Path) -> None:
    """Two runs of one Prometheus are told apart by it, and each from its own baseline."""
    run = tmp_path / "digits"
    run.mkdir()
    CONFIG.write(run / "launch.json")
    assert [name_of(folder) for folder in (run, run / "dense")] == ["digits", "digits/dense"]


def test_state_lies_in_the_folder_of_the_run(tmp_path: Path) -> None:
    """Where `thresher replay` looks for it."""
    assert state_of(tmp_path, 3) == tmp_path / "state" / "shard-3"
