"""What the tests of the shard say to it, and a journal that remembers what it asked to be written."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from thresher.protos.consistency import Consistency
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.sparse import SparseGradient
from thresher.server import effects, events
from thresher.server.config import ShardConfig
from thresher.server.effects import Effect
from thresher.server.events import Event, History, Worker
from thresher.server.facts import record_from_bytes, record_to_bytes
from thresher.server.shard import Shard
from thresher.server.state import RunState

LAYOUT = Layout((TensorSpec("w", (3,), "float32"), TensorSpec("b", (1,), "float32")))
SGD = OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.5},))
NUMEL = 4
CONFIG = ShardConfig(shard=0, shards=1, workers=2, run=7, start_timeout=100.0, round_timeout=30.0, lease=5.0)
QUORUM = Consistency(quorum=2, grace=1.0)
SSP = Consistency("ssp", staleness=1)
ASYNC = Consistency("async")

PAIR = [1.0, 1.0]
"""A push for one of two shards."""

NOWHERE = History()
LOCKSTEP = Consistency()

Kind = TypeVar("Kind")


def register(rank: int, incarnation: int = 1, workers: int = 2, **changes: Any) -> events.Register:
    request = events.Register(Worker(rank, incarnation), workers, 0, 1, LAYOUT, SGD, "Identity", origin=f"host:{rank}")
    return replace(request, **changes)


def seed(rank: int = 0, values: float = 0.0, numel: int = NUMEL) -> events.Seed:
    return events.Seed(Worker(rank, 1), {PARAMETERS: torch.full((numel,), values)}, {"bn.mean": torch.ones(2)})


def push(
    rank: int, step: int, gradient: SparseGradient | Sequence[float] | float | None = 1.0, **changes: Any
) -> events.Push:
    """A push of the first life of a worker, computed at version ``step``. Other numbers give it another content."""
    if isinstance(gradient, int | float):
        gradient = [float(gradient)] * NUMEL
    content = hash((rank, step, tuple(gradient) if isinstance(gradient, Sequence) else None)) & 0xFFFF | 1
    if isinstance(gradient, Sequence):
        gradient = SparseGradient.dense(torch.tensor(gradient, dtype=torch.float32))
    made = events.Push(Worker(rank, 1), step, step, gradient, (True, True), wire_bytes=100, content=content)
    return replace(made, **changes)


def hello(rank: int, history: History = NOWHERE, incarnation: int = 1) -> events.Hello:
    return events.Hello(Worker(rank, incarnation), history)


def leave(rank: int, **changes: Any) -> events.Leave:
    return replace(events.Leave(Worker(rank, 1)), **changes)


def say(shard: Shard, event: Event, now: float = 0.0) -> list[Effect]:
    """Hand over an event; what must hold afterwards is checked each time."""
    done = shard.handle(event, now)
    shard.validate()
    return done


def of(kind: type[Kind], done: list[Effect]) -> list[Kind]:
    return [effect for effect in done if isinstance(effect, kind)]


def only(kind: type[Kind], done: list[Effect]) -> Kind:
    (found,) = of(kind, done)
    return found


def training(workers: int = 2, consistency: Consistency = LOCKSTEP, seeded: float = 0.0, **config: Any) -> Shard:
    """A shard on which every worker has registered and opened its stream."""
    shard = Shard(replace(CONFIG, workers=workers, **config))
    begin(shard, workers, consistency, seeded)
    return shard


def begin(shard: Shard, workers: int, consistency: Consistency, seeded: float = 0.0) -> list[Effect]:
    """Let all workers come and say hello, and rank 0 seed."""
    shard_of = {"shard": shard.statistics().shard, "shards": shard.statistics().shards}
    done: list[Effect] = []
    for rank in range(workers):
        done += say(shard, register(rank, workers=workers, consistency=consistency, **shard_of))
    done += say(shard, seed(values=seeded))
    for rank in range(workers):
        done += say(shard, hello(rank))
    return done


def part_of_two(shard: int, workers: int, consistency: Consistency = LOCKSTEP) -> Shard:
    """One of two shards, on which every worker exchanges."""
    one = Shard(replace(CONFIG, shard=shard, shards=2, workers=workers))
    for rank in range(workers):
        say(one, register(rank, workers=workers, shard=shard, shards=2, consistency=consistency))
    say(one, seed(numel=2))
    for rank in range(workers):
        say(one, hello(rank))
    return one


def close_round(shard: Shard, ranks: Sequence[int], step: int, value: float = 1.0, now: float = 0.0) -> list[Effect]:
    """Let these ranks push the same step; what the last push led to."""
    done: list[Effect] = []
    for rank in ranks:
        done = say(shard, push(rank, step, value), now)
    return done


def snapshot_of(shard: Shard) -> effects.Snapshot:
    return only(effects.Snapshot, shard.handle(events.ReadState(), 0.0))


def history_of(shard: Shard) -> History:
    return snapshot_of(shard).history


def parameters(shard: Shard) -> list[float]:
    found: list[float] = snapshot_of(shard).tensors[PARAMETERS].tolist()
    return found


def lasting(state: RunState) -> tuple[bytes, dict[str, bytes]]:
    """Everything that a shard must never forget, as bytes."""
    return state.table(), {name: value.numpy().tobytes() for name, value in sorted(state.tensors().items())}


def picture(shard: Shard) -> object:
    """Everything that decides what a shard does next; not how often it has refused something."""
    open_pushes = {rank: (one.step, one.content) for rank, one in shard._round.waiting.items()}
    seen = [(m.state, m.incarnation, m.lost_at, m.version, m.told) for m in shard._state.members]
    return lasting(shard._state), open_pushes, seen, dict(shard._agreement._said), shard.statistics().failure


@dataclass
class Journaled:
    """A shard, with what it asked to be written kept in memory as the journal keeps it on disk: in bytes.

    Attributes:
        checkpoints: Each with how many records came before it.
    """

    config: ShardConfig
    records: list[bytes] = field(default_factory=list)
    checkpoints: list[tuple[int, effects.Checkpoint]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shard = Shard(self.config)

    def say(self, event: Event, now: float = 0.0) -> list[Effect]:
        done = say(self.shard, event, now)
        self.keep(done)
        return done

    def keep(self, done: list[Effect]) -> None:
        for effect in done:
            if isinstance(effect, effects.Append):
                self.records.append(record_to_bytes(effect.record))
            elif isinstance(effect, effects.Checkpoint):
                self.checkpoints.append((len(self.records), effect))

    def replayed(self, checkpoint: int = -1) -> RunState:
        """Return what the journal says, from one of its checkpoints on; from the beginning while there is none."""
        state, position = RunState(self.config.run, self.config.workers), 0
        if self.checkpoints:
            position, kept = self.checkpoints[checkpoint]
            state = RunState.restored(kept.table, copy.deepcopy(dict(kept.tensors)))
        for data in self.records[position:]:
            self.fold(state, data)
        return state

    def fold(self, state: RunState, data: bytes) -> None:
        """Let a state take one record as it was written."""
        state.fold(record_from_bytes(data, state.piece))

    def crash(self, checkpoint: int = -1) -> None:
        """Forget the shard, and build another from what was written."""
        self.shard = Shard(self.config, self.replayed(checkpoint) if self.records else None)
        self.shard.validate()

    def check_replay(self) -> None:
        """Law 8: each checkpoint and the records after it are the live state, bit for bit."""
        live = lasting(self.shard._state)
        for number in range(max(1, len(self.checkpoints))):
            assert lasting(self.replayed(number)) == live
