"""Bad days: every failure ends in time, at everybody, with a message that names who and where."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.worker.conversing import Proxy
from tests.worker.training import abandon
from torch import nn

from thresher.deploy.in_process import InProcess, in_process
from thresher.protos.errors import (
    ConnectionTimeoutError,
    FencedError,
    LayoutError,
    RegistrationError,
    RoundFailedError,
    ThresherError,
)
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer
from thresher.worker import Method, Session, Settings, connect
from thresher.worker.parameters import ModelParameters


def wrapped(session: Session, **options: Any) -> torch.optim.Optimizer:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.5, **options})
    session.wrap(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer


def told(cluster: InProcess, work: Callable[[Session], None]) -> dict[int, str]:
    """Run ``work`` on all ranks, and return what each rank's error said; a rank without error is left out."""
    found: dict[int, str] = {}

    def remembered(session: Session) -> None:
        try:
            work(session)
        except ThresherError as error:
            found[session.rank] = f"{type(error).__name__}: {error}"
            raise

    with pytest.raises(ThresherError):
        cluster.run(remembered)
    return found


@contextmanager
def serving(listen: str) -> Iterator[ShardServer]:
    """Serve the one shard of a run with one worker at a given address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = ShardServer(ServerConfig(ShardConfig(0, 1, 1, lease=0.3), listen=listen))
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    yield server
    asyncio.run_coroutine_threadsafe(server.stop(grace=0.5), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# Coming together


def test_the_worker_may_be_first() -> None:
    """Start order is free: a worker that has already tried in vain joins the shard that comes up later."""
    with socket.socket() as reserved, ThreadPoolExecutor(1) as pool:
        reserved.bind(("127.0.0.1", 0))
        reserved.listen()
        address = f"127.0.0.1:{reserved.getsockname()[1]}"

        def work() -> int:
            with connect(settings=Settings((address,), rank=0, workers=1, connect_timeout=60.0)) as session:
                wrapped(session).step()
                return session.step

        worker = pool.submit(work)
        attempt, _ = reserved.accept()  # the worker is trying
        reserved.close()
        attempt.close()
        with serving(address):
            assert worker.result() == 1


def test_a_shard_that_does_not_come() -> None:
    """The worker names the shard and its address when its time is up."""
    with in_process(shards=1, workers=1) as cluster:
        addresses = (*cluster.addresses, "127.0.0.1:1")
        session = connect(settings=Settings(addresses, rank=0, workers=1, connect_timeout=0.2))
        with pytest.raises(ConnectionTimeoutError, match=r"worker 0 could not reach shard 1 at 127\.0\.0\.1:1; start"):
            wrapped(session)


def test_a_worker_that_does_not_come() -> None:
    """The first round ends at the start deadline and names it; rank 0, without whom nothing begins, likewise."""
    with in_process(shards=1, workers=2, start_timeout=0.3) as cluster:
        session = cluster.connect(0)
        with pytest.raises(RoundFailedError, match="its deadline: worker 1 has never registered"):
            wrapped(session).step()
        with pytest.raises(RoundFailedError, match="worker 1 has never registered"):
            session.close()  # nobody is left to be told, and it does not wait for an answer
    with in_process(shards=1, workers=2) as cluster:
        session = connect(settings=Settings(cluster.addresses, rank=1, workers=2, connect_timeout=0.3))
        with pytest.raises(RoundFailedError, match="worker 0, which brings them, has not come"):
            wrapped(session)


def test_two_workers_with_one_rank() -> None:
    """The newer one takes the place of the older one, which is told who has; the newer one goes on."""
    with in_process(shards=2, workers=1) as cluster, cluster.connect(0) as newer:
        older = cluster.connect(0)
        fenced = wrapped(older)
        fenced.step()
        optimizer = wrapped(newer)
        with pytest.raises(FencedError, match=r"worker 0 has opened another stream \[shard 0 at"):
            fenced.step()
        older.abort("what it says does not count any more")
        optimizer.step()
        assert [shard.version for shard in cluster.statistics()] == [2, 2]


def test_another_number_of_workers() -> None:
    """One of the ranks that the run began with, but told of another size: refused, with both sizes."""
    with in_process(shards=1, workers=2) as cluster:
        session = connect(settings=Settings(cluster.addresses, rank=1, workers=3))
        with pytest.raises(RegistrationError, match="worker 1 of 3 asks to join a run that began with 2 workers"):
            wrapped(session)


def test_models_that_differ_are_shown_side_by_side() -> None:
    """Each difference is a line: a missing tensor, another shape, another type, another group."""
    with in_process(shards=1, workers=2) as cluster, cluster.connect(0) as session:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
        session.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
        other = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 2).to(torch.bfloat16)})
        with pytest.raises(LayoutError) as caught:
            cluster.connect(1).wrap(other, torch.optim.SGD(other.parameters(), lr=1.0))
    text = str(caught.value)
    assert "the model of worker 1 differs from the one that worker 0 registered" in text
    assert "a.weight float32 [2, 2] is registered, here it is float32 [3, 2]" in text
    assert "b.weight float32 [2, 2] is registered, here it is bfloat16 [2, 2]" in text
    assert "b.bias bfloat16 [2] is not registered" in text
    assert cluster.addresses[0] in text


@pytest.mark.parametrize(
    ("options", "method", "text"),
    [
        ({"lr": 0.25}, None, "'lr': 0.25"),
        ({"momentum": 0.5}, None, "'momentum': 0.5"),
        ({}, Method(threshold=1.0), "threshold 1.0"),
        ({}, Method("Identity"), "Identity"),
        ({}, Method(threshold=0.0, placement="update"), "update-placed"),
    ],
)
def test_workers_that_disagree_from_the_start(options: dict[str, Any], method: Method | None, text: str) -> None:
    """Another optimizer or another method is refused at registration; the message has both."""
    with in_process(shards=1, workers=2) as cluster, cluster.connect(0) as session:
        wrapped(session)
        with pytest.raises(RegistrationError) as caught:
            wrapped(cluster.connect(1, method), **options)
    assert text in str(caught.value)
    assert "HardThreshold, threshold 0.0, gradient-placed" in str(caught.value)


# In the middle of a run


def test_schedules_that_disagree() -> None:
    """A worker whose rate differs from the others' in a step is refused; the message names both values."""

    def work(session: Session) -> None:
        optimizer = wrapped(session)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.25 / (session.rank + 1)
        optimizer.step()

    with in_process(shards=2, workers=2) as cluster:
        found = told(cluster, work)
    assert found.keys() == {0, 1}
    first = [text for text in found.values() if "was REJECTED" in text]
    assert first
    assert all("disagree on hyper-parameters in step 1" in text for text in found.values())
    assert all("value=0.25" in text and "value=0.125" in text for text in found.values())


