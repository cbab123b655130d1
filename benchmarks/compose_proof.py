"""Brings docker-compose.yml up, kills a shard and a worker while it trains, and counts what is left.

    python benchmarks/compose_proof.py

With `docker compose`, or podman-compose where that is missing; as root, because it kills processes in containers, so
that their restart policy acts. `runs/compose/result.json` says what ran, how workers ended, and whether Prometheus'
counters, which the shards keep, are what the workers have in their own files; beside it lies the folder of the run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "dashboards" / "thresher.json"
PROJECT: Final = "thresher-proof"
STATE: Final = "/var/lib/thresher"
KILL_SHARD_AT, KILL_WORKER_AT = 60, 150  # rounds of some 360
PATIENCE: Final = 600.0
SCRAPED: Final = 20.0  # by then Prometheus has read what is final
MOVED: Final = "sum(thresher_push_bytes_total) + sum(thresher_pull_bytes_total)"


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        services: State of each container at the end.
        workers_exit_codes: By container.
        killed: Containers whose process was killed, and at which round.
        accuracy: As worker 0 has printed it.
        bytes_by_prometheus: Up and down, from the shards' counters.
        bytes_by_workers: The same, added up over the rows that the workers wrote.
        panels: How many the dashboard has.
        panels_with_data: Those of which every query found data while the run went on.
    """

    services: dict[str, str]
    workers_exit_codes: dict[str, int]
    killed: dict[str, int]
    accuracy: float
    bytes_by_prometheus: int
    bytes_by_workers: int
    panels: int
    panels_with_data: int


class Compose:
    """The project, by whichever compose is here."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Look what is here."""
        self._environment = os.environ | environment
        docker = shutil.which("docker")
        if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
            self._compose, self._engine = [docker, "compose"], docker
        elif shutil.which("podman-compose") and shutil.which("podman"):
            self._compose, self._engine = ["podman-compose"], "podman"
        else:
            sys.exit("neither `docker compose` nor podman-compose is here: install one of them")

    def compose(self, *arguments: str) -> None:
        """Run a command of compose. Ends the program when it fails."""
        command = [*self._compose, "-p", PROJECT, *arguments]
        if subprocess.run(command, cwd=ROOT, env=self._environment, check=False, timeout=2 * PATIENCE).returncode:
            sys.exit(f"failed: {' '.join(command)}")

    def engine(self, *arguments: str) -> str:
        """Return what a command of the engine prints."""
        return subprocess.run([self._engine, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    def containers(self) -> list[str]:
        """Return the names of all containers of the project."""
        names = self.engine("ps", "--all", "--filter", f"name={PROJECT}-", "--format", "{{.Names}}")
        return sorted(names.split())

    def state(self, container: str) -> tuple[str, int]:
        """Return ``running`` or ``exited``, and the exit code."""
        status, code = self.engine("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", container).split()
        return status, int(code)

    def states(self) -> dict[str, tuple[str, int]]:
        """Return the state of each container."""
        return {name: self.state(name) for name in self.containers()}

    def kill(self, container: str) -> None:
        """Kill the process, not the container: an engine leaves down what it was asked to kill."""
        os.kill(int(self.engine("inspect", "-f", "{{.State.Pid}}", container)), signal.SIGKILL)


def ask(query: str, port: int) -> list[dict[str, Any]]:
    """Return the series of a query; none while Prometheus is not there."""
    address = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])
    except (urllib.error.URLError, OSError):
        return []


def number(query: str, port: int) -> int:
    found = ask(query, port)
    return int(float(found[0]["value"][1])) if found else 0


def wait(found: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``found()``; return False when it is not in time."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def panels() -> dict[int, set[str]]:
    """Return the queries of each panel of the dashboard."""
    found = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return {one["id"]: {target["expr"].replace("$run", ".*") for target in one["targets"]} for one in found}


def train_and_kill(compose: Compose, port: int) -> tuple[dict[str, int], set[str]]:
    """Watch the run to its end; return who was killed at which round, and the queries that found data."""
    due = {f"{PROJECT}-shard-1-1": KILL_SHARD_AT, f"{PROJECT}-worker-2": KILL_WORKER_AT}
    killed: dict[str, int] = {}
    with_data: set[str] = set()
    queries = set().union(*panels().values())

    def over() -> bool:
        round_ = number("max(thresher_iterations_total)", port)
        for container in [name for name, at in due.items() if round_ >= at and name not in killed]:
            print(f"round {round_}: {container} is killed")
            compose.kill(container)
            killed[container] = round_
        with_data.update(query for query in queries - with_data if ask(query, port))
        return all(compose.state(name) == ("exited", 0) for name in workers(compose))

    if not wait(over, PATIENCE):
        sys.exit(f"the workers have not ended well in {PATIENCE:.0f} s: {compose.states()}")
    return killed, with_data


def workers(compose: Compose) -> list[str]:
    return [name for name in compose.containers() if name.startswith(f"{PROJECT}-worker-")]


def bytes_in_rows(folder: Path) -> int:
    """Add up what the workers' rows say; each step must have one."""
    total = 0
    for path in sorted(folder.glob("worker-*.iterations.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [row["step"] for row in rows]
        assert steps == list(range(1, len(steps) + 1)), f"{path} has not a row for each step: {steps}"
        total += sum(row["push_bytes"] + row["pull_bytes"] for row in rows)
    return total


def accuracy_of(compose: Compose) -> float:
    """Return what worker 0 printed last, whichever container it was."""
    for name in workers(compose):
        said: dict[str, Any] = {}
        for line in compose.engine("logs", name).splitlines():
            with suppress(ValueError):
                said |= json.loads(line)
        if said.get("rank") == 0:
            return float(said["accuracy"])
    raise AssertionError("no worker was rank 0")


def run(compose: Compose, folder: Path, port: int) -> Outcome:
    compose.compose("build", "shard-0")  # the image of all
    compose.compose("up", "-d")
    killed, with_data = train_and_kill(compose, port)
    for name in (f"{PROJECT}-shard-0-1", f"{PROJECT}-shard-1-1", workers(compose)[0]):
        compose.engine("cp", f"{name}:{STATE}/.", str(folder))
    by_workers = bytes_in_rows(folder)
    wait(lambda: number(MOVED, port) == by_workers, SCRAPED)
    return Outcome(
        services={name: status for name, (status, _) in compose.states().items()},
        workers_exit_codes={name: code for name, (_, code) in compose.states().items() if name in workers(compose)},
        killed=killed,
        accuracy=accuracy_of(compose),
        bytes_by_prometheus=number(MOVED, port),
        bytes_by_workers=by_workers,
        panels=len(panels()),
        panels_with_data=sum(queries <= with_data for queries in panels().values()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "compose")
    parser.add_argument("--port", type=int, default=9091, help="of Prometheus")
    parser.add_argument("--keep", action="store_true", help="leave all containers as they are")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    compose = Compose({"PROMETHEUS_PORT": str(options.port)})
    compose.compose("down", "-v")
    try:
        outcome = run(compose, options.folder, options.port)
    finally:
        if not options.keep:
            compose.compose("down", "-v")
    text = json.dumps(asdict(outcome), indent=2)
    (options.folder / "result.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    assert outcome.bytes_by_prometheus == outcome.bytes_by_workers > 0, "something was lost, or counted twice"
    assert len(outcome.killed) == 2, "the run was over before everybody was killed"
    assert outcome.panels_with_data == outcome.panels, "a panel has found no data"


if __name__ == "__main__":
    main()
