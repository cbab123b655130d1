"""What a run is: all that `thresher launch` was told, as one value that the run's folder keeps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, final, get_args

from thresher.deploy.whole_files import write_whole
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import (
    LEASE_SECONDS,
    RESTART_SECONDS,
    ROUND_SECONDS,
    check_timeouts,
    longest_pause,
    patience_with_shards,
)
from thresher.worker import Settings
from thresher.worker.method import Method

Durability = Literal["none", "process", "disk"]
"""What survives: nothing; the death of any process (written before anybody is told); that of the machine (synced)."""

_SYNC: Final = Consistency()


@final
@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """What to run.

    Attributes:
        command: The user's script and its arguments.
        shards: Number of shard processes.
        workers: Number of worker processes.
        method: What is sent.
        consistency: When rounds close.
        directory: Where the script is started, and where relative paths in ``command`` begin.
        seed: Keys data order and randomness.
        round_timeout: Seconds a round waits for a worker that is connected.
        lease: Seconds a round waits for a worker whose connection broke.
        linger: Seconds the shards stay up after the last worker has left, for a last scrape.
        threshold_factors: Factors on the run's λ, one for each worker; none means 1 for all.
        durability: What shards and workers keep on disk.
        restarts: How often each process that was killed is started again.
        restart_delay: Seconds before the first restart of a process; doubled for each further one, up to
            `longest_pause`.
        baseline: Run once more with everything sent.

    Raises:
        ConfigurationError: for a number out of range, a script that is not there, or settings that contradict others.
    """

    command: tuple[str, ...]
    shards: int
    workers: int
    method: Method
    consistency: Consistency = _SYNC
    directory: str = "."
    seed: int = 0
    round_timeout: float = ROUND_SECONDS
    lease: float = LEASE_SECONDS
    linger: float = 0.0
    threshold_factors: tuple[float, ...] = ()
    durability: Durability = "process"
    restarts: int = 3
    restart_delay: float = RESTART_SECONDS
    baseline: bool = False

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
        if self.durability not in get_args(Durability):
            raise ConfigurationError(f"durability is one of {', '.join(get_args(Durability))}, not {self.durability!r}")
        if self.restarts < 0:
            raise ConfigurationError(f"restarts must not be negative, not {self.restarts}")
        check_timeouts(
            round_timeout=self.round_timeout,
            lease=self.lease,
            restart_delay=self.restart_delay,
            grace=self.consistency.grace,
            linger=self.linger,
        )
        if self.consistency.quorum > self.workers:
            raise ConfigurationError(f"a quorum of {self.consistency.quorum} is more than {self.workers} workers")
        if not self.command or not Path(self.directory, self.command[0]).is_file():
            raise ConfigurationError(f"there is no script {self.command[0] if self.command else ''!r}")
        self.settings(("no shard yet",), 0, None)  # it checks the rest

    @property
    def longest_pause(self) -> float:
        """Seconds before a restart, at most."""
        return longest_pause(self.lease, self.restart_delay)

    def settings(self, addresses: Sequence[str], rank: int, state_dir: Path | None) -> Settings:
        """Return what one worker is told."""
        return Settings(
            tuple(addresses),
            rank,
            self.workers,
            self.seed,
            self.method,
            self.consistency,
            state_dir,
            state_sync=self.durability == "disk",
            reconnect_timeout=patience_with_shards(self.lease, self.restart_delay),
            threshold_factor=self.threshold_factors[rank] if self.threshold_factors else 1.0,
            metrics_listen="127.0.0.1:0",
        )

    def stages(self, folder: Path) -> dict[str, tuple[Self, Path]]:
        """Return what is to be run one after the other, and where: by name, as in ``result.json``."""
        runs: dict[str, tuple[Self, Path]] = {"sparse": (self, folder)}
        if self.baseline:
            everything = Method(threshold=0.0, nonfinite=self.method.nonfinite)
            runs["dense"] = (replace(self, method=everything, threshold_factors=()), folder / "dense")
        return runs

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ConfigurationError: when there is none, it cannot be read, or what it says is no longer possible.
        """
        try:
            said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            method, consistency = Method(**said.pop("method")), Consistency(**said.pop("consistency"))
            command, factors = tuple(said.pop("command")), tuple(said.pop("threshold_factors"))
            return cls(command, method=method, consistency=consistency, threshold_factors=factors, **said)
        except FileNotFoundError:
            raise ConfigurationError(
                f"{path.parent} is no folder of a run: it has no {path.name}; name one that thresher launch has made"
            ) from None
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}; restore it, or begin another run") from None