def test_a_worker_that_stops_tells_why() -> None:
    """An exception in one worker's loop is what the others read, with its rank and step."""

    def work(session: Session) -> None:
        optimizer = wrapped(session)
        optimizer.step()
        if session.rank == 1:
            session.abort("out of memory: no chance")
            return
        optimizer.step()

    with in_process(shards=2, workers=3) as cluster:
        found = told(cluster, work)
        assert [shard.state for shard in cluster.statistics()] == ["failed", "failed"]
    assert found.keys() == {0, 2}
    for text in found.values():
        assert "RoundFailedError: worker 1" in text
        assert "stopped after 1 steps: out of memory: no chance" in text


def moved(session: Session, steps: int, before: Callable[[int], None] = lambda step: None) -> list[float]:
    """Make steps with gradients of ones, and return how far each of them moved the parameters, in learning rates."""
    optimizer = wrapped(session)
    (weight, _) = optimizer.param_groups[0]["params"]
    found = []
    for step in range(steps):
        before(step)
        earlier = weight.detach().clone()
        optimizer.step()
        found.append(((earlier - weight.detach()) / 0.5).mean().item())
    return found


def test_a_worker_that_is_lost() -> None:
    """When its lease is over the others go on: one round divided by all without it, then the rest share the mean."""

    def work(session: Session) -> list[float]:
        found = moved(session, 1 if session.rank == 1 else 4)
        if session.rank == 1:
            abandon(session)
        return found

    with in_process(shards=2, workers=3, lease=0.1) as cluster:
        results = cluster.run(work)
        shards = cluster.statistics()
    for rank in (0, 2):
        assert results[rank] == pytest.approx([1, 2 / 3, 1, 1], abs=1e-6)
    for shard in shards:
        assert [(member.state, member.steps) for member in shard.members] == [("left", 4), ("lost", 1), ("left", 4)]
        assert not shard.failure


def test_a_worker_that_comes_back_in_time() -> None:
    """Within its lease it is waited for: no round is without it, though its connections broke."""

    def cut(step: int) -> None:
        for proxy in proxies if step == 2 else ():
            proxy.hold(0.2)

    def work(session: Session) -> list[float]:
        if session.rank != 1:
            return moved(session, 4)
        addresses = tuple(proxy.address for proxy in proxies)
        with connect(settings=replace(session._settings, addresses=addresses)) as proxied:
            return moved(proxied, 4, before=cut)

    with in_process(shards=2, workers=3, lease=60.0) as cluster:
        proxies = [Proxy(address) for address in cluster.addresses]
        results = cluster.run(work)
        shards = cluster.statistics()
        for proxy in proxies:
            proxy.close()
    assert all(found == pytest.approx([1, 1, 1, 1], abs=1e-6) for found in results)
    assert all(member.steps == 4 for shard in shards for member in shard.members)
    assert all(proxy.cuts for proxy in proxies)


