"""A worker's counters as a frozen value: all that metrics, displays and tests may know."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """One worker now. Bytes are those of exchange messages; times are in seconds and cover all steps.

    Attributes:
        rank: The worker's rank.
        steps: Steps made.
        skipped: Steps without a contribution.
        numel: Elements of the model.
        push_bytes: Bytes sent, per shard.
        pull_bytes: Bytes received, per shard.
        resent_bytes: Bytes said again after connections broke, per shard; not in push_bytes a second time.
        setup_bytes: Bytes of seeds and snapshots, all shards together.
        pushed_elements: Elements sent.
        density: Density of the last push.
        residual_norm: Norm of what is kept.
        threshold: In force for the next step; None for methods without one.
        timed_steps: Steps that the seconds below are of: those this process made with the shards.
        compute_seconds: Between exchanges: the script's own work.
        compress_seconds: Gather, check, correct, select, frame, keep.
        exchange_seconds: Send, wait for updates, replay them, copy parameters.
    """

    rank: int
    steps: int = 0
    skipped: int = 0
    numel: int = 0
    push_bytes: tuple[int, ...] = ()
    pull_bytes: tuple[int, ...] = ()
    resent_bytes: tuple[int, ...] = ()
    setup_bytes: int = 0
    pushed_elements: int = 0
    density: float = 0.0
    residual_norm: float = 0.0
    threshold: float | None = None
    timed_steps: int = 0
    compute_seconds: float = 0.0
    compress_seconds: float = 0.0
    exchange_seconds: float = 0.0
