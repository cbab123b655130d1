"""The storm on Ray: shards, workers, nodes and drivers are killed in the middle of runs of 300 steps.

    python benchmarks/ray_storm.py --kill shard worker node node-memory driver elastic

A cluster of this machine: a head, and three nodes, each in a mount namespace of its own, whose local folder is a file
system that ends with it. Four shards and four workers of Ray Train make a run; it is held against `thresher launch` of
the same script, bit for bit. ``runs/ray-storm/result.json`` has the table. Needs root, for the namespaces.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import ray
import torch
from ray_storm_worker import accuracy, network
from rich.console import Console
from rich.table import Table

from thresher.deploy.ray_cluster import RayConfig, down, status, up
from thresher.deploy.ray_cluster.calls import actors_of
from thresher.deploy.ray_cluster.local import local_cluster
from thresher.deploy.replay import Replay
from thresher.worker import Method

SHARDS, WORKERS, NODES = 4, 4, 3
KILL_AT: Final = 100  # steps: a third of the run
PASSES: Final = 25  # 300 steps of four workers
LONG: Final = 75  # passes: time for Ray Train to make its group anew, twice
PAUSE: Final = 0.05
LEASE: Final = 240.0  # on a busy machine Ray Train may need a minute to start its group again
SHORT_LEASE: Final = 10.0  # of who is not meant to come back
SECONDS: Final = 300.0
WORKER: Final = Path(__file__).with_name("ray_storm_worker.py")
METHOD: Final = Method(density=0.05)
KILLS: Final = ("shard", "worker", "node", "node-memory", "driver")

console = Console()


@dataclass
class Outcome:
    """One run in which something was killed; ``workers`` are how many belonged to it, in their order."""

    what_was_killed: str
    steps: int
    bit_identical: bool
    recovery_seconds: float
    accuracy: float
    workers: list[int]


class Node:
    """A node with a local folder of its own, which is gone with it."""

    def __init__(self, address: str, local: Path, *, cpus: int, seats: int) -> None:
        before = {node["NodeID"] for node in ray.nodes()}
        start = [Path(sys.executable).with_name("ray"), "start", f"--address={address}", "--block"]
        start += [f"--num-cpus={cpus}", f'--resources={{"seat": {seats}}}', "--object-store-memory=100000000"]
        mount = 'mount -t tmpfs none "$0" && exec "$@"'
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", mount, local, *start],  # noqa: S607
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda: {node["NodeID"] for node in alive()} - before, "a new node")
        self.number = ({node["NodeID"] for node in alive()} - before).pop()
        self.namespace = namespace_of(self._process.pid)

    def kill(self) -> None:
        """End all that runs on it, at once."""
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if namespace_of(int(path.name)) == self.namespace:
                    os.kill(int(path.name), signal.SIGKILL)
        self._process.wait()


def namespace_of(process: int) -> Path:
    return Path(f"/proc/{process}/ns/mnt").readlink()


def alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


class Storm:
    """A cluster, and one run after the other on it."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.local, self._address = folder, folder / "local", address
        self.local.mkdir()
        self.nodes: list[Node] = []
        self._drivers: list[subprocess.Popen[bytes]] = []

    def add_node(self, seats: int = 4) -> None:
        """Add a node with room for so many workers."""
        self.nodes.append(Node(self._address, self.local, cpus=8, seats=seats))

    def close(self) -> None:
        """End everything."""
        for driver in self._drivers:
            driver.kill()
        for node in self.nodes:
            node.kill()

    def start(self, name: str, *, workers: int = WORKERS, local_memory: bool = False, lease: float = LEASE) -> None:
        """Start the shards of a run."""
        up(
            RayConfig(
                name,
                shards=SHARDS,
                workers=workers,
                method=METHOD,
                state_dir=self.folder / name,
                worker_state_dir=self.local / name if local_memory else None,
                lease=lease,
                insecure=True,
            )
        )

    def drive(self, name: str, *workers: int, passes: int = PASSES) -> "subprocess.Popen[bytes]":
        """Start a driver, which trains."""
        numbers = [str(number) for number in workers or (WORKERS,)]
        options = [
            "--passes",
            str(passes),
            "--pause",
            str(PAUSE),
            "--storage",
            str(self.folder / "train"),
            "--workers",
            *numbers,
        ]
        with (self.folder / f"{name}.log").open("ab") as log:
            driver = subprocess.Popen(
                [sys.executable, WORKER, name, *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "RAY_ADDRESS": self._address, "RAY_TRAIN_V2_ENABLED": "1"},
            )
        self._drivers.append(driver)
        return driver

    def kill(self, what: str, name: str, driver: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
        """Kill it; return the driver from then on."""
        match what:
            case "shard":
                os.kill(status(name)[0].pid, signal.SIGKILL)
            case "worker":
                os.kill(self._worker(name, rank=1), signal.SIGKILL)
            case "node" | "node-memory":
                lost = self._node_of(self._worker(name, rank=1))
                self.nodes.remove(lost)
                lost.kill()
            case "driver":
                driver.kill()
                driver.wait()
                return self.drive(name)
            case _:
                raise ValueError(what)
        return driver

    def _worker(self, name: str, rank: int) -> int:
        told = ray.get(actors_of(name)[0].statistics.remote(), timeout=SECONDS)
        return int(told["members"][rank]["origin"].rpartition(":")[2])

    def _node_of(self, process: int) -> Node:
        return next(node for node in self.nodes if node.namespace == namespace_of(process))

    def run(self, what: str, reference: dict[str, torch.Tensor]) -> Outcome:
        """Make a run, and kill something a third of the way."""
        name = f"storm-{what}"
        self.start(name, local_memory=what == "node-memory")
        driver = self.drive(name)
        wait_for(lambda: version(name) >= KILL_AT, f"step {KILL_AT} of {name}")
        driver = self.kill(what, name, driver)
        begin, reached = time.monotonic(), max(shard.version for shard in status(name)) + 1
        wait_for(lambda: version(name) > reached, f"{name} to go on")
        recovery = time.monotonic() - begin
        self._finish(name, driver)
        if what.startswith("node"):
            self.add_node()
        return self._outcome(what, name, reference, recovery, [WORKERS])

    def resize(self, reference: dict[str, torch.Tensor]) -> Outcome:
        """Two workers, four, three: seats come with a node, and go with another."""
        name, members = "storm-elastic", []
        while self.nodes:
            self.nodes.pop().kill()
        self.add_node(seats=2)
        self.start(name, workers=2, lease=SHORT_LEASE)
        driver = self.drive(name, 2, 4, passes=LONG)
        for seats, number in ((2, 4), (1, 3)):
            begun = version(name)
            wait_for(lambda begun=begun: version(name) >= begun + KILL_AT, f"{KILL_AT} steps of {name}")
            members.append(status(name)[0].members)
            if len(self.nodes) > 1:
                self.nodes.pop().kill()
            self.add_node(seats=seats)
            begin = time.monotonic()
            wait_for(lambda number=number: status(name)[0].members == number, f"{number} members of {name}")
        recovery = time.monotonic() - begin
        members.append(status(name)[0].members)
        self._finish(name, driver)
        return self._outcome("elastic", name, reference, recovery, members)

    def _finish(self, name: str, driver: "subprocess.Popen[bytes]") -> None:
        if driver.wait(timeout=SECONDS):
            raise RuntimeError(f"the driver of {name} ended with {driver.returncode}; see {self.folder / name}.log")

    def _outcome(
        self,
        what: str,
        name: str,
        reference: dict[str, torch.Tensor],
        recovery: float,
        workers: list[int],
    ) -> Outcome:
        down(name)
        kept = Replay(self.folder / name)
        steps = kept.spans[-1][1]
        model = kept.model(steps)
        same = model.keys() == reference.keys() and all(torch.equal(model[key], reference[key]) for key in model)
        trained = network()
        trained.load_state_dict(model)
        return Outcome(what, steps, same, round(recovery, 2), round(accuracy(trained), 4), workers)


def version(name: str) -> int:
    """Return the version of the slowest shard; 0 while one does not answer."""
    return min((shard.version for shard in status(name)), default=0)


def launched(folder: Path) -> dict[str, torch.Tensor]:
    """Train without Ray, and return the model at the end."""
    command = [Path(sys.executable).with_name("thresher"), "launch", "--shards", str(SHARDS), "--workers", str(WORKERS)]
    command += ["--density", str(METHOD.density), "--runs", folder, "--name", "launched", WORKER]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    kept = Replay(folder / "launched")
    return kept.model(kept.spans[-1][1])


@contextmanager
def storm(folder: Path) -> Iterator[Storm]:
    with local_cluster(num_cpus=0, object_store_memory=100_000_000) as cluster, ExitStack() as held:
        made = Storm(folder, cluster.address)
        held.callback(made.close)
        for _ in range(NODES):
            made.add_node()
        yield made


def table(outcomes: list[Outcome]) -> Table:
    shown = Table("killed", "steps", "same bits", "recovery s", "accuracy", "workers")
    for one in outcomes:
        numbers = " → ".join(map(str, one.workers))
        shown.add_row(
            one.what_was_killed, str(one.steps), str(one.bit_identical), f"{one.recovery_seconds:.1f}",
            f"{one.accuracy:.2%}", numbers,
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", nargs="+", choices=[*KILLS, "elastic"], default=[*KILLS, "elastic"])
    parser.add_argument("--folder", type=Path, default=Path("runs/ray-storm"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference = launched(folder)
    outcomes = []
    with storm(folder) as made:
        for what in options.kill:
            console.print(f"{what} …")
            outcomes.append(made.resize(reference) if what == "elastic" else made.run(what, reference))
            console.print(asdict(outcomes[-1]))
            (folder / "result.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1), "utf-8")
    console.print(table(outcomes))
    wrong = [one for one in outcomes if not one.bit_identical and one.what_was_killed not in ("node-memory", "elastic")]
    sys.exit(f"not the same bits: {[one.what_was_killed for one in wrong]}" if wrong else 0)


if __name__ == "__main__":
    main()
