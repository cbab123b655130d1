"""A cable is pulled in the middle of a run: hosts in network namespaces, and a worker whose packets are dropped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
from numpy.typing import NDArray

LAB = Path(os.environ.get("THRESHER_LAB", Path(__file__).parents[3] / "shared" / "lab")) / "netlab.sh"
SHARDS = "10.77.0.1:5001,10.77.0.2:5001"
WORKERS = 3
HOST_OF_THE_CUT_WORKER = 4  # shards are on h0 and h1, workers on h2, h3 and h4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.lab,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not LAB.exists() or os.geteuid() != 0,
        reason="needs netlab.sh (THRESHER_LAB names its folder) and root, for network namespaces",
    ),
]

# Each round waits until the test allows it, by a number in a file; a second number is where the run ends. A worker that
# was away makes fewer steps than there are rounds, so it looks at the number of its round.
SCRIPT = """
import json, pathlib, sys, time
import numpy as np
import torch
from thresher.worker import connect

folder, momentum = pathlib.Path(sys.argv[1]), float(sys.argv[2])
parameter = torch.nn.Parameter(torch.zeros(1000))
model = torch.nn.ParameterList([parameter])
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)

def may_step(number):
    while True:
        allowed, end = map(int, (folder / "allowed").read_text().split())
        if number >= min(allowed, end):
            if number >= end:
                return False
            time.sleep(0.005)
            continue
        return True

with connect().wrap(model, optimizer) as session:
    made, moves = np.zeros(1000), []
    while may_step(session._rounds.number):
        # Multiples of 6, so that sums, and means over 3, 2 or 1 members, are exact.
        drawn = 6.0 * np.random.default_rng((session.rank, session.step)).integers(-4, 5, 1000)
        made += drawn
        before = parameter.detach().clone()
        parameter.grad = torch.from_numpy(drawn.astype(np.float32))
        optimizer.step()
        moves.append((parameter.detach() - before).numpy())
    kept = session.residual.numpy().copy()
    steps, reconnects = session.step, [shard.client.reconnects for shard in session._rounds.shards]
np.savez(folder / f"worker-{session.rank}.npz", made=made, moves=np.array(moves), kept=kept, end=parameter.detach())
print(json.dumps({"steps": steps, "reconnects": reconnects}))
"""


def lab(*arguments: str) -> str:
    """Run one command of the lab."""
    return subprocess.run([str(LAB), *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[None]:
    """Five hosts at 1 Gbit/s."""
    try:
        lab("up", "5", "1gbit")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    yield
    lab("down")


@final
class Run:
    """Two shards and three workers, each on a host of its own."""

    def __init__(self, folder: Path, lease: float, momentum: float) -> None:
        """Start them; no round is allowed yet."""
        folder.mkdir()
        self.folder = folder
        self.allow(0)
        serve = ["-m", "thresher.deploy", "serve", "--shards", "2", "--workers", str(WORKERS), "--insecure"]
        self._shards = [
            self._spawn(
                shard,
                [*serve, "--shard", str(shard), "--listen", SHARDS.split(",")[shard], "--lease", str(lease),
                 "--iterations", str(folder / f"{shard}.jsonl")],
            )
            for shard in range(2)
        ]  # fmt: skip
        self._workers = [
            self._spawn(
                2 + rank,
                ["-c", SCRIPT, str(folder), str(momentum)],
                THRESHER_SHARDS=SHARDS,
                THRESHER_RANK=str(rank),
                THRESHER_WORKERS=str(WORKERS),
                THRESHER_THRESHOLD="12",
                THRESHER_INSECURE="1",
            )
            for rank in range(WORKERS)
        ]

    def _spawn(self, host: int, arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
        command = [str(LAB), "exec", str(host), sys.executable, *arguments]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with (self.folder / f"host-{host}.err").open("w") as told:
            return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=told, text=True)

    def allow(self, rounds: int, end: int = 1 << 30) -> None:
        """Let the workers make rounds up to this number, and end the run at ``end``."""
        (self.folder / "next").write_text(f"{rounds} {end}", encoding="utf-8")
        (self.folder / "next").replace(self.folder / "allowed")

    def rows(self, shard: int = 0) -> list[dict[str, Any]]:
        """Return what has been written of each round so far."""
        path = self.folder / f"{shard}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self, happened: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Wait until the rows of both shards show something."""
        deadline = time.monotonic() + 120
        while not all(happened(self.rows(shard)) for shard in range(2)):
            assert time.monotonic() < deadline, self.told()
            assert all(process.poll() is None for process in (*self._shards, *self._workers)), self.told()
            time.sleep(0.02)

    def told(self) -> str:
        """Return what all hosts wrote on standard error."""
        return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(self.folder.glob("*.err")))

    def finish(self) -> tuple[list[dict[str, Any]], list[dict[str, NDArray[Any]]]]:
        """Return what each worker printed and saved."""
        printed = []
        for worker in self._workers:
            said = worker.communicate(timeout=60)[0]
            assert worker.returncode == 0, self.told()
            printed.append(json.loads(said.splitlines()[-1]))
        return printed, [dict(np.load(self.folder / f"worker-{rank}.npz")) for rank in range(WORKERS)]

    def kill(self) -> None:
        """End whatever still runs."""
        for process in (*self._workers, *self._shards):
            process.kill()
            process.communicate()


