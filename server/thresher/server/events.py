"""What can happen to a shard (events), and what it wants done about it (effects). Plain values, no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import final

from torch import Tensor

from thresher.protos.layout import Layout
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Presence, Update


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """One life of a worker: everything it says carries this."""

    rank: int
    incarnation: int


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
class Hello:
    """A worker opens its exchange stream; its replica is at ``version``."""

    worker: Worker
    version: int


@final
@dataclass(frozen=True, slots=True)
class Push:
    """A worker's contribution to a round; ``gradient`` is None when the worker skips the step.

    ``content`` identifies what was sent: equal for a repetition, different for anything else.
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
    wire_bytes: int = 0
    content: int = 0


@final
@dataclass(frozen=True, slots=True)
class Leave:
    """A worker takes no part from ``step`` on. ``untrained`` are the model's buffers (rank 0, shard 0 only).

    ``push_bytes`` and ``pull_bytes`` are the worker's own count of the exchange, to be held against the shard's.
    """

    worker: Worker
    step: int
    push_bytes: int
    pull_bytes: int
    untrained: Mapping[str, Tensor] = field(default_factory=dict)


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
class Published:
    """The update that creates ``version`` is on its way to all connected workers, ``wire_bytes`` to each."""

    version: int
    wire_bytes: int


@final
@dataclass(frozen=True, slots=True)
class ReadState:
    """Somebody wants the shard's state."""


@final
@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Register | Seed | Hello | Push | Leave | Abort | Disconnect | Published | ReadState | Tick


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

    ``push_density`` is pushed elements over members times slice; ``residual_squared`` the mean over contributors of
    the squared norm of what they keep on this slice; ``threshold`` the one the round was computed with. In an
    ``only_mean`` round nothing was compressed and the model stayed as it is: it is no part of densities.
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


@final
@dataclass(frozen=True, slots=True)
class Registered:
    """Answer to `Register`."""

    run: int
    version: int
    seeded: bool
    warning: str = ""


@final
@dataclass(frozen=True, slots=True)
class Seeded:
    """Answer to `Seed`, and the sign that snapshots can be had. ``accepted`` is False for a second seed."""

    accepted: bool


@final
@dataclass(frozen=True, slots=True)
class Backlog:
    """Answer to `Hello`: the updates that the worker's replica lacks."""

    updates: tuple[Update, ...]


@final
@dataclass(frozen=True, slots=True)
class Judged:
    """Answer to a `Push` that is not (yet) in an update."""

    step: int
    verdict: Verdict
    reason: str = ""


@final
@dataclass(frozen=True, slots=True)
class State:
    """Answer to `ReadState`. ``optimizer`` has the hyper-parameters of the last update in it."""

    version: int
    tensors: Mapping[str, Tensor]
    untrained: Mapping[str, Tensor]
    layout: Layout
    optimizer: OptimizerSpec


@final
@dataclass(frozen=True, slots=True)
class Left:
    """Answer to `Leave`."""

    version: int


@final
@dataclass(frozen=True, slots=True)
class Publish:
    """Send this update to every connected worker."""

    update: Update


@final
@dataclass(frozen=True, slots=True)
class Record:
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


Effect = Registered | Seeded | Backlog | Judged | State | Left | Publish | Record | Notice | Failed
