"""What a run on a Ray cluster is: checked as a whole before anything is placed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final, get_args

from thresher.deploy.launch_config import Durability
from thresher.protos.consistency import Consistency
from thresher.protos.credentials import TlsFiles, check_named
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import (
    LEASE_SECONDS,
    RESTART_SECONDS,
    ROUND_SECONDS,
    START_SECONDS,
    patience_with_shards,
)
from thresher.protos.transport import any_port
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig
from thresher.worker import Method, Settings
from thresher.worker.directory import check_run

_EVERYTHING: Final = Method(threshold=0.0)
_SYNC: Final = Consistency()
_LOOPBACK: Final = "127.0.0.1"


@final
@dataclass(frozen=True, slots=True)
class TlsPaths:
    """Where the PEM files of one end of TLS lie on its node: `TlsFiles` once they are read there, and not before.

    Who starts a run need not have them, and had better not: a private key belongs where it is shown.

    Attributes:
        ca: Certificates of the authorities that the other end's certificate must come from.
        certificate: This end's certificate.
        key: Its private key.

    Raises:
        ConfigurationError: when there is a certificate without key or the reverse, or nothing at all.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be seen without the files."""
        check_named(self.ca, self.certificate, self.key)

    def read(self) -> TlsFiles:
        """Return the files as they are on this node. Raises ConfigurationError when they cannot be used."""
        return TlsFiles(self.ca, self.certificate, self.key)


@final
@dataclass(frozen=True, slots=True)
class RayConfig:
    """What to run. Paths are those of the nodes, and the same on all of them; none is read before it is used there.

    Attributes:
        name: Of the run, by which workers find it: letters, digits, ``-_.``.
        shards: Number of shards.
        workers: Number of workers the run starts with; 0 for as many as the first of them says, which Ray Train knows.
            Others may join and leave.
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
    workers: int = 0
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
    tls: TlsPaths | None = None
    tokens: Path | None = None
    worker_tls: TlsPaths | None = None
    worker_token_file: Path | None = None

    def __post_init__(self) -> None:
        """Check before a cluster is asked for anything."""
        check_run(self.name)
        if self.shards < 1 or self.workers < 0:
            raise ConfigurationError(
                f"a run needs at least one shard and no negative number of workers, not {self.shards}, {self.workers}"
            )
        if not (math.isfinite(self.cpus) and self.cpus > 0):
            raise ConfigurationError(f"the CPUs of a shard must be a finite number > 0, not {self.cpus}")
        if self.checkpoints < 1:
            raise ConfigurationError(f"at least 1 checkpoint is kept, not {self.checkpoints}")
        if 0 < self.workers < self.consistency.quorum:
            raise ConfigurationError(f"a quorum of {self.consistency.quorum} is more than {self.workers} workers")
        self._check_durability()
        self._check_paths()
        self._check_tls()
        self._shard(0)  # the two check the rest
        self._settings()

    def server(self, shard: int, host: str) -> ServerConfig:
        """Return what one shard is told that serves on ``host``, which this is.

        Raises:
            ConfigurationError: when its certificate cannot be read here.
        """
        return ServerConfig(
            self._shard(shard),
            listen=any_port(host),
            metrics_listen=any_port(host),
            state_dir=None if self.state_dir is None else self.state_dir / f"shard-{shard}",
            sync=self.durability == "disk",
            checkpoints=self.checkpoints,
            insecure=self.insecure,
            tls=None if self.tls is None else self.tls.read(),
            tokens=self.tokens,
        )

    def variables(self) -> dict[str, str]:
        """Return what every worker is told, as ``THRESHER_*`` variables: all but its rank, and ``workers`` if 0."""
        told = self._settings().environment()
        del told["THRESHER_RANK"]
        if not self.workers:
            del told["THRESHER_WORKERS"]
        tls = self.worker_tls
        paths = {
            "THRESHER_TLS_CA": tls and tls.ca,
            "THRESHER_TLS_CERT": tls and tls.certificate,
            "THRESHER_TLS_KEY": tls and tls.key,
            "THRESHER_TOKEN_FILE": self.worker_token_file,
        }
        return told | {name: str(path) for name, path in paths.items() if path is not None}

    def _shard(self, shard: int) -> ShardConfig:
        return ShardConfig(
            shard,
            self.shards,
            self.workers,
            start_timeout=self.start_timeout,
            round_timeout=self.round_timeout,
            lease=self.lease,
            checkpoint_every=self.checkpoint_every,
        )

    def _settings(self) -> Settings:
        shared = None if self.state_dir is None else self.state_dir / "workers"
        return Settings(
            tuple(f"ray://{self.name}/{shard}" for shard in range(self.shards)),
            rank=0,
            workers=self.workers or 1,
            seed=self.seed,
            method=self.method,
            consistency=self.consistency,
            state_dir=self.worker_state_dir or shared,
            state_sync=self.durability == "disk",
            state_is_local=self.worker_state_dir is not None,
            reconnect_timeout=patience_with_shards(self.lease, RESTART_SECONDS),
            insecure=self.insecure,
        )

    def _check_durability(self) -> None:
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

    def _check_paths(self) -> None:
        shown = [path for tls in (self.tls, self.worker_tls) if tls for path in (tls.ca, tls.certificate, tls.key)]
        for path in (self.state_dir, self.worker_state_dir, self.tokens, self.worker_token_file, *shown):
            if path is not None and not path.is_absolute():
                raise ConfigurationError(f"{path} may be another one on each node; write the whole path, from / on")

    def _check_tls(self) -> None:
        """Check what shards and workers would refuse on their nodes."""
        if self.tls is not None and self.tls.certificate is None:
            raise ConfigurationError("a shard that speaks TLS shows a certificate; name --tls-cert and --tls-key")
        if self.tls is not None and self.tls.ca is None and self.tokens is None:
            raise ConfigurationError(
                "the traffic would be encrypted, but anybody could call; name the authority of the workers' "
                "certificates (--tls-ca), a file of tokens (--tokens), or both"
            )
        if self.worker_tls is not None and self.worker_tls.ca is None:
            raise ConfigurationError("workers trust shards by who has signed their certificates; name --worker-tls-ca")
