"""What a shard is told when it starts."""

from dataclasses import dataclass
from typing import final

from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import LEASE_SECONDS, ROUND_SECONDS, START_SECONDS, check_timeouts, latest_answer


@final
@dataclass(frozen=True, slots=True)
class ShardConfig:
    """What a shard is told when it starts. Times are in seconds.

    Attributes:
        shard: Position of this shard.
        shards: Number of shards.
        workers: Number of workers the run starts with; 0 for as many as the first of them says.
        run: Random number that names the run.
        start_timeout: How long the first round waits for workers that have not come.
        round_timeout: How long a round or an agreement waits for a member that is connected.
        lease: How long a round waits for a member whose connection broke; then the others go on without it.
        log_cap_bytes: Memory for updates that members have not read.
        checkpoint_every: Versions between two checkpoints; 0 writes none but the first.
    """

    shard: int
    shards: int
    workers: int
    run: int = 0
    start_timeout: float = START_SECONDS
    round_timeout: float = ROUND_SECONDS
    lease: float = LEASE_SECONDS
    log_cap_bytes: int = 256 << 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before anything is served. Raises ConfigurationError."""
        if not 0 <= self.shard < self.shards or self.workers < 0:
            raise ConfigurationError(f"shard {self.shard} of {self.shards} for {self.workers} workers makes no sense")
        for name in ("checkpoint_every", "log_cap_bytes"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} must not be negative, not {getattr(self, name)}")
        check_timeouts(start_timeout=self.start_timeout, round_timeout=self.round_timeout, lease=self.lease)

    @property
    def answer_timeout(self) -> float:
        """How long a worker waits for an answer at the latest, if it is only why the run has failed."""
        return latest_answer(start_timeout=self.start_timeout, round_timeout=self.round_timeout, lease=self.lease)
