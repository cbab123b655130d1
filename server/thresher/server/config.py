"""What a shard is told when it starts."""

import math
from dataclasses import dataclass
from typing import final

from thresher.protos.errors import ConfigurationError


@final
@dataclass(frozen=True, slots=True)
class ShardConfig:
    """What a shard is told when it starts. Times are in seconds.

    Attributes:
        shard: Position of this shard.
        shards: Number of shards.
        workers: Number of workers the run starts with.
        run: Random number that names the run.
        start_timeout: How long the first round waits for workers that have not come.
        round_timeout: How long a round waits for a member that is connected.
        lease: How long a round waits for a member whose connection broke; then the others go on without it.
        log_cap_bytes: Memory for updates that members have not read.
        checkpoint_every: Versions between two checkpoints; 0 writes none but the first.
    """

    shard: int
    shards: int
    workers: int
    run: int = 0
    start_timeout: float = 300.0
    round_timeout: float = 1800.0
    lease: float = 60.0
    log_cap_bytes: int = 256 << 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before anything is served. Raises ConfigurationError."""
        if not 0 <= self.shard < self.shards or self.workers < 1:
            raise ConfigurationError(f"shard {self.shard} of {self.shards} for {self.workers} workers makes no sense")
        for name in ("start_timeout", "round_timeout", "lease", "checkpoint_every", "log_cap_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{name} must be finite and not negative, not {value}")
