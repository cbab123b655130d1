"""``thresher launch``: shards and workers on this machine, watched until they are done, and nothing left behind."""

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

from thresher.deploy.discovery import target_groups
from thresher.deploy.display import Picture
from thresher.deploy.launch_config import LaunchConfig
from thresher.deploy.processes import Child, ReservedPort, end_all, kill_all, printed_data
from thresher.deploy.results import (
    RunResult,
    merge_iterations,
    read_results,
    save_model,
    save_optimizer,
    summarize,
    write_results,
)
from thresher.deploy.stop_signals import StopSignals
from thresher.deploy.supervision import Supervised
from thresher.deploy.tether import Tether
from thresher.deploy.whole_files import write_whole
from thresher.protos import faults
from thresher.protos.errors import ConfigurationError, ThresherError
from thresher.protos.timeouts import JOURNAL_SECONDS
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import ShardCalls, ShardLostError

_logger = logging.getLogger(__name__)

Show = Callable[[Picture], None]
"""Takes a picture of the run, a few times a second."""

CONFIG_FILE: Final = "launch.json"
"""In the folder of a run: what it is."""

_POLL_SECONDS: Final = 0.25
_NOTICE_SECONDS: Final = 2.0
_GOODBYE_SECONDS: Final = 10.0  # for the others to say what they saw
_DRAIN_SECONDS: Final = 60.0  # for the last checkpoint; without it the next start has more to read, and nothing is lost


class RunFailedError(ThresherError, RuntimeError):
    """A shard or a worker ended as it should not; the message names it and shows the end of its log."""


