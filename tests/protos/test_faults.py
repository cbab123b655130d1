"""Places at which a process may be killed: a plan is called at each, a file kills a real process at one."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from thresher.protos import faults
from thresher.protos.faults import PHASES, VARIABLE, plan, reached

SCRIPT = """
from thresher.protos.faults import PHASES, reached
for phase in PHASES:
    reached("worker 0", phase)
    print(phase, flush=True)
"""


class StruckError(Exception):
    """What the plans of these tests raise."""


def test_nothing_happens_without_a_plan() -> None:
    """Reaching a place is free unless somebody waits there."""
    with plan(lambda who, phase: None):
        pass
    for phase in PHASES:
        reached("shard 0", phase)


def test_a_plan_is_called_at_every_place() -> None:
    """With who and where, in order, until its block ends."""
    seen: list[tuple[str, str]] = []
    with plan(lambda who, phase: seen.append((who, phase))):
        reached("shard 1", "append")
        reached("worker 0", "flip")
    reached("worker 0", "in flight")
    assert seen == [("shard 1", "append"), ("worker 0", "flip")]


def test_what_a_plan_raises_strikes_at_the_place() -> None:
    """And the plan is gone afterwards, also when its block was left in that way."""

    def strike(who: str, phase: str) -> None:
        if phase == "apply":
            raise StruckError(who)

    with plan(strike):
        reached("shard 0", "round open")
    with pytest.raises(StruckError, match="shard 0"), plan(strike):
        reached("shard 0", "apply")
    reached("shard 0", "apply")


def test_the_inner_of_two_plans_strikes() -> None:
    """When its block ends the outer one is back."""
    seen: list[str] = []
    with plan(lambda who, phase: seen.append("outer")):
        with plan(lambda who, phase: seen.append("inner")):
            reached("shard 0", "append")
        reached("shard 0", "append")
    assert seen == ["inner", "outer"]


def test_a_file_for_another_place_or_process_is_left_alone(tmp_path: Path) -> None:
    """This process would be gone otherwise."""
    (tmp_path / "worker-1").write_text("flip", encoding="utf-8")
    (tmp_path / "shard-0").write_text("append", encoding="utf-8")
    with plan(faults.armed_by_files(tmp_path)):
        reached("worker 0", "flip")
        reached("worker 1", "compress")
        reached("shard 0", "checkpoint")
        reached("shard 1", "append")
    assert {file.name for file in tmp_path.iterdir()} == {"worker-1", "shard-0"}


def started(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("phase", ["gradient", "flip", "recovery"])
def test_a_process_is_killed_at_the_place_that_its_file_names(phase: str, tmp_path: Path) -> None:
    """There and no earlier, with SIGKILL, and once: the file is gone, so its next life passes the place."""
    armed = tmp_path / "worker-0"
    armed.write_text(f"{phase}\n", encoding="utf-8")
    first = started({VARIABLE: str(tmp_path)})
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert first.stdout.split("\n")[:-1] == list(PHASES[: PHASES.index(phase)])
    assert not armed.exists()
    if phase == "flip":
        second = started({VARIABLE: str(tmp_path)})
        assert second.returncode == 0, second.stderr
        assert second.stdout.split("\n")[:-1] == list(PHASES)
