"""How a script ends, and what its session makes of it: it leaves, or it fails."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.worker.training import Scale, set_gradients, sgd

from thresher.deploy.in_process import in_process
from thresher.worker import Session

# What an actor's process looks like: its loop is on a thread, and something else ends the process.
ON_A_THREAD = """
import sys, threading
from tests.worker.training import Scale, set_gradients, sgd
from thresher.worker import connect

begun = threading.Event()

def train(steps):
    session, model = connect(), Scale()
    optimizer = sgd(model)
    session.wrap(model, optimizer)
    while session.step != steps:
        set_gradients(model, 1.0)
        optimizer.step()
        begun.set()

thread = threading.Thread(target=train, args=(int(sys.argv[1]),), daemon=True)
thread.start()
begun.wait()
if sys.argv[1] != "-1":
    thread.join()
"""


def state_after(end: Callable[[Session], Any]) -> str:
    """The state of a run whose only worker makes a step, and then ends."""
    with in_process(shards=1, workers=1) as served:
        session = served.connect(0)
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        set_gradients(model, 1.0)
        optimizer.step()
        end(session)
        return str(served.statistics()[0].state)


def at_exit(session: Session) -> None:
    session._termination.at_exit()


@pytest.mark.parametrize("code", [None, 0])
def test_an_exit_without_failure_leaves(code: int | None) -> None:
    """``sys.exit(0)`` is an end like any other, in a ``with`` block too."""

    def end(session: Session) -> None:
        with pytest.raises(SystemExit), session:
            sys.exit(code)

    assert state_after(end) == "finished"


@pytest.mark.parametrize("code", [1, "", "no data"])
def test_an_exit_with_a_failure_is_told(code: int | str) -> None:
    """Python itself makes 1 of a message, the empty one included."""

    def end(session: Session) -> None:
        with pytest.raises(SystemExit), session:
            sys.exit(code)

    assert state_after(end) == "failed"


def test_an_earlier_exception_is_none_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook whose cell failed before the run began goes on, and its end is no failure."""
    monkeypatch.setattr(sys, "last_value", ValueError("a cell"), raising=False)
    assert state_after(at_exit) == "finished"


def test_an_exception_that_ends_the_script_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came after the run began, and nobody caught it."""

    def end(session: Session) -> None:
        monkeypatch.setattr(sys, "last_value", ValueError("a step"), raising=False)
        at_exit(session)

    assert state_after(end) == "failed"


@pytest.mark.parametrize(("steps", "state"), [(-1, "lost"), (3, "left")], ids=["in its loop", "after its loop"])
def test_a_process_that_ends_around_a_loop_has_not_left(steps: int, state: str) -> None:
    """Its next life goes on with its memory; a loop that is over has left, though nobody closed its session."""
    with in_process(shards=1, workers=1) as served:
        variables = {"THRESHER_SHARDS": ",".join(served.addresses), "THRESHER_RANK": "0", "THRESHER_WORKERS": "1"}
        script = [sys.executable, "-c", ON_A_THREAD, str(steps)]
        over = steps > 0  # a thread that is cut off inside PyTorch may abort its process
        subprocess.run(script, env={**os.environ, **variables}, check=over, stderr=subprocess.DEVNULL, timeout=100)
        deadline = time.monotonic() + 30
        while served.statistics()[0].members[0].state == "exchanging" and time.monotonic() < deadline:
            time.sleep(0.05)
        member = served.statistics()[0].members[0]
        assert member.state == state
        assert member.steps == steps if over else member.steps > 0