@final
class Launch:
    """One run: all its processes, in one folder. Use as a context manager: at the end of the block all have ended.

    Where the folder holds the state of an earlier launch, the run goes on with that.
    """

    def __init__(self, config: LaunchConfig, folder: Path, title: str, stop: StopSignals) -> None:
        """Prepare; entering the block starts the shards and the workers."""
        self._config = config
        self._folder = folder.resolve()
        self._title = title
        self._stop = stop
        self._ports: list[ReservedPort] = []
        self._shards: list[Supervised] = []
        self._workers: dict[int, Supervised] = {}  # those that had not left before
        self._clients: list[ShardCalls] = []
        self._statistics: list[pb.StatisticsResponse] = []
        self._passes: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        """Start everything."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begin = self._heard = time.monotonic()
        self._tether = Tether()
        try:
            self._start_shards()
            if (self._folder / "state").exists():  # from an earlier launch: the shards know who has left since
                self._wait_for_shards()
            self._start_workers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything: the workers at once, for what they keep is whole at any instant; then the shards drain."""
        kill_all([worker.child for worker in self._workers.values()])
        for client in self._clients:
            client.close()
        end_all([shard.child for shard in self._shards], patience=_DRAIN_SECONDS)
        for port in self._ports:
            port.close()
        self._tether.__exit__()

    def watch(self, show: Show) -> RunResult:
        """Show the run until all workers are done; save the model; return what it came to.

        Raises:
            RunFailedError: when a process failed; the others have been given time to say what they saw.
        """
        while not self._is_saved():
            self._stop.pause(_POLL_SECONDS)
            self._tend()
            self._poll()
            show(self._picture())
        seconds = time.monotonic() - self._begin
        self._stop.pause(self._config.linger)
        return summarize(self._statistics, self._printed(0), seconds)

    # Processes

    def _start_shards(self) -> None:
        config = self._config
        for shard in range(config.shards):
            port = ReservedPort()
            self._ports.append(port)
            command = self._serve_command(shard, port.address)
            name = f"shard {shard}"
            start = partial(self._child, name, command, {})
            self._shards.append(self._supervised(name, start, config.restarts, may_end=False))
            self._clients.append(ShardCalls(shard, port.address, "the launcher"))

    def _wait_for_shards(self) -> None:
        while not self._all_answer():
            self._stop.pause(_POLL_SECONDS / 5)
            self._tend()

    def _serve_command(self, shard: int, address: str) -> list[str]:
        config = self._config
        options = {
            "--shard": shard,
            "--shards": config.shards,
            "--workers": config.workers,
            "--listen": address,
            "--round-timeout": config.round_timeout,
            "--lease": config.lease,
            "--iterations": self._folder / f"shard-{shard}.iterations.jsonl",
            "--metrics": "127.0.0.1:0",
        }
        if config.durability != "none":
            options |= {"--state-dir": state_of(self._folder, shard), "--durability": config.durability}
        flat = [str(part) for option in options.items() for part in option]
        return [sys.executable, "-m", "thresher.deploy", "serve", *flat, "--until-stdin-closes"]

    def _start_workers(self) -> None:
        config = self._config
        keeps = config.durability != "none"
        state_dir = self._folder / "state" / "workers" if keeps else None
        addresses = [port.address for port in self._ports]
        for rank in range(config.workers):
            if self._has_left(rank):  # in an earlier launch
                continue
            rows = self._folder / f"worker-{rank}.iterations.jsonl"
            settings = replace(config.settings(addresses, rank, state_dir), rows=rows)
            start = partial(self._worker, rank, settings.environment())
            # Without a memory another life would begin the script anew, in the middle of the run.
            restarts = config.restarts if keeps else 0
            self._workers[rank] = self._supervised(f"worker {rank}", start, restarts, may_end=True)

    def _supervised(self, name: str, start: Callable[[], Child], restarts: int, *, may_end: bool) -> Supervised:
        delay, longest = self._config.restart_delay, self._config.longest_pause
        return Supervised(name, start, restarts=restarts, delay=delay, longest=longest, may_end=may_end)

    def _worker(self, rank: int, variables: dict[str, str]) -> Child:
        if rank in self._workers:
            self._tether.let_go(self._workers[rank].child.pid)
        child = self._child(f"worker {rank}", [sys.executable, "-u", *self._config.command], variables)
        self._tether.hold(child.pid)
        return child

    def _child(self, name: str, command: Sequence[str], variables: dict[str, str]) -> Child:
        # One thread each, as torchrun does: the processes share the cores, and results repeat bit for bit.
        # No setting of this run may come from somewhere else, but a plan of faults is meant for all of it.
        outer = {
            key: value for key, value in os.environ.items() if not key.startswith("THRESHER_") or key == faults.VARIABLE
        }
        environment = {"OMP_NUM_THREADS": "1", **outer, "PYTHONUNBUFFERED": "1", **variables}
        data = printed_data(self._log(name)) if name.startswith("worker") else {}  # a shard says anew where it serves
        printed = self._folder / "printed.jsonl" if name == "worker 0" else None
        return Child(name, command, environment, self._log(name), Path(self._config.directory), data, printed)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.log"

    def _tend(self) -> None:
        """Start again what was killed. Raises RunFailedError when there is something for which that cannot help."""
        now = time.monotonic()
        for shard in self._shards:
            shard.tend(now, lambda: False)
        for rank, worker in self._workers.items():
            worker.tend(now, partial(self._is_over, rank))
        failed = next((one for one in (*self._shards, *self._workers.values()) if one.has_failed), None)
        if failed is not None:
            raise self._failure(failed)

    def _has_left(self, rank: int) -> bool:
        """True when a worker had said goodbye to all shards, as they were seen last: nothing is left for it to do."""
        seen = [shard.workers[rank].state for shard in self._statistics if rank < len(shard.workers)]
        return len(seen) == self._config.shards and set(seen) == {"left"}

    def _is_over(self, rank: int) -> bool | None:
        return self._has_left(rank) if self._all_answer() else None

    # Looking

    def _poll(self) -> Supervised | None:
        """Ask every shard how it stands. Return one that does not answer: then all are seen as they were."""
        for shard in self._shards:
            if "address" not in shard.child.data or shard.child.code is not None:
                return shard
        fresh: list[pb.StatisticsResponse] = []
        for shard, client in zip(self._shards, self._clients, strict=True):
            try:
                fresh.append(client.statistics(timeout=_NOTICE_SECONDS))
            except ThresherError:
                return shard
        self._statistics, self._heard = fresh, time.monotonic()
        self._write_targets()
        return None

    def _all_answer(self) -> bool:
        """True when all shards are seen as they are, and not as they were: what is irrevocable is decided only then.

        Raises:
            RunFailedError: when one is silent for longer than its restart and its journal may take.
        """
        silent = self._poll()
        waited = time.monotonic() - self._heard
        if silent is not None and waited > self._config.longest_pause + JOURNAL_SECONDS:
            raise self._failure(silent, f"it has not answered for {waited:.0f} s")
        return silent is None

    def _picture(self) -> Picture:
        printed = [self._printed(rank) for rank in range(self._config.workers)]
        for rank, said in enumerate(printed):
            epoch = said.get("epoch")
            if isinstance(epoch, int) and self._statistics and epoch != self._passes.get(rank, (None,))[0]:
                self._passes[rank] = (epoch, self._statistics[0].workers[rank].steps)
        return Picture(self._title, self._statistics, printed, time.monotonic() - self._begin, self._passes)

    def _printed(self, rank: int) -> dict[str, object]:
        return self._workers[rank].child.data if rank in self._workers else printed_data(self._log(f"worker {rank}"))

    def _write_targets(self) -> None:
        """Tell Prometheus where the endpoints are (file_sd_configs)."""
        shards = [str(shard.child.data["metrics"]) for shard in self._shards]
        workers = [worker.metrics_address for worker in self._statistics[0].workers if worker.metrics_address]
        text = json.dumps(target_groups(name_of(self._folder), shards, workers))
        path = self._folder / "targets.json"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with suppress(OSError):  # a full disk: tried again the next time
                write_whole(path, text)

    # Ends

    def _failure(self, failed: Supervised, why: str = "") -> RunFailedError:
        """Wait for the others to end by themselves and say what they saw; then describe what happened."""
        begin = time.monotonic()
        while any(worker.child.code is None for worker in self._workers.values()):
            self._stop.pause(_POLL_SECONDS / 5)
            self._poll()
            waited = time.monotonic() - begin
            told = any(shard.state == "failed" for shard in self._statistics)
            if waited > (_GOODBYE_SECONDS if told else _NOTICE_SECONDS):
                break
        cause = self._cause() or failed
        how = (cause is failed and why) or cause.ending()
        everybody = (*self._shards, *self._workers.values())
        report = "\n  ".join(f"{one.name}: {one.ending()} ({one.child.log})" for one in everybody)
        return RunFailedError(
            f"{cause.name} failed: {how}\n  {report}\nend of {cause.child.log}:\n{cause.child.last_lines()}"
        )

    def _cause(self) -> Supervised | None:
        """Return the worker that gave up first, as the shards saw it; the others end too, but only because of it."""
        if any(shard.has_failed for shard in self._shards):
            return None  # then it was no worker
        seen = [worker for shard in self._statistics for worker in shard.workers]
        return next((self._workers[worker.rank] for worker in seen if worker.state == "aborted"), None)

    def _is_saved(self) -> bool:
        """Once all workers are done, leave model, optimizer state and per-iteration file in the run's folder."""
        if not all(worker.is_done for worker in self._workers.values()) or not self._all_answer():
            return False
        if not all(shard.version for shard in self._statistics):
            raise RunFailedError(
                f"all workers ended well, but none made a step: does {self._config.command[0]} call connect() and "
                "wrap(), and then optimizer.step()?"
            )
        try:
            snapshots = [client.snapshot(wait_seconds=_GOODBYE_SECONDS) for client in self._clients]
        except ShardLostError:
            return False  # it was killed just now, and comes back
        lockstep = self._config.consistency.lockstep
        save_model(self._folder / "model.safetensors", snapshots, lockstep=lockstep)
        save_optimizer(self._folder / "optimizer.safetensors", snapshots)
        parts = [self._folder / f"shard-{shard}.iterations.jsonl" for shard in range(self._config.shards)]
        merge_iterations(parts, self._folder / "iterations.jsonl", lockstep=lockstep)
        return True


