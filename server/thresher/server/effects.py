"""What a shard wants done about an event. Plain values, no I/O; the engine performs them in their order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.layout import Layout
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.sealed import SealedUpdate
from thresher.protos.update import Membership
from thresher.server.events import History, IterationRow, Verdict
from thresher.server.facts import Agreed, Record


@final
@dataclass(frozen=True, slots=True)
class Append:
    """Write this to the journal before any later effect is performed: nobody is told what could be forgotten."""

    record: Record


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Write this to the journal as a whole, copies all; with ``wait`` it is on disk before any later effect."""

    table: bytes
    tensors: Mapping[str, Tensor]
    wait: bool


@final
@dataclass(frozen=True, slots=True)
class Registered:
    """Answer to `events.Register`: where the shard is, and what became of what this rank has pushed before.

    Attributes:
        history: Where the shard is.
        seeded: It has its starting values.
        settled: One more than the last step of this rank that has its verdict.
        in_open_round: The push of step ``settled`` has come already.
        verdict: What became of the last settled push.
        membership: Who belongs to the run.
        agreements: How many agreements there have been.
        warning: For the operator.
    """

    history: History
    seeded: bool
    settled: int
    in_open_round: bool
    verdict: Verdict
    membership: Membership
    agreements: int
    warning: str = ""


@final
@dataclass(frozen=True, slots=True)
class Seeded:
    """Answer to `events.Seed` and `events.Refill`, and the sign that snapshots can be had."""

    accepted: bool


@final
@dataclass(frozen=True, slots=True)
class Backlog:
    """Answer to `events.Hello`: what the worker lacks."""

    updates: tuple[SealedUpdate, ...]


@final
@dataclass(frozen=True, slots=True)
class Judged:
    """Answer to a push that is in no round."""

    step: int
    verdict: Verdict
    reason: str = ""


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """Answer to `events.ReadState`.

    ``optimizer`` has the hyper-parameters of the last update in it, ``bookmark`` is where the members' loops are.
    """

    history: History
    tensors: Mapping[str, Tensor]
    layout: Layout
    optimizer: OptimizerSpec
    threshold: float | None
    membership: Membership
    bookmark: Bookmark | None = None


@final
@dataclass(frozen=True, slots=True)
class Left:
    """Answer to `events.Leave`."""

    version: int


@final
@dataclass(frozen=True, slots=True)
class Publish:
    """Send this update to these ranks."""

    sealed: SealedUpdate
    ranks: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Tell:
    """Tell these ranks what was agreed."""

    agreed: Agreed
    ranks: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Restart:
    """End the streams of these ranks: they have to find out anew where this shard is."""

    ranks: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class WriteRow:
    """Write this row to the per-iteration file."""

    row: IterationRow


@final
@dataclass(frozen=True, slots=True)
class Notice:
    """Tell the operator."""

    text: str


@final
@dataclass(frozen=True, slots=True)
class Failed:
    """The run cannot go on; tell everybody why."""

    reason: str


Effect = (
    Append | Checkpoint | Registered | Seeded | Backlog | Judged | Snapshot | Left | Publish | Tell | Restart | WriteRow
    | Notice | Failed
)  # fmt: skip
