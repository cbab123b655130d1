"""Restarts: after signals only, so many, each after a pause twice as long."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from thresher.deploy.processes import Child
from thresher.deploy.supervision import Supervised

KILLED = "import os; os.kill(os.getpid(), 9)"


def lives(tmp_path: Path, *codes: str) -> Callable[[], Child]:
    """Return what begins one life after the other, each with its own code."""
    left = list(codes)

    def start() -> Child:
        return Child("it", [sys.executable, "-c", left.pop(0)], dict(os.environ), tmp_path / "it.log")

    return start


def ended(it: Supervised) -> None:
    """Wait for the end of the present life."""
    deadline = time.monotonic() + 30
    while it.child.code is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_is_started_again_after_growing_pauses(tmp_path: Path) -> None:
    """Kill -9: another life begins when the pause is over, not before, and the next pause is twice as long."""
    it = Supervised(
        "it", lives(tmp_path, KILLED, KILLED, "print('{\"life\": 3}')"), restarts=2, delay=10.0, longest=60.0
    )
    for life, pause in ((1, 10.0), (2, 20.0)):
        ended(it)
        before = it.child
        it.tend(100.0, lambda: False)
        it.tend(100.0 + pause - 0.1, lambda: False)
        assert it.child is before
        assert not it.has_failed
        it.tend(100.0 + pause, lambda: False)
        assert it.child is not before
        assert it.restarts == life
    ended(it)
    assert (it.is_done, it.has_failed) == (True, False)
    assert it.ending() == "exit code 0, after 2 restarts"
    it.child.finish()
    assert it.child.data == {"life": 3}


def test_the_pause_stops_growing(tmp_path: Path) -> None:
    """At half a lease, say: a worker that was killed often is still in time."""
    it = Supervised("it", lives(tmp_path, KILLED, KILLED, KILLED), restarts=2, delay=10.0, longest=15.0)
    for pause in (10.0, 15.0):
        ended(it)
        it.tend(100.0, lambda: False)
        before = it.child
        it.tend(100.0 + pause - 0.1, lambda: False)
        assert it.child is before
        it.tend(100.0 + pause, lambda: False)
        assert it.child is not before
    ended(it)
    it.child.finish()


def test_restarts_are_used_up(tmp_path: Path) -> None:
    """Killed once more than may be: it has failed, and stays so."""
    it = Supervised("it", lives(tmp_path, KILLED, KILLED), restarts=1, delay=0.0, longest=60.0)
    ended(it)
    it.tend(0.0, lambda: False)
    ended(it)
    it.tend(1.0, lambda: False)
    it.child.finish()
    assert it.has_failed
    assert it.ending() == "signal SIGKILL, after 1 restart"


@pytest.mark.parametrize(
    ("code", "may_end", "failed"), [(1, True, True), (0, True, False), (143, True, False), (0, False, True)]
)
def test_what_ends_by_itself_is_not_started_again(tmp_path: Path, code: int, may_end: bool, failed: bool) -> None:
    """An exception is a failure at once; a worker may end well, also on SIGTERM; a shard may not end at all."""
    it = Supervised(
        "it", lives(tmp_path, f"raise SystemExit({code})"), restarts=3, delay=0.0, longest=60.0, may_end=may_end
    )
    ended(it)
    it.tend(0.0, lambda: False)
    it.child.finish()
    assert (it.has_failed, it.is_done, it.restarts) == (failed, not failed, 0)


def test_who_has_left_is_not_started_again(tmp_path: Path) -> None:
    """A worker that was killed behind its goodbye has nothing left to do."""
    it = Supervised("it", lives(tmp_path, KILLED), restarts=3, delay=0.0, longest=60.0)
    ended(it)
    it.tend(0.0, lambda: True)
    assert (it.is_done, it.has_failed, it.restarts) == (True, False, 0)


def test_while_nobody_knows_whether_it_has_left_no_life_begins(tmp_path: Path) -> None:
    """Whoever could say does not answer: it is asked again, and only then another life begins, or none does."""
    for over in (True, False):
        it = Supervised("it", lives(tmp_path, KILLED, "pass"), restarts=3, delay=0.0, longest=60.0)
        ended(it)
        before = it.child
        it.tend(0.0, lambda: None)
        assert (it.child is before, it.is_done, it.has_failed, it.restarts) == (True, False, False, 0)
        it.tend(1.0, partial(bool, over))
        assert (it.child is before, it.restarts) == (over, 0 if over else 1)
        ended(it)
        it.child.finish()
        assert (it.is_done, it.has_failed) == (True, False)
