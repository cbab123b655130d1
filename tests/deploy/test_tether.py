"""The tether: what is held dies with the launcher, what was let go does not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from thresher.deploy.tether import Tether, watch

LAUNCHER = """
import os, signal, sys
from thresher.deploy.tether import Tether
with Tether() as tether:
    tether.hold(int(sys.argv[1]))
    tether.hold(int(sys.argv[2]))
    tether.let_go(int(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def two() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Two processes, each in a group of its own."""
    processes = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_launcher_that_is_killed_takes_along_what_it_holds(two: list["subprocess.Popen[bytes]"]) -> None:
    """Kill -9 of the one who holds: the held group ends, the one that was let go lives."""
    held, free = two
    subprocess.run([sys.executable, "-c", LAUNCHER, str(held.pid), str(free.pid)], check=False)
    assert held.wait(timeout=30) == -signal.SIGKILL
    assert free.poll() is None


def test_what_has_ended_before_is_no_matter(two: list["subprocess.Popen[bytes]"]) -> None:
    """A group that is gone is passed over, and the next one is killed."""
    gone, held = two
    gone.kill()
    gone.wait()
    watch([f"+{gone.pid}\n", f"+{held.pid}\n"])
    assert held.wait(timeout=30) == -signal.SIGKILL


def test_a_tether_that_was_killed_is_borne(two: list["subprocess.Popen[bytes]"]) -> None:
    """Without it the launcher goes on."""
    with Tether() as tether:
        os.kill(tether._process.pid, signal.SIGKILL)
        tether._process.wait()
        tether.hold(two[0].pid)
        tether.let_go(two[0].pid)
    assert two[0].poll() is None
