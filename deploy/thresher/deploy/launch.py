"""``thresher launch``: shards and workers on this machine, watched until they are done, and nothing left behind."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self, final

from thresher.deploy.display import Picture
from thresher.deploy.processes import Child, end_all
from thresher.deploy.results import (
    RunResult,
    merge_iterations,
    save_model,
    save_optimizer,
    summarize,
    write_results,
)
from thresher.protos.errors import ConfigurationError, ThresherError
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Settings
from thresher.worker.calls import ShardCalls
from thresher.worker.method import Method

_logger = logging.getLogger(__name__)

Show = Callable[[Picture], None]
"""Takes a picture of the run, a few times a second."""

_POLL_SECONDS: Final = 0.25
_START_SECONDS: Final = 60.0
_GOODBYE_SECONDS: Final = 10.0  # beyond the lease, for the others to say whom they missed


class RunFailedError(ThresherError, RuntimeError):
    """A shard or a worker ended as it should not; the message names it and shows the end of its log."""


class StopRequestedError(ThresherError, RuntimeError):
    """The user or the system asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        """Remember the signal's number."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@final
class StopSignals:
    """Hears SIGINT and SIGTERM. The first is remembered and raised by the next `pause`; a second one ends at once.

    Raising in the handler itself would strike anywhere, also where an exception is swallowed.
    """

    def __init__(self) -> None:
        """Hear nothing yet: entering the block begins."""
        self._number: int | None = None

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pause(self, seconds: float) -> None:
        """Sleep. Raises StopRequestedError as soon as a signal has come."""
        end = time.monotonic() + seconds
        while self._number is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        if self._number is not None:
            raise StopRequestedError(self._number)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            os._exit(128 + number)  # the shards see their standard input close, and end; the workers lose the shards
        self._number = number


@final
@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """What to run.

    Attributes:
        command: The user's script and its arguments.
        shards: Number of shard processes.
        workers: Number of worker processes.
        method: What is sent.
        seed: Keys data order and randomness.
        round_timeout: Seconds a round waits for a worker that is connected.
        lease: Seconds a round waits for a worker whose connection broke.
        linger: Seconds the shards stay up after the last worker has left, for a last scrape.
        threshold_factors: Factors on the run's λ, one for each worker; none means 1 for all.
    """

    command: tuple[str, ...]
    shards: int
    workers: int
    method: Method
    seed: int = 0
    round_timeout: float = 600.0
    lease: float = 5.0
    linger: float = 0.0
    threshold_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check before anything is started."""
        if self.shards < 1 or self.workers < 1:
            raise ConfigurationError(
                f"a run needs at least one shard and one worker, not {self.shards}, {self.workers}"
            )
        if self.threshold_factors and len(self.threshold_factors) != self.workers:
            raise ConfigurationError(
                f"{len(self.threshold_factors)} threshold factors for {self.workers} workers; give each one, in the "
                "order of their ranks"
            )
        if not self.command or not Path(self.command[0]).is_file():
            raise ConfigurationError(f"there is no script {self.command[0] if self.command else ''!r}")


