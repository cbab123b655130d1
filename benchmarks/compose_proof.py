"""Brings docker-compose.yml up, kills a shard and a worker while it trains, and counts what is left.

    python benchmarks/compose_proof.py [--tls]

With `docker compose`, or podman-compose where that is missing; as root, because it kills processes in containers, so
that their restart policy acts. `runs/compose/result.json` says what ran, how workers ended, and whether Prometheus'
counters, which the shards keep, are what the workers have in their own files; beside it lie the folder of the run and
`panels.json`, what the dashboard's panels showed, which compose_panels.py draws. Exit code 1, and why, when something
is not as it should be.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "dashboards" / "thresher.json"
PROJECT: Final = "thresher-proof"
STATE: Final = "/var/lib/thresher"
SHARDS: Final = ("shard-0", "shard-1")
WORKERS: Final = 4
KILL_SHARD_AT, KILL_WORKER_AT = 60, 150  # rounds of some 360
ACCURATE: Final = 0.95
PATIENCE: Final = 600.0
ENGINE_SECONDS: Final = 60.0  # for what an engine answers at once
SCRAPED: Final = 20.0  # by then Prometheus has read what is final
SCRAPE_INTERVAL: Final = 2  # as prometheus.yml has it
MOVED: Final = "sum(thresher_push_bytes_total) + sum(thresher_pull_bytes_total)"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        services: State of each container at the end.
        workers_exit_codes: By container.
        shards_serving: As `thresher status` says, asked in a container at the end.
        killed: Containers whose process was killed, and at which round.
        accuracy: As worker 0 has printed it.
        bytes_by_prometheus: Up and down, from the shards' counters.
        bytes_by_workers: The same, added up over the rows that the workers wrote.
        panels: How many the dashboard has.
        panels_with_data: Those of which every query found data while the run went on.
    """

    services: dict[str, str]
    workers_exit_codes: dict[str, int]
    shards_serving: int
    killed: dict[str, int]
    accuracy: float
    bytes_by_prometheus: int
    bytes_by_workers: int
    panels: int
    panels_with_data: int


def shortcomings(outcome: Outcome) -> list[str]:
    """Return what is not as it should be, a sentence each."""
    stay = [f"{PROJECT}-{name}-1" for name in (*SHARDS, "prometheus")]
    gone = [name for name in stay if outcome.services.get(name) != "running"]
    codes = outcome.workers_exit_codes
    checks = (
        (not gone, f"not running at the end: {', '.join(gone)}"),
        (len(codes) == WORKERS, f"there are {len(codes)} workers instead of {WORKERS}"),
        (not any(codes.values()), f"not every worker ended with exit code 0: {codes}"),
        (outcome.shards_serving == len(SHARDS), f"{outcome.shards_serving} of {len(SHARDS)} shards serve at the end"),
        (len(outcome.killed) == 2, f"the run was over before a shard and a worker were killed: {outcome.killed}"),
        (outcome.accuracy >= ACCURATE, f"the accuracy is {outcome.accuracy:.4f}, below {ACCURATE}"),
        (outcome.bytes_by_workers > 0, "the workers have moved nothing"),
        (
            outcome.bytes_by_prometheus == outcome.bytes_by_workers,
            f"shards count {outcome.bytes_by_prometheus} bytes, workers {outcome.bytes_by_workers}: one is wrong",
        ),
        (
            outcome.panels_with_data == outcome.panels > 0,
            f"{outcome.panels_with_data} of {outcome.panels} panels have found data",
        ),
    )
    return [sentence for is_well, sentence in checks if not is_well]


