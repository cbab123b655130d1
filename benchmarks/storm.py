"""The storm: shards and workers are killed with SIGKILL at named places, hundreds of times, and nothing may be lost.

    python benchmarks/storm.py --kills 200 --other-kills 50

One run in lockstep trains digits, beside an undisturbed one: the final parameters must be the same bits. Runs with a
quorum, in ssp and in async push whole numbers that are a function of (rank, step): what was applied and what is kept
must add up to what was put in, exactly. A kill is armed at a random place of a random process when all are serving and
a round has closed since the last; then the workers are allowed a few more steps, and the process dies when it gets
there. ``runs/storm/result.json`` has the table.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from storm_worker import NUMEL, integer_gradient

from thresher.protos.consistency import Consistency
from thresher.protos.errors import ThresherError
from thresher.protos.faults import VARIABLE
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Method, Settings
from thresher.worker.calls import ShardCalls

SHARDS: Final = 2
WORKERS: Final = 4
CHECKPOINT_EVERY: Final = 5
SHARD_PHASES: Final = ("round open", "apply", "append", "tell", "checkpoint", "recovery")
WORKER_PHASES: Final = ("gradient", "compress", "flip", "in flight")
MODES: Final = {
    "sync": Consistency(),
    "quorum": Consistency("sync", quorum=3, grace=0.02),
    "ssp": Consistency("ssp", staleness=3),
    "async": Consistency("async"),
}
_POLL_SECONDS: Final = 0.02
_PRESS_SECONDS: Final = 2.0
_PATIENCE_SECONDS: Final = 120.0
_LEASE_SECONDS: Final = 600.0


@dataclass
class Result:
    """One run, as it stands in ``result.json``. Recoveries are from the kill until the process serves or exchanges."""

    mode: str
    steps: int
    kills: int = 0
    kills_by_phase: dict[str, int] = field(default_factory=dict)
    bit_identical: bool | None = None
    conservation_error: float | None = None
    pushes_applied: int = 0
    pushes_expected: int = 0
    recovery_seconds_median: float = 0.0
    recovery_seconds_max: float = 0.0
    serve_seconds_median: float = 0.0
    serve_seconds_max: float = 0.0

    @property
    def is_right(self) -> bool:
        """True when nothing was lost or doubled."""
        exact = self.bit_identical is not False and not self.conservation_error
        return exact and self.pushes_applied == self.pushes_expected


class Process:
    """A shard or a worker, started again whenever it is killed."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name, self.command, self._environment, self._log = name, command, environment, log
        self.lives = 0
        self.address = ""
        self.start()

    def start(self) -> None:
        """Begin a life."""
        self.lives += 1
        self.born = time.monotonic()
        self.output: IO[bytes] = self._log.with_name(f"{self._log.name}.{self.lives}").open("wb")
        self._process = subprocess.Popen(
            self.command, env=self._environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.output.close()

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def ready(self) -> dict[str, object] | None:
        """Return the line in which a shard says that it serves."""
        text = self._log.with_name(f"{self._log.name}.{self.lives}").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.startswith('{"shard"')]
        return json.loads(lines[0]) if lines else None

    def tail(self) -> str:
        """Return the end of what it printed."""
        text = self._log.with_name(f"{self._log.name}.{self.lives}").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-25:])


