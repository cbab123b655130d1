"""A wall clock that jumps back: no deadline and no order hangs on it."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.integration.test_survival_phases import SPARSE, WORKERS, Plan, living, train

from thresher.deploy.in_process import in_process
from thresher.protos import faults

# Who looks at the wall clock, and what for: nobody decides anything by it, but for the days a certificate is good for.
MAY_LOOK = {
    "deploy.certificates": "how long a certificate is good for",
    "deploy.ray_cluster.shard": "how long ago the last iteration was, for people",
    "server.iterations": "rows say when, for people",
    "deploy.processes": "when something was printed, beside it in a file, for reports",
    "deploy.report.page": "when the report was made, on the page",
    "deploy.report.runs": "how old the last round of an unfinished run is, in a notice",
    "worker.recording": "when a step ended, in its row, for people and loggers",
    "server.metrics": "the time of the last iteration, which Prometheus holds against its own clock",
}
WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow"}
WALL_CLOCK |= {"datetime.today", "date.today", "CLOCK_REALTIME"}

# Each time somebody asks for it, it is ten seconds earlier than before.
CLOCK = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static long calls;
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= 10 * __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    return failed;
}
"""


def looks_at_the_wall_clock(tree: ast.AST) -> Iterator[str]:
    """Names by which a module reads it; imported ones too, so that no other name hides one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            yield from (name for name in WALL_CLOCK if dotted == name or dotted.endswith(f".{name}"))
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            yield from (f"from {node.module} import {alias.name}" for alias in node.names if alias.name != "timedelta")


def test_nobody_decides_by_the_wall_clock() -> None:
    """Only the named modules read it: deadlines, leases and orders are of the monotonic clock, or of versions."""
    found = {
        ".".join(path.relative_to(root).with_suffix("").parts): names
        for root in importlib.import_module("thresher").__path__
        for path in sorted(Path(root).rglob("*.py"))
        if (names := set(looks_at_the_wall_clock(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert found.keys() == MAY_LOOK.keys(), found


@pytest.mark.parametrize(
    "code", ["import time; time.time()", "import datetime as dt; dt.datetime.now(dt.UTC)", "from time import time"]
)
def test_a_look_at_the_wall_clock_is_seen(code: str) -> None:
    """The check above can fail."""
    assert list(looks_at_the_wall_clock(ast.parse(code)))


def run_with_a_kill(folder: Path) -> list[float]:
    """Parameters of a run in lockstep, in whose course a shard dies and comes back."""
    with in_process(shards=2, workers=WORKERS, method=SPARSE, state_dir=folder, checkpoint_every=2) as cluster:
        plan = Plan(cluster, "tell")
        with faults.plan(plan):
            results = living(cluster, partial(train, momentum=0.5))
    assert plan.struck == ["shard 1"]
    numbers: list[float] = results[0].parameters.tolist()
    return numbers


def under_the_jumping_clock() -> None:
    """What the test below runs in a process of its own."""
    folder = Path(sys.argv[1])
    seen = [time.time() for _ in range(10)]
    assert seen == sorted(seen, reverse=True)
    sys.stdout.write(json.dumps(run_with_a_kill(folder)))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for a clock that jumps")
def test_a_wall_clock_that_jumps_back_changes_no_bit(tmp_path: Path) -> None:
    """Also gRPC's deadlines, a restart and the connections that are made anew go on as if nothing were odd."""
    (tmp_path / "clock.c").write_text(CLOCK, encoding="utf-8")
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c"], check=True)
    # Away from the repository the tests are no package that is installed.
    root = str(Path(__file__).parents[2])
    call = f"from {__name__} import {under_the_jumping_clock.__name__} as work; work()"
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", call, tmp_path / "jumping"],
        env=environment, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == run_with_a_kill(tmp_path / "plain")
