"""A shard's counters as frozen values: all that metrics, displays and tests may know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from thresher.server.events import IterationRow


@final
@dataclass(frozen=True, slots=True)
class MemberStatistics:
    """One worker, as its shard sees it now; ``counts`` says that it belongs to the run."""

    rank: int
    state: str
    steps: int
    push_bytes: int
    pull_bytes: int
    pushed_elements: int
    pushable_elements: int
    density: float
    origin: str
    metrics_address: str
    counts: bool = True


@final
@dataclass(frozen=True, slots=True)
class ShardStatistics:
    """A shard now: all that metrics, displays and tests may know."""

    shard: int
    shards: int
    state: str
    failure: str
    version: int
    numel: int
    model_numel: int
    members: tuple[MemberStatistics, ...]
    verdicts: Mapping[str, int]
    residual_squared_total: float
    lost_squared_total: float
    log_bytes: int
    threshold: float | None
    last_row: IterationRow | None