class Compose:
    """The project, by whichever compose is here. Whatever fails, or takes too long, ends the program."""

    def __init__(self, files: Sequence[str], environment: Mapping[str, str]) -> None:
        """Look what is here."""
        self._environment = os.environ | environment
        self._files = [word for file in files for word in ("-f", file)]
        docker = shutil.which("docker")
        if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
            self._compose, self._engine = [docker, "compose"], docker
        elif shutil.which("podman-compose") and shutil.which("podman"):
            self._compose, self._engine = ["podman-compose"], "podman"
        else:
            sys.exit("neither `docker compose` nor podman-compose is here: install one of them")

    def compose(self, *arguments: str) -> None:
        """Run a command of compose, which shows what it does."""
        self._run([*self._compose, *self._files, "-p", PROJECT, *arguments], 2 * PATIENCE, is_shown=True)

    def execute(self, service: str, *command: str) -> str:
        """Return what a command prints that is run in the container of a service."""
        inside = ("exec", "-T", service, *command)
        return self._run([*self._compose, *self._files, "-p", PROJECT, *inside], ENGINE_SECONDS)

    def engine(self, *arguments: str) -> str:
        """Return what a command of the engine prints."""
        return self._run([self._engine, *arguments], ENGINE_SECONDS)

    def _run(self, command: list[str], seconds: float, *, is_shown: bool = False) -> str:
        pipe = None if is_shown else subprocess.PIPE
        try:
            ran = subprocess.run(
                command, cwd=ROOT, env=self._environment, stdout=pipe, stderr=pipe, text=True, check=False,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            sys.exit(f"not done in {seconds:.0f} s: {' '.join(command)}")
        if ran.returncode:
            sys.exit(f"failed with exit code {ran.returncode}: {' '.join(command)}\n{ran.stderr or ''}")
        return (ran.stdout or "").strip()

    def containers(self) -> list[str]:
        """Return the names of all containers of the project."""
        names = self.engine("ps", "--all", "--filter", f"name={PROJECT}-", "--format", "{{.Names}}")
        return sorted(names.split())

    def workers(self) -> list[str]:
        """Return the names of the workers' containers, of which there must be as many as were asked for."""
        found = [name for name in self.containers() if name.startswith(f"{PROJECT}-worker-")]
        if len(found) != WORKERS:
            sys.exit(f"there are {len(found)} containers of workers instead of {WORKERS}: {found}")
        return found

    def state(self, container: str) -> tuple[str, int]:
        """Return ``running`` or ``exited``, and the exit code."""
        status, code = self.engine("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", container).split()
        return status, int(code)

    def states(self) -> dict[str, tuple[str, int]]:
        """Return the state of each container."""
        return {name: self.state(name) for name in self.containers()}

    def kill(self, container: str) -> None:
        """Kill the process, not the container: an engine leaves down what it was asked to kill."""
        pid, identity = self.engine("inspect", "-f", "{{.State.Pid}} {{.Id}}", container).split()
        kill_contained(int(pid), identity)


def kill_contained(pid: int, container: str) -> None:
    """Kill a process of this machine, if it is in the container of that id.

    An engine says 0 of a container that has no process, and one in a virtual machine counts the processes of that one:
    here such a number is anybody's.
    """
    if pid <= 1:
        sys.exit(f"the engine says that the container's process is {pid}: it runs no longer, or not yet")
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        groups = ""
    if container not in groups:
        sys.exit(f"process {pid} of this machine is not in container {container}: does the engine run elsewhere?")
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:
        sys.exit(f"process {pid} may not be killed: be root")


@dataclass
class Watched:
    """What was seen while the run went on: who was killed, at which round and when, and the queries that found data."""

    killed: dict[str, int] = field(default_factory=dict)
    killed_at: dict[str, float] = field(default_factory=dict)
    with_data: set[str] = field(default_factory=set)


def ask(query: str, port: int, **times: float) -> list[dict[str, Any]]:
    """Return the series of a query, over a range where ``times`` has one; none while Prometheus is not there."""
    kind = "query_range" if times else "query"
    address = f"http://127.0.0.1:{port}/api/v1/{kind}?{urllib.parse.urlencode({'query': query, **times})}"
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


def panels() -> list[dict[str, Any]]:
    return list(json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"])


def queries(panel: dict[str, Any]) -> dict[str, str]:
    """Return the queries of a panel, by their legend."""
    return {target["legendFormat"]: target["expr"].replace("$run", ".*") for target in panel["targets"]}


def shown(panel: dict[str, Any], began: float, ended: float, port: int) -> dict[str, Any]:
    """Return a panel with what it shows: for each line its legend and the points, in seconds since ``began``."""
    lines: list[dict[str, Any]] = []
    for legend, query in queries(panel).items():
        for series in ask(query, port, start=began, end=ended, step=SCRAPE_INTERVAL):
            name = legend.removeprefix("{{run}}").strip()  # there is one
            for label, value in series["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            points = [(at - began, float(value)) for at, value in series["values"] if math.isfinite(float(value))]
            lines.append({"name": name, "points": points})
    defaults = panel["fieldConfig"]["defaults"]
    looks = {"unit": defaults["unit"], "look": defaults.get("custom", {})}
    return {name: panel[name] for name in ("title", "type", "gridPos")} | looks | {"lines": lines}


def train_and_kill(compose: Compose, port: int) -> Watched:
    """Watch the run to its end."""
    due = {f"{PROJECT}-shard-1-1": KILL_SHARD_AT, f"{PROJECT}-worker-2": KILL_WORKER_AT}
    seen = Watched()
    asked = {query for panel in panels() for query in queries(panel).values()}

    def over() -> bool:
        round_ = number("max(thresher_iterations_total)", port)
        for container in [name for name, at in due.items() if round_ >= at and name not in seen.killed]:
            print(f"round {round_}: {container} is killed", flush=True)
            compose.kill(container)
            seen.killed[container], seen.killed_at[container] = round_, time.time()
        seen.with_data.update(query for query in asked - seen.with_data if ask(query, port))
        return all(compose.state(name) == ("exited", 0) for name in compose.workers())

    if not wait(over, PATIENCE):
        sys.exit(f"the workers have not ended well in {PATIENCE:.0f} s: {compose.states()}")
    return seen


def bytes_in_rows(folder: Path) -> int:
    """Add up what the workers' rows say; each step must have one."""
    total = 0
    for path in sorted(folder.glob("worker-*.iterations.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [row["step"] for row in rows]
        if steps != list(range(1, len(steps) + 1)):
            sys.exit(f"{path} has not one row for each step: {steps}")
        total += sum(row["push_bytes"] + row["pull_bytes"] for row in rows)
    return total


def accuracy_of(compose: Compose) -> float:
    """Return what worker 0 printed last, whichever container it was."""
    for name in compose.workers():
        said: dict[str, Any] = {}
        for line in compose.engine("logs", name).splitlines():
            with suppress(ValueError):
                said |= json.loads(line)
        if said.get("rank") == 0 and "accuracy" in said:
            return float(said["accuracy"])
    sys.exit("no worker was rank 0 and printed an accuracy")


def serving(compose: Compose, *, is_tls: bool) -> int:
    """Return how many shards serve, as `thresher status` says in a container of one."""
    shown_as = ("--tls-cert", "/certs/made/observer.pem", "--tls-key", "/certs/made/observer.key")
    addresses = ",".join(f"{shard}:50051" for shard in SHARDS)
    said = compose.execute(SHARDS[0], "thresher", "status", addresses, "--json", *(shown_as if is_tls else ()))
    return int(json.loads(said)["run"]["serving"])


def run(compose: Compose, folder: Path, port: int, *, is_tls: bool) -> Outcome:
    compose.compose("build", SHARDS[0])  # the image of all
    began = time.time()
    compose.compose("up", "-d")
    seen = train_and_kill(compose, port)
    for name in (*(f"{PROJECT}-{shard}-1" for shard in SHARDS), compose.workers()[0]):
        compose.engine("cp", f"{name}:{STATE}/.", str(folder))
    by_workers = bytes_in_rows(folder)
    wait(lambda: number(MOVED, port) == by_workers, SCRAPED)
    killed = {name: at - began for name, at in seen.killed_at.items()}
    drawn = {"killed": killed, "panels": [shown(panel, began, time.time(), port) for panel in panels()]}
    (folder / "panels.json").write_text(json.dumps(drawn) + "\n", encoding="utf-8")
    states, workers = compose.states(), compose.workers()
    return Outcome(
        services={name: status for name, (status, _) in states.items()},
        workers_exit_codes={name: code for name, (_, code) in states.items() if name in workers},
        shards_serving=serving(compose, is_tls=is_tls),
        killed=seen.killed,
        accuracy=accuracy_of(compose),
        bytes_by_prometheus=number(MOVED, port),
        bytes_by_workers=by_workers,
        panels=len(panels()),
        panels_with_data=sum(seen.with_data.issuperset(queries(panel).values()) for panel in panels()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="runs/compose by default, or runs/compose-tls")
    parser.add_argument("--port", type=int, default=9091, help="of Prometheus")
    parser.add_argument("--tls", action="store_true", help="with deploy/docker/tls.yml")
    parser.add_argument("--keep", action="store_true", help="leave all containers as they are")
    options = parser.parse_args()
    folder = options.folder or ROOT / "runs" / ("compose-tls" if options.tls else "compose")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = ("docker-compose.yml", *(("deploy/docker/tls.yml",) if options.tls else ()))
    settings = {"PROMETHEUS_PORT": str(options.port), "WORKERS": str(WORKERS), "EPOCHS": "30", "DENSITY": "0.01"}
    compose = Compose(files, settings)
    compose.compose("down", "-v")
    try:
        outcome = run(compose, folder, options.port, is_tls=options.tls)
    finally:
        if not options.keep:
            compose.compose("down", "-v")
    text = json.dumps(asdict(outcome), indent=2)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    wrong = shortcomings(outcome)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