def test_a_worker_that_is_slow() -> None:
    """A member that is there but does not push is named at the deadline of the round, which others did not exceed."""
    told_first = threading.Event()
    found: dict[int, str] = {}

    def work(session: Session) -> None:
        optimizer = wrapped(session)
        optimizer.step()
        if session.rank == 1:
            assert told_first.wait(timeout=60)
            return
        try:
            optimizer.step()
        except RoundFailedError as error:
            found[session.rank] = str(error)
        told_first.set()

    # The slow one finds, when it wants to leave, that the run has failed.
    failed = pytest.raises(RoundFailedError, match="round 1 of shard 0")
    with in_process(shards=1, workers=2, round_timeout=0.5, lease=0.1) as cluster, failed:
        cluster.run(work)
    assert "worker 1" in found[0]
    assert "is connected but has not pushed, after 1 steps" in found[0]


def test_a_shard_that_is_lost() -> None:
    """The workers look for it until their patience ends; then they name it and its address."""
    ready, stopped = threading.Barrier(2, timeout=60), threading.Event()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"

    def work() -> str:
        session = connect(settings=Settings((address,), rank=0, workers=1, reconnect_timeout=0.3))
        optimizer = wrapped(session)
        optimizer.step()
        ready.wait()
        assert stopped.wait(timeout=60)
        with pytest.raises(ConnectionTimeoutError) as caught:
            optimizer.step()
        session.abort("no shard")
        return str(caught.value)

    with ThreadPoolExecutor(1) as pool:
        with serving(address):
            worker = pool.submit(work)
            ready.wait()
        stopped.set()
        assert f"worker 0 has lost shard 0 at {address}, and not found it again" in worker.result()


def test_a_worker_that_fails_while_joining_tells_the_others() -> None:
    """A worker that shard 0 took and shard 1 refuses does not leave those waiting who have joined: they read why."""

    def work(session: Session) -> None:
        if session.rank == 0:
            wrapped(session).step()
            return
        twice = (cluster.addresses[0],) * 2  # the second address is wrong
        wrapped(connect(settings=replace(session._settings, addresses=twice)))

    with in_process(shards=2, workers=2) as cluster:
        found = told(cluster, work)
    assert found[1].startswith("RegistrationError")
    assert found[0].startswith("RoundFailedError")
    assert found[1] in found[0]


def test_rank_0_that_fails_before_its_seed_is_not_waited_for() -> None:
    """The others wait for rank 0's values; when it fails instead of bringing them, they are told at once, and why."""

    class Broken(nn.Linear):
        """A model whose state can be read so many times only."""

        reads = 100

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """Fail when the last read is used up."""
            self.reads -= 1
            if self.reads < 0:
                raise ValueError("no such state")
            return super().state_dict(*args, **kwargs)

    probe = Broken(2, 2)
    ModelParameters(probe, torch.optim.SGD(probe.parameters(), lr=0.1))
    broken = Broken(2, 2)
    broken.reads -= probe.reads  # enough to lay the model out, not to pack the seed

    def one(rank: int) -> None:
        model = broken if rank == 0 else nn.Linear(2, 2)
        with cluster.connect(rank) as session:
            session.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))

    with in_process(shards=1, workers=2) as cluster, ThreadPoolExecutor(2) as pool:
        said = [repr(future.exception(timeout=30)) for future in [pool.submit(one, rank) for rank in range(2)]]
    assert "no such state" in said[0]
    assert "RoundFailedError" in said[1]
    assert "ValueError: no such state" in said[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_type_that_float32_cannot_stand_for_is_refused(dtype: torch.dtype) -> None:
    """Double precision and complex parameters: refused with their name, instead of trained wrongly in silence."""

    def work(session: Session) -> None:
        model = nn.ParameterDict({"odd": nn.Parameter(torch.zeros(3, dtype=dtype))})
        session.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))

    with in_process(shards=1, workers=1) as cluster, pytest.raises(LayoutError, match=rf"parameter odd is {dtype}"):
        cluster.run(work)


def test_a_web_proxy_is_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """With http_proxy set, shards are still reached directly."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with in_process(shards=1, workers=1) as cluster:
        cluster.run(lambda session: wrapped(session).step())
        assert cluster.statistics()[0].version == 1
