"""What a run on a Ray cluster is: checked as a whole before anything is placed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final, get_args

from thresher.deploy.launch_config import Durability
from thresher.protos.consistency import Consistency
from thresher.protos.credentials import Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import (
    LEASE_SECONDS,
    RESTART_SECONDS,
    ROUND_SECONDS,
    START_SECONDS,
    patience_with_shards,
)
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig
from thresher.worker import Method, Settings
from thresher.worker.directory import check_run

_EVERYTHING: Final = Method(threshold=0.0)
_SYNC: Final = Consistency()
_OF_ONE_WORKER: Final = ("THRESHER_RANK",)
_LOOPBACK: Final = "127.0.0.1"


@final
@dataclass(frozen=True, slots=True)
class RayConfig:
    """What to run. Paths are those of the nodes, and the same on all of them.

    Attributes:
        name: Of the run, by which workers find it: letters, digits, ``-_.``.
        shards: Number of shards.
        workers: Number of workers the run starts with; others may join and leave.
        method: What is sent.
        consistency: When rounds close.
        seed: Keys data order and randomness.
        durability: What shards and workers keep on disk.
        state_dir: Folder that all nodes share, in which shards and workers keep what must survive them.
        worker_state_dir: Folder for the workers' share of it, local to each node: faster, and lost with its node. None
            puts it into ``state_dir``.
        cpus: CPUs that are reserved for each shard.
        strict_spread: Each shard has a node of its own, or the run does not start.
        start_timeout: Seconds the first round waits for workers that have not come.
        round_timeout: Seconds a round waits for a worker that is connected.
        lease: Seconds a round waits for a worker whose connection broke.
        checkpoint_every: Rounds between two checkpoints of a shard; 0 writes none but the first and the last.
        checkpoints: Checkpoints that are kept.
        insecure: Plain text between the nodes is fine.
        tls: The shards' certificate with its key, and who signs the callers'. None is plain text.
        tokens: File of the tokens that callers may show to a shard.
        worker_tls: What workers show and trust.
        worker_token_file: File of the token that workers show.

    Raises:
        ConfigurationError: for a number out of range, a name that is none, or settings that contradict others.
    """

    name: str
    shards: int = 1
    workers: int = 1
    method: Method = _EVERYTHING
    consistency: Consistency = _SYNC
    seed: int = 0
    durability: Durability = "process"
    state_dir: Path | None = None
    worker_state_dir: Path | None = None
    cpus: float = 1.0
    strict_spread: bool = False
    start_timeout: float = START_SECONDS
    round_timeout: float = ROUND_SECONDS
    lease: float = LEASE_SECONDS
    checkpoint_every: int = 500
    checkpoints: int = 3
    insecure: bool = False
    tls: TlsFiles | None = None
    tokens: Path | None = None
    worker_tls: TlsFiles | None = None
    worker_token_file: Path | None = None

    def __post_init__(self) -> None:
        """Check before a cluster is asked for anything."""
        check_run(self.name)
        if self.shards < 1 or self.workers < 1:
            raise ConfigurationError(
                f"a run needs at least one shard and one worker, not {self.shards}, {self.workers}"
            )
        if not (math.isfinite(self.cpus) and self.cpus > 0):
            raise ConfigurationError(f"the CPUs of a shard must be a finite number > 0, not {self.cpus}")
        if self.checkpoints < 1:
            raise ConfigurationError(f"at least 1 checkpoint is kept, not {self.checkpoints}")
        if self.consistency.quorum > self.workers:
            raise ConfigurationError(f"a quorum of {self.consistency.quorum} is more than {self.workers} workers")
        self._check_folders()
        self.server(0, _LOOPBACK)  # the two check the rest
        self._settings()

    def server(self, shard: int, host: str) -> ServerConfig:
        """Return what one shard is told that serves on ``host``, at ports that are free there."""
        host = f"[{host}]" if ":" in host else host
        told = ShardConfig(
            shard,
            self.shards,
            self.workers,
            start_timeout=self.start_timeout,
            round_timeout=self.round_timeout,
            lease=self.lease,
            checkpoint_every=self.checkpoint_every,
        )
        return ServerConfig(
            told,
            listen=f"{host}:0",
            metrics_listen=f"{host}:0",
            state_dir=None if self.state_dir is None else self.state_dir / f"shard-{shard}",
            sync=self.durability == "disk",
            checkpoints=self.checkpoints,
            insecure=self.insecure,
            tls=self.tls,
            tokens=self.tokens,
        )

    def variables(self) -> dict[str, str]:
        """Return what every worker is told, as ``THRESHER_*`` variables: all but its rank."""
        told = self._settings().environment()
        return {name: value for name, value in told.items() if name not in _OF_ONE_WORKER}

    def _settings(self) -> Settings:
        shared = None if self.state_dir is None else self.state_dir / "workers"
        return Settings(
            tuple(f"ray://{self.name}/{shard}" for shard in range(self.shards)),
            rank=0,
            workers=self.workers,
            seed=self.seed,
            method=self.method,
            consistency=self.consistency,
            state_dir=self.worker_state_dir or shared,
            state_sync=self.durability == "disk",
            state_is_local=self.worker_state_dir is not None,
            reconnect_timeout=patience_with_shards(self.lease, RESTART_SECONDS),
            insecure=self.insecure,
            credentials=Credentials(self.worker_tls, self.worker_token_file),
        )

    def _check_folders(self) -> None:
        if self.durability not in get_args(Durability):
            raise ConfigurationError(f"durability is one of {', '.join(get_args(Durability))}, not {self.durability!r}")
        folders = [folder for folder in (self.state_dir, self.worker_state_dir) if folder is not None]
        if self.durability == "none" and folders:
            raise ConfigurationError(f"durability none keeps nothing in {folders[0]}; leave one of them out")
        if self.durability != "none" and self.state_dir is None:
            raise ConfigurationError(
                f"durability {self.durability} needs a folder that all nodes share: name --state-dir; or keep nothing, "
                "with --durability none"
            )
        for folder in folders:
            if not folder.is_absolute():
                raise ConfigurationError(
                    f"{folder} may be another folder on each node; write the whole path, from / on"
                )