def rounds(number: int) -> Callable[[list[dict[str, Any]]], bool]:
    """At least so many rounds are closed."""
    return lambda rows: len(rows) >= number


def test_within_the_lease_nothing_is_different(hosts: None, tmp_path: Path) -> None:
    """A cut that keepalive notices (within 30 s) but the lease outlives: same bits, every push applied once."""
    ends = []
    for cut in (False, True):
        run = Run(tmp_path / str(cut), lease=60.0, momentum=0.9)
        try:
            run.allow(50)
            run.wait(rounds(50))
            if cut:
                lab("cut", str(HOST_OF_THE_CUT_WORKER))
            run.allow(100, end=100)
            if cut:
                time.sleep(35.0)
                assert len(run.rows()) == 50  # the others have waited
                lab("heal", str(HOST_OF_THE_CUT_WORKER))
            run.wait(rounds(100))
            printed, saved = run.finish()
        finally:
            run.kill()
        for shard in range(2):
            assert [row["version"] for row in run.rows(shard)] == list(range(1, 101))
            assert all((row["members"], row["contributors"]) == (3, [0, 1, 2]) for row in run.rows(shard))
        assert [one["steps"] for one in printed] == [100] * 3
        assert all((count > 0) == cut for count in printed[2]["reconnects"]), run.told()
        ends.append(saved)
    for undisturbed, disturbed in zip(*ends, strict=True):
        for name in undisturbed:
            assert undisturbed[name].tobytes() == disturbed[name].tobytes(), name


def test_beyond_the_lease_the_others_go_on(hosts: None, tmp_path: Path) -> None:
    """Rounds close without the worker, which comes back at a later one; nothing that anybody computed is lost."""
    run = Run(tmp_path / "run", lease=5.0, momentum=0.0)
    try:
        run.allow(50)
        run.wait(rounds(50))
        lab("cut", str(HOST_OF_THE_CUT_WORKER))
        run.allow(60)
        run.wait(rounds(60))
        lab("heal", str(HOST_OF_THE_CUT_WORKER))
        allowed = 60
        deadline = time.monotonic() + 60
        while run.rows()[-1]["members"] == 2:
            assert time.monotonic() < deadline, run.told()
            allowed += 1
            run.allow(allowed)
            run.wait(rounds(allowed))
        end = allowed + 50
        run.allow(end, end)
        run.wait(rounds(end))
        printed, saved = run.finish()
    finally:
        run.kill()
    every = [run.rows(shard) for shard in range(2)]
    assert [len(rows) for rows in every] == [end, end]
    away = next(row["version"] for row in every[0] if 2 not in row["contributors"])
    assert away == 51
    assert [row["members"] for row in every[0]] == [row["members"] for row in every[1]]
    assert every[0][-1]["contributors"] == [0, 1, 2]
    assert [one["steps"] for one in printed] == [end, end, sum(2 in row["contributors"] for row in every[0]) + 1]
    # Worker 0 was there all the time and has seen each mean; its mean times its members is the sum that was sent.
    half = every[0][0]["numel"]
    sent = np.zeros(1000)
    for number, move in enumerate(saved[0]["moves"].astype(np.float64)):
        members = np.repeat([every[0][number]["members"], every[1][number]["members"]], [half, 1000 - half])
        sent -= move * members
    kept = sum(worker["kept"].astype(np.float64) for worker in saved)
    assert np.array_equal(sum(worker["made"] for worker in saved), sent + kept)
    assert all(worker["end"].tobytes() == saved[0]["end"].tobytes() for worker in saved)
