"""A shard of one worker on an engine, and what its subscriber hears."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, final

import torch

from thresher.protos.consistency import Consistency
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.sealed import SealedUpdate
from thresher.protos.sparse import SparseGradient
from thresher.server import events
from thresher.server.config import ShardConfig
from thresher.server.engine import Engine
from thresher.server.events import IterationRow, Worker
from thresher.server.facts import Agreed
from thresher.server.journal import Journal
from thresher.server.shard import Shard

LAYOUT = Layout((TensorSpec("w", (2,), "float32"),))
SGD = OptimizerSpec("SGD", ({"lr": 1.0},))
ME, OTHER = Worker(0, 1), Worker(1, 1)


@final
@dataclass(slots=True)
class Listener:
    """Keeps what it hears."""

    heard: list[int] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)
    restarted: list[tuple[int, ...]] = field(default_factory=list)
    failed: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def publish(self, sealed: SealedUpdate, ranks: tuple[int, ...]) -> None:
        assert 0 in ranks
        self.heard.append(sealed.update.version)

    def tell(self, agreed: Agreed, ranks: tuple[int, ...]) -> None:
        self.agreed.append(agreed.number)

    def restart(self, ranks: tuple[int, ...]) -> None:
        self.restarted.append(ranks)

    def fail(self, reason: str) -> None:
        self.failed.set_result(reason)


def run(
    scenario: Callable[[Engine, Listener], Coroutine[Any, Any, None]],
    record: Callable[[IterationRow], None] = lambda _: None,
    journal: Journal | None = None,
    patience: float = 60.0,
    **config: float,
) -> None:
    """A training shard of one worker, on an engine, until the scenario ends."""

    async def whole() -> None:
        shard = Shard(ShardConfig(0, 1, 1, run=7, **config))  # type: ignore[arg-type] # times only
        engine, listener = Engine(shard, "shard 0", record, journal, patience), Listener()
        engine.start(asyncio.get_running_loop(), listener)
        try:
            await engine.submit(events.Register(ME, 1, 0, 1, LAYOUT, SGD, "m", Consistency()))
            await engine.submit(events.Seed(ME, {PARAMETERS: torch.zeros(2)}, {}))
            await engine.submit(events.Hello(ME, events.History()))
            await scenario(engine, listener)
        finally:
            await asyncio.to_thread(engine.stop)

    asyncio.run(whole())


def push(step: int) -> events.Push:
    return events.Push(ME, step, step, SparseGradient.dense(torch.ones(2)), (True,), content=step + 1, wire_bytes=20)


def joined_by_another() -> list[events.Event]:
    """What another worker says to take part, from the next round on."""
    return [events.Register(OTHER, 1, 0, 1, LAYOUT, SGD, "m", Consistency()), events.Hello(OTHER, events.History())]