class Storm:
    """One run with all its processes, and the kills."""

    def __init__(self, mode: str, steps: int, kills: int, folder: Path, seed: int, console: Console) -> None:
        self.mode, self.steps, self._to_kill = mode, steps, kills
        self._folder, self._random, self._console = folder, random.Random(seed), console  # noqa: S311 - it throws dice
        self.result = Result(mode, steps)
        self._by_phase: Counter[str] = Counter()
        self._allowed = 0
        self._recoveries: list[float] = []
        self._serves: list[float] = []
        self._calls: list[ShardCalls] = []
        self.shards: list[Process] = []
        self.workers: list[Process] = []
        self.final: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """Make the run; afterwards `final` has parameters and optimizer state, by shard and name."""
        self._allow(1)
        with ExitStack() as stack:
            self.shards = [stack.enter_context(self._shard(index)) for index in range(SHARDS)]
            for shard in self.shards:
                self._wait(lambda shard=shard: shard.ready() is not None, f"{shard.name} to serve")
                shard.address = str((shard.ready() or {})["address"])
            self._calls = [ShardCalls(index, shard.address, "the storm") for index, shard in enumerate(self.shards)]
            for shard in self.shards:  # a port that was free is asked for by name from now on
                shard.command = [*shard.command[:-1], shard.address]
            self.workers = [stack.enter_context(self._worker(rank)) for rank in range(WORKERS)]
            self._rage()
            self._allow(self.steps)
            self._wait(lambda: all(worker.code == 0 for worker in self.workers), "all workers to end")
            self._read_final()

    def _rage(self) -> None:
        closed = 0
        while self.result.kills < self._to_kill:
            if self._allowed >= self.steps - 2 * CHECKPOINT_EVERY:
                raise RuntimeError(f"{self.mode}: {self.result.kills} kills in {self.steps} steps; allow more steps")
            self._wait(lambda closed=closed: self._rounds() > closed, "a round to close", pressing=True)
            closed = self._rounds()
            self._kill(*self._choose())
        self.result.kills_by_phase = dict(sorted(self._by_phase.items()))
        if self._recoveries:
            self.result.recovery_seconds_median = statistics.median(self._recoveries)
            self.result.recovery_seconds_max = max(self._recoveries)
        if self._serves:
            self.result.serve_seconds_median = statistics.median(self._serves)
            self.result.serve_seconds_max = max(self._serves)

    def _choose(self) -> tuple[Process, str]:
        rarest = min(self._by_phase[phase] for phase in (*SHARD_PHASES, *WORKER_PHASES))
        rare = [phase for phase in (*SHARD_PHASES, *WORKER_PHASES) if self._by_phase[phase] <= rarest + 3]
        phase = self._random.choice(rare)
        return self._random.choice(self.shards if phase in SHARD_PHASES else self.workers), phase

    def _kill(self, victim: Process, phase: str) -> None:
        """Arm the place, let the workers go on until it is reached, and start the victim again."""
        arm = self._folder / "faults" / victim.name
        arm.write_text(phase, encoding="utf-8")
        if phase == "recovery":
            victim.kill()
            victim.start()
        self._allow(self._allowed + (CHECKPOINT_EVERY if phase == "checkpoint" else 1))
        self._wait(lambda: victim.code is not None, f"{victim.name} to reach {phase!r}", pressing=True)
        if victim.code != -signal.SIGKILL or arm.exists():
            raise RuntimeError(f"{victim.name} ended with {victim.code}:\n{victim.tail()}")
        self.result.kills += 1 + (phase == "recovery")
        self._by_phase[phase] += 1
        self._by_phase["between"] += phase == "recovery"  # the kill that made it recover
        died = time.monotonic()
        victim.start()
        if victim in self.shards:
            self._wait(lambda: victim.ready() is not None, f"{victim.name} to serve")
            self._serves.append(float(str((victim.ready() or {}).get("seconds", 0.0))))
        else:
            rank = self.workers.index(victim)
            self._wait(lambda: self._exchanges(rank), f"{victim.name} to exchange")
        self._recoveries.append(time.monotonic() - died)
        self._console.print(f"{self.mode}: {self.result.kills:3} kills, {victim.name} at {phase}", highlight=False)

    def _exchanges(self, rank: int) -> bool:
        found = self._statistics()
        return found is not None and all(shard.workers[rank].state == "exchanging" for shard in found)

    def _rounds(self) -> int:
        found = self._statistics()
        return -1 if found is None else min(shard.version for shard in found)

    def _statistics(self) -> list[pb.StatisticsResponse] | None:
        try:
            return [calls.statistics(timeout=2.0) for calls in self._calls]
        except ThresherError:
            return None

    def _wait(self, what: Callable[[], bool], text: str, *, pressing: bool = False) -> None:
        """Wait; while ``pressing``, workers are allowed more: with a quorum a slow one may need the others' pushes."""
        begin = pressed = time.monotonic()
        while not what():
            now = time.monotonic()
            if pressing and now - pressed > _PRESS_SECONDS:
                pressed = now
                self._allow(self._allowed + 1)
            if now - begin > _PATIENCE_SECONDS:
                tails = "\n".join(f"{p.name}: {p.tail()}" for p in (*self.shards, *self.workers))
                raise RuntimeError(f"{self.mode}: waited {_PATIENCE_SECONDS:.0f} s for {text}\n{tails}")
            time.sleep(_POLL_SECONDS)

    def _allow(self, steps: int) -> None:
        """Let the workers come so far; what was allowed once stays so."""
        self._allowed = steps = max(steps, self._allowed)
        beside = self._folder / "allowed.new"
        beside.write_text(str(steps), encoding="utf-8")
        beside.replace(self._folder / "allowed")

    def _read_final(self) -> None:
        found = self._statistics() or []
        snapshots = [calls.snapshot(10.0) for calls in self._calls]
        self.result.pushes_applied = sum(worker.steps for shard in found for worker in shard.workers)
        self.result.pushes_expected = self.steps * WORKERS * SHARDS
        self.final = {f"{n}.{name}": value for n, one in enumerate(snapshots) for name, value in one.state.items()}

    @contextmanager
    def _shard(self, index: int) -> Iterator[Process]:
        options = {
            "--shard": index, "--shards": SHARDS, "--workers": WORKERS, "--state-dir": self._folder / f"shard-{index}",
            "--checkpoint-every": CHECKPOINT_EVERY, "--lease": _LEASE_SECONDS, "--listen": "127.0.0.1:0",
        }  # fmt: skip
        command = [sys.executable, "-m", "thresher.deploy", "serve", *(str(p) for o in options.items() for p in o)]
        with self._process(f"shard-{index}", command, {}) as process:
            yield process

    @contextmanager
    def _worker(self, rank: int) -> Iterator[Process]:
        work = "digits" if self.mode == "sync" else "integers"
        threshold = 0.02 if self.mode == "sync" else 2.5
        settings = Settings(
            tuple(shard.address for shard in self.shards), rank, WORKERS, 0, Method(threshold=threshold),
            MODES[self.mode], self._folder / "workers", reconnect_timeout=_LEASE_SECONDS,
        )  # fmt: skip
        script = Path(__file__).with_name("storm_worker.py")
        command = [sys.executable, str(script), work, "--steps", str(self.steps), "--folder", str(self._folder)]
        with self._process(f"worker-{rank}", command, settings.environment()) as process:
            yield process

    @contextmanager
    def _process(self, name: str, command: Sequence[str], variables: dict[str, str]) -> Iterator[Process]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: str(self._folder / "faults"), **variables}
        process = Process(name, command, environment, self._folder / "logs" / name)
        try:
            yield process
        finally:
            process.kill()


