"""What can happen to a shard. Plain values, no I/O; what it wants done about it is in `effects`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import final

from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.consistency import Consistency
from thresher.protos.layout import Layout
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Presence


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """One life of a worker: everything it says carries this."""

    rank: int
    incarnation: int


@final
@dataclass(frozen=True, slots=True)
class History:
    """A place in the history of one shard: the run, how many updates, and their chained digest (empty: not known)."""

    run: int = 0
    version: int = 0
    digest: bytes = b""


@final
@dataclass(frozen=True, slots=True)
class Register:
    """A worker asks to take part. ``origin`` and ``metrics_address`` are for people and for Prometheus."""

    worker: Worker
    workers: int
    shard: int
    shards: int
    layout: Layout
    optimizer: OptimizerSpec
    method: str
    consistency: Consistency = Consistency()  # noqa: RUF009 - it is frozen
    origin: str = ""
    metrics_address: str = ""
    environment: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Seed:
    """Rank 0 gives the starting values: what `Replica` takes, and untrained tensors by name (shard 0 only)."""

    worker: Worker
    state: Mapping[str, Tensor]
    untrained: Mapping[str, Tensor]


@final
@dataclass(frozen=True, slots=True)
class Refill:
    """A worker's replica, for a shard that has lost what the worker was told.

    ``state`` is what `Replica` takes, ``bookmark`` where the members' loops are (shard 0 only).
    """

    worker: Worker
    history: History
    state: Mapping[str, Tensor]
    untrained: Mapping[str, Tensor]
    overrides: tuple[Override, ...]
    threshold: float | None
    membership: Membership
    bookmark: Bookmark | None = None


@final
@dataclass(frozen=True, slots=True)
class Hello:
    """A worker opens its exchange stream; ``history`` is the last it was told."""

    worker: Worker
    history: History


@final
@dataclass(frozen=True, slots=True)
class Push:
    """A worker's contribution to a round; ``gradient`` is None when the worker skips the step.

    ``content`` identifies what was sent: equal for a repetition, different for anything else. ``membership`` is what
    the first shard told the worker. ``lost`` says that the worker has lost its state, and that this is a stand-in.
    ``bookmark`` is where the worker's loop is after this step. ``follows`` says that its hyper-parameters are those of
    the others, whatever it says: it goes on without the state of its schedule. ``forgot`` says that it has begun anew,
    and that what its earlier life kept back is gone.
    """

    worker: Worker
    step: int
    version: int
    gradient: SparseGradient | None
    presence: Presence
    overrides: tuple[Override, ...] = ()
    residual_squared: float = 0.0
    next_threshold: float | None = None
    only_mean: bool = False
    membership: Membership | None = None
    lost: bool = False
    wire_bytes: int = 0
    content: int = 0
    bookmark: Bookmark | None = None
    follows: bool = False
    forgot: bool = False


@final
@dataclass(frozen=True, slots=True)
class Leave:
    """A worker takes no part any more. ``untrained`` are the model's buffers (rank 0, shard 0 only).

    ``push_bytes`` and ``pull_bytes`` are the worker's own count of the exchange, to be held against the shard's;
    ``counted`` says that they cover all of it: the worker has neither reconnected nor been restarted.
    """

    worker: Worker
    push_bytes: int = 0
    pull_bytes: int = 0
    counted: bool = False
    abandoned_squared: float = 0.0
    untrained: Mapping[str, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Agree:
    """A worker wants to agree on numbers: its agreement number ``number``, counted from 0."""

    worker: Worker
    number: int
    values: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class Abort:
    """A worker cannot go on."""

    worker: Worker
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Disconnect:
    """A worker's stream broke without a leave."""

    worker: Worker


@final
@dataclass(frozen=True, slots=True)
class ReadState:
    """Somebody wants the shard's state."""


@final
@dataclass(frozen=True, slots=True)
class Drain:
    """The shard is about to end: what it knows is to be on disk."""


@final
@dataclass(frozen=True, slots=True)
class Fail:
    """What the shard needs around it is gone: the run cannot go on."""

    reason: str


@final
@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Register | Seed | Refill | Hello | Push | Agree | Leave | Abort | Disconnect | ReadState | Drain | Fail
    | Tick
)  # fmt: skip


class Verdict(StrEnum):
    """What became of a push."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    RETURNED = "returned"
    REJECTED = "rejected"


@final
@dataclass(frozen=True, slots=True)
class IterationRow:
    """The truth about one round on one shard: a line of the per-iteration file. Sums are over the contributors.

    ``push_density`` is pushed elements over pushes times slice; ``residual_squared`` the mean over contributors of
    the squared norm of what they keep on this slice; ``threshold`` the one the round was computed with; ``staleness``
    the largest of any push, in versions. In an
    ``only_mean`` round nothing was compressed and the model stayed as it is: it is no part of densities.
    ``barrier_seconds`` is for each contributor how long its push lay here, whole, until the round was closed; None
    where the row was read back from the journal, which keeps no such times.
    """

    shard: int
    numel: int
    version: int
    members: int
    contributors: tuple[int, ...]
    skipped: bool
    only_mean: bool
    push_bytes: int
    pull_bytes: int
    pushed_elements: int
    push_density: float
    update_elements: int
    update_density: float
    residual_squared: float
    threshold: float | None
    learning_rate: float | None
    round_seconds: float
    staleness: int = 0
    barrier_seconds: tuple[float, ...] | None = None
