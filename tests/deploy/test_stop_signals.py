"""Signals to a launcher."""

import os
import signal

import pytest

from thresher.deploy.stop_signals import StopRequestedError, StopSignals


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