def run_one(mode: str, steps: int, kills: int, folder: Path, seed: int, console: Console) -> Storm:
    """Make one run in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("faults", "logs", "workers"):
        (folder / name).mkdir(parents=True)
    storm = Storm(mode, steps, kills, folder, seed, console)
    storm.run()
    return storm


def conservation_error(storm: Storm, folder: Path) -> float:
    """Return by how much what was applied and what is kept differ from what was put in; 0 is exact."""
    missing = torch.zeros(NUMEL, dtype=torch.float64)
    for rank in range(WORKERS):
        missing += torch.stack([integer_gradient(rank, step) for step in range(storm.steps)]).double().sum(0)
        missing -= torch.from_numpy(np.load(folder / f"residual-{rank}.npy")).double()
    parameters = torch.cat([storm.final[f"{index}.parameters"] for index in range(SHARDS)]).double()
    return float((missing + parameters * WORKERS).abs().max())


def main() -> None:
    """Make all runs, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in lockstep")
    parser.add_argument("--other-kills", type=int, default=50, help="in each other mode")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/storm"))
    said = parser.parse_args()
    console = Console(stderr=True)
    results: list[Result] = []
    for mode in said.modes:
        kills = said.kills if mode == "sync" else said.other_kills
        storm = run_one(mode, said.steps, kills, said.folder / mode, said.seed, console)
        if mode == "sync":
            quiet = run_one(mode, said.steps, 0, said.folder / "undisturbed", said.seed, console)
            same = storm.final.keys() == quiet.final.keys()
            storm.result.bit_identical = same and all(torch.equal(storm.final[k], quiet.final[k]) for k in quiet.final)
        else:
            storm.result.conservation_error = conservation_error(storm, said.folder / mode)
        results.append(storm.result)
        (said.folder / "result.json").write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    Console().print(_table(results))
    wrong = [one.mode for one in results if not one.is_right]
    if wrong:
        raise SystemExit(f"something was lost or doubled in: {', '.join(wrong)}")


def _table(results: Sequence[Result]) -> Table:
    table = Table("mode", "steps", "kills", "same bits", "error", "pushes", "recovery s (max)", "serve s (max)")
    for one in results:
        table.add_row(
            one.mode,
            str(one.steps),
            str(one.kills),
            "-" if one.bit_identical is None else str(one.bit_identical),
            "-" if one.conservation_error is None else f"{one.conservation_error:g}",
            f"{one.pushes_applied} of {one.pushes_expected}",
            f"{one.recovery_seconds_median:.2f} ({one.recovery_seconds_max:.2f})",
            f"{one.serve_seconds_median:.2f} ({one.serve_seconds_max:.2f})",
        )
    return table


if __name__ == "__main__":
    main()