def name_of(folder: Path) -> str:
    """Return the name of the run in a folder: the folder's, and ``NAME/dense`` for the baseline of the run NAME."""
    is_baseline = (folder.parent / CONFIG_FILE).exists()
    return f"{folder.parent.name}/{folder.name}" if is_baseline else folder.name


def state_of(folder: Path, shard: int) -> Path:
    """Return where a shard of a run keeps its journal."""
    return folder / "state" / f"shard-{shard}"


def launch(config: LaunchConfig, folder: Path, show: Show, stop: StopSignals) -> dict[str, RunResult]:
    """Run ``config`` in ``folder``, or go on with what an earlier launch has left there.

    Returns:
        The results by name: ``sparse``, and ``dense`` for a baseline; ``result.json`` in ``folder`` has them too. At
        once, where the run is finished.

    Raises:
        ConfigurationError: when another launcher is at work in ``folder``.
        RunFailedError: when a process failed.
        StopRequestedError: when ``stop`` has heard a signal.
    """
    with _at_work(config, folder):
        results = read_results(folder / "result.json")
        for name, (one, where) in config.stages(folder).items():
            if name in results:
                _logger.info("%s is finished", where)
                continue
            with Launch(one, where, f"{name}: {Path(one.command[0]).name}", stop) as run:
                results[name] = run.watch(show)
            facts = {"workers": config.workers, "shards": config.shards, "seed": config.seed}
            write_results(folder / "result.json", results, **facts)  # now: the next run may fail or be stopped
    return results


@contextmanager
def _at_work(config: LaunchConfig, folder: Path) -> Iterator[None]:
    """Write down what the run is, keep other launchers away, and have what is said of the run in its folder too."""
    path = folder / CONFIG_FILE
    if not path.exists():
        config.write(path)
    package = logging.getLogger("thresher.deploy")
    with path.open(encoding="utf-8") as locked:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"another launcher is at work in {folder}; stop that one first") from None
        log = logging.FileHandler(folder / "launch.log", encoding="utf-8", delay=True)
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package.addHandler(log)
        try:
            yield
        finally:
            package.removeHandler(log)
            log.close()
