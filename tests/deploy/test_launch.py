"""The parts of the launcher that need no processes; tests/integration/test_launch.py has the rest."""

import os
import signal
from pathlib import Path

import pytest

from thresher.deploy.launch import LaunchConfig, StopRequestedError, StopSignals
from thresher.protos.errors import ConfigurationError
from thresher.worker import Method


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_by_the_next_pause_and_nowhere_else(number: signal.Signals) -> None:
    """A signal that strikes where every error is swallowed is not lost: the next pause raises it."""
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequestedError, match=number.name) as caught:
            stop.pause(0.0)
    assert caught.value.number == number


def test_signals_are_given_back() -> None:
    """After the block the handlers are those from before."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("shards", "workers"), [(0, 1), (1, 0)])
def test_a_run_needs_a_shard_and_a_worker(shards: int, workers: int) -> None:
    """None of either: refused before anything is started."""
    with pytest.raises(ConfigurationError, match="at least one shard and one worker"):
        LaunchConfig((__file__,), shards, workers, Method(threshold=0.0))


def test_a_run_needs_its_script(tmp_path: Path) -> None:
    """A script that is not there: refused, with its name."""
    with pytest.raises(ConfigurationError, match=r"nowhere\.py"):
        LaunchConfig((str(tmp_path / "nowhere.py"),), 1, 1, Method(threshold=0.0))
