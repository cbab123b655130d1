"""A shard's counters as frozen values: all that metrics, displays and tests may know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from thresher.server.events import IterationRow


@final
@dataclass(frozen=True, slots=True)
class MemberStatistics:
    """One worker, as its shard sees it now.

    ``waits`` is how many of its pushes have been in a round that was closed since this process began, ``wait_seconds``
    how long those lay here until then; ``counts`` says that it belongs to the run.
    """

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
    wait_seconds: float = 0.0
    waits: int = 0
    counts: bool = True


@final
@dataclass(frozen=True, slots=True)
class ShardStatistics:
    """A shard now: all that metrics, displays and tests may know.

    ``last_row`` is of the last round of gradients: one for a mean only has no residuals and no densities. None before
    there is one, and where a restart finds such a round to be the newest.
    """

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