@final
class Launch:
    """One run: all its processes, in one folder. Use as a context manager: at the end of the block all have ended."""

    def __init__(self, config: LaunchConfig, folder: Path, title: str, stop: StopSignals) -> None:
        """Prepare; entering the block starts the shards and the workers."""
        self._config = config
        self._folder = folder
        self._title = title
        self._stop = stop
        self._children: list[Child] = []
        self._shards: list[Child] = []
        self._workers: list[Child] = []
        self._clients: list[ShardCalls] = []
        self._statistics: list[pb.StatisticsResponse] = []
        self._passes: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        """Start everything."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begin = time.monotonic()
        try:
            addresses = self._start_shards()
            self._start_workers(addresses)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything: workers first, so that none complains of a missing shard."""
        end_all(self._workers)
        for client in self._clients:
            client.close()
        end_all(self._shards)

    def watch(self, show: Show) -> RunResult:
        """Show the run until all workers are done; save the model; return what it came to.

        Raises:
            RunFailedError: when a process failed; the others have been given time to say what they saw.
        """
        while any(worker.code is None for worker in self._workers):
            self._stop.pause(_POLL_SECONDS)
            self._poll()
            show(self._picture())
            failed = self._failed()
            if failed is not None:
                raise self._failure(failed)
        failed = self._failed()
        if failed is not None:
            raise self._failure(failed)
        seconds = time.monotonic() - self._begin
        self._poll()
        self._save()
        self._stop.pause(self._config.linger)
        return summarize(self._statistics, self._workers[0].data, seconds)

    def _start_shards(self) -> list[str]:
        for shard in range(self._config.shards):
            self._shards.append(self._child(f"shard {shard}", self._serve_command(shard), {}))
        deadline = time.monotonic() + _START_SECONDS
        for child in self._shards:
            while "address" not in child.data:
                if child.code is not None or time.monotonic() > deadline:
                    raise self._failure(child)
                self._stop.pause(_POLL_SECONDS / 5)
        addresses = [str(child.data["address"]) for child in self._shards]
        self._clients = [ShardCalls(index, address, "the launcher") for index, address in enumerate(addresses)]
        return addresses

    def _serve_command(self, shard: int) -> list[str]:
        config = self._config
        options = {
            "--shard": shard,
            "--shards": config.shards,
            "--workers": config.workers,
            "--round-timeout": config.round_timeout,
            "--lease": config.lease,
            "--iterations": self._folder / f"shard-{shard}.iterations.jsonl",
            "--metrics": "127.0.0.1:0",
        }
        flat = [str(part) for option in options.items() for part in option]
        return [sys.executable, "-m", "thresher.deploy", "serve", *flat, "--until-stdin-closes"]

    def _start_workers(self, addresses: Sequence[str]) -> None:
        factors = self._config.threshold_factors or (1.0,) * self._config.workers
        for rank, factor in enumerate(factors):
            settings = Settings(
                tuple(addresses), rank, self._config.workers, self._config.seed, self._config.method,
                connect_timeout=_START_SECONDS, metrics_listen="127.0.0.1:0", threshold_factor=factor,
            )  # fmt: skip
            command = [sys.executable, "-u", *self._config.command]
            self._workers.append(self._child(f"worker {rank}", command, settings.environment()))

    def _child(self, name: str, command: Sequence[str], variables: dict[str, str]) -> Child:
        # One thread each, as torchrun does: the processes share the cores, and results repeat bit for bit.
        # No setting of this run may come from somewhere else.
        outer = {key: value for key, value in os.environ.items() if not key.startswith("THRESHER_")}
        environment = {"OMP_NUM_THREADS": "1", **outer, "PYTHONUNBUFFERED": "1", **variables}
        return Child(name, command, environment, self._folder / f"{name.replace(' ', '-')}.log")

    def _poll(self) -> None:
        """Ask every shard how it stands; one that does not answer is seen as it was."""
        fresh: list[pb.StatisticsResponse] = []
        for client in self._clients:
            try:
                fresh.append(client.statistics(timeout=2.0))
            except ThresherError:
                return
        self._statistics = fresh
        self._write_targets()

    def _picture(self) -> Picture:
        for rank, worker in enumerate(self._workers):
            epoch = worker.data.get("epoch")
            if isinstance(epoch, int) and self._statistics and epoch != self._passes.get(rank, (None,))[0]:
                self._passes[rank] = (epoch, self._statistics[0].workers[rank].steps)
        printed = [worker.data for worker in self._workers]
        return Picture(self._title, self._statistics, printed, time.monotonic() - self._begin, self._passes)

    def _write_targets(self) -> None:
        """Tell Prometheus where the endpoints are (file_sd_configs)."""
        shards = [str(child.data["metrics"]) for child in self._shards]
        workers = [worker.metrics_address for worker in self._statistics[0].workers if worker.metrics_address]
        document = [
            {"targets": shards, "labels": {"job": "thresher-shard"}},
            {"targets": workers, "labels": {"job": "thresher-worker"}},
        ]
        text = json.dumps(document)
        path = self._folder / "targets.json"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            beside = path.with_suffix(".new")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)

    def _failed(self) -> Child | None:
        """Return a child that ended as it should not, if there is one: a shard that ended at all, or a bad worker."""
        ended_shards = [shard for shard in self._shards if shard.code is not None]
        bad_workers = [worker for worker in self._workers if worker.code not in (None, 0)]
        return next(iter(ended_shards + bad_workers), None)

    def _failure(self, failed: Child) -> RunFailedError:
        """Wait for the others to end by themselves and say what they saw; then describe what happened."""
        deadline = time.monotonic() + self._config.lease + _GOODBYE_SECONDS
        while any(worker.code is None for worker in self._workers) and time.monotonic() < deadline:
            self._stop.pause(_POLL_SECONDS / 5)
        self._poll()
        cause = self._cause() or failed
        lines = [f"{child.name}: {child.ending()} ({child.log})" for child in (*self._shards, *self._workers)]
        report = "\n  ".join(lines)
        return RunFailedError(
            f"{cause.name} failed: {cause.ending()}\n  {report}\nend of {cause.log}:\n{cause.last_lines()}"
        )

    def _cause(self) -> Child | None:
        """Return the worker that the shards saw failing first; the others end as well, but only because of it."""
        if any(shard.code is not None for shard in self._shards):
            return None  # then it was no worker
        seen = [worker for shard in self._statistics for worker in shard.workers]
        return next((self._workers[worker.rank] for worker in seen if worker.state in ("aborted", "lost")), None)

    def _save(self) -> None:
        """Leave the final model, its optimizer state and the per-iteration file in the run's folder."""
        if not all(shard.version for shard in self._statistics):
            raise RunFailedError(
                f"all workers ended well, but none made a step: does {self._config.command[0]} call connect() and "
                "wrap(), and then optimizer.step()?"
            )
        snapshots = [client.snapshot(wait_seconds=_GOODBYE_SECONDS) for client in self._clients]
        save_model(self._folder / "model.safetensors", snapshots)
        save_optimizer(self._folder / "optimizer.safetensors", snapshots)
        parts = [self._folder / f"shard-{shard}.iterations.jsonl" for shard in range(self._config.shards)]
        merge_iterations(parts, self._folder / "iterations.jsonl")


def launch(
    config: LaunchConfig, folder: Path, show: Show, stop: StopSignals, *, baseline: bool = False
) -> dict[str, RunResult]:
    """Run ``config`` in ``folder``; with ``baseline`` also the same run with everything sent, in ``folder/dense``.

    Returns:
        The results by name: ``sparse``, and ``dense`` where asked for; ``result.json`` in ``folder`` has them too.

    Raises:
        RunFailedError: when a process failed.
        StopRequestedError: when ``stop`` has heard a signal.
    """
    runs = {"sparse": (config, folder)}
    if baseline:
        everything = Method(threshold=0.0, nonfinite=config.method.nonfinite)
        runs["dense"] = (replace(config, method=everything, threshold_factors=()), folder / "dense")
    results: dict[str, RunResult] = {}
    for name, (one, where) in runs.items():
        with Launch(one, where, f"{name}: {Path(one.command[0]).name}", stop) as run:
            results[name] = run.watch(show)
        facts = {"workers": config.workers, "shards": config.shards, "seed": config.seed}
        write_results(folder / "result.json", results, **facts)  # now: the next run may fail or be stopped
    return results
