"""A conversation with one shard outlives its connections: nothing is lost, nothing counts twice."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.worker.conversing import LAYOUT, Proxy, registration, unused_address, wait_until
from tests.worker.training import Cluster, cluster
from torch import Tensor, nn

from thresher.deploy.in_process import in_process
from thresher.protos import faults, timeouts
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConnectionTimeoutError, FencedError, ProtocolError, RoundFailedError
from thresher.protos.snapshots import pack_state
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Session, connect
from thresher.worker.calls import ShardCalls
from thresher.worker.client import ShardClient

PIECE = LAYOUT.shard_slice(0, 1)
STEPS = 8


@contextmanager
def talking(address: str, *, incarnation: int = 7, patience: float = 5.0) -> Iterator[ShardClient]:
    """A conversation that has not begun."""
    calls = ShardCalls(0, address, "worker 0", patience=patience)
    client = ShardClient(calls, registration(incarnation=incarnation), 30.0)
    try:
        yield client
    finally:
        client.close()
        client.close()


def begin(client: ShardClient) -> None:
    client.calls.register(client.registration)
    client.calls.seed(client.registration, pack_state({"parameters": torch.zeros(3)}, {}))
    client.open(PIECE, pb.History())


def test_a_push_that_is_rejected() -> None:
    """The verdict and its reason become the error of the step."""
    with in_process(shards=1, workers=1) as served, talking(served.addresses[0]) as client:
        begin(client)
        client.push(pb.Push(step=5, version=5, skipped=True), b"")
        with pytest.raises(
            RoundFailedError, match=r"worker 0 and shard 0 at .*: push 5 was REJECTED: .* round 0 is open"
        ):
            client.wait()


def test_an_exchange_that_was_not_registered() -> None:
    """A stranger's hello ends the stream with an error, not with silence."""
    with in_process(shards=1, workers=1) as served, talking(served.addresses[0]) as client:
        client.open(PIECE, pb.History())
        with pytest.raises(ProtocolError, match="register first"):
            client.wait()


def test_the_older_of_two_lives_is_fenced() -> None:
    """Two processes with one rank: the newer one goes on, the older one is told which."""
    with in_process(shards=1, workers=1) as served, talking(served.addresses[0]) as older:
        begin(older)
        with talking(served.addresses[0], incarnation=8) as newer:
            begin(newer)
            older.push(pb.Push(step=0, version=0, skipped=True), b"")
            with pytest.raises(FencedError, match="worker 0"):
                older.wait()
            newer.push(pb.Push(step=0, version=0, skipped=True), b"")
            newer.wait()
            newer.leave(pb.Leave(), b"")
            newer.wait_left()


def test_a_shard_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It should speak first; where it does not, the error names both, what was said, where, and what to try."""
    monkeypatch.setattr(timeouts, "MARGIN_SECONDS", 0.0)
    with in_process(shards=1, workers=2) as served:
        calls = ShardCalls(0, served.addresses[0], "worker 0", patience=0.1)
        client = ShardClient(calls, registration(workers=2), answer_timeout=0.1)
        begin(client)
        client.push(pb.Push(step=0, version=0, skipped=True), b"")
        named = r"shard 0 at \S+ has not answered worker 0 in 0 s, on {} at version 0, .* look at its log"
        with pytest.raises(RoundFailedError, match=named.format("its push of step 0")):
            client.wait()
        client.ask(0, {"loss": 1.0})
        with pytest.raises(RoundFailedError, match=named.format("what it asked in agreement 0")):
            client.wait_agreed(0)
        client.close()


def test_before_it_is_opened() -> None:
    """Closing is always possible, twice too."""
    with talking(unused_address()) as client:
        assert str(client) == str(client.calls)
        assert client.reconnects == 0


def test_a_shard_that_does_not_come_back() -> None:
    """The patience has an end, and the error says how long it was."""
    proxy: Proxy
    with in_process(shards=1, workers=1) as served:
        proxy = Proxy(served.addresses[0])
        with talking(proxy.address, patience=0.3) as client:
            begin(client)
            client.push(pb.Push(step=0, version=0, skipped=True), b"")
            client.wait()
            proxy.close()
            with pytest.raises(
                ConnectionTimeoutError,
                match=r"worker 0 has lost shard 0 at \S+, and not found it again in 0 s; .*; it was at version 1",
            ):
                client.wait()


def test_streams_that_break_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is waited with longer than the one before, until one has spoken."""
    with in_process(shards=1, workers=1) as served:
        proxy = Proxy(served.addresses[0])
        exchange = ShardCalls.exchange

        def broken(calls: ShardCalls, requests: Iterable[pb.ExchangeRequest]) -> Iterator[pb.ExchangeResponse]:
            responses = exchange(calls, requests)
            proxy.cut()
            return responses

        with talking(proxy.address) as client:
            with monkeypatch.context() as patched:
                patched.setattr(ShardCalls, "exchange", broken)
                begin(client)
                wait_until(lambda: client.reconnects == 4)
            assert next(client._pauses) == 1.6
            client.push(pb.Push(step=0, version=0, skipped=True), b"")
            client.wait()
            assert next(client._pauses) == 0.1
        proxy.close()


# Whole runs over connections that break


def train(session: Session) -> Tensor:
    """Some steps, with gradients that are a function of (rank, step), on a model of many packets."""
    model = nn.Linear(3000, 3, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    session.wrap(model, optimizer)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + session.rank)
        model.weight.grad = torch.randn(3, 3000, generator=generator)
        optimizer.step()
    session.close()
    return model.weight.detach().clone()


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    with cluster(2, 2) as served:
        return served.run(train)[0]


@contextmanager
def proxies(served: Cluster) -> Iterator[list[Proxy]]:
    between = [Proxy(address) for address in served.settings.addresses]
    try:
        yield between
    finally:
        for proxy in between:
            proxy.close()


def behind(between: list[Proxy], session: Session) -> Session:
    """Only rank 0's connections break."""
    return session if session.rank else reached_through(between, session)


def reached_through(between: list[Proxy], session: Session) -> Session:
    return connect(settings=replace(session._settings, addresses=tuple(proxy.address for proxy in between)))


def applied(served: Cluster) -> list[list[int]]:
    return [[member.steps for member in served.statistics(shard).members] for shard in range(2)]


@pytest.mark.parametrize("upstream", [True, False], ids=["pushes", "updates"])
def test_connections_reset_in_the_middle_of_a_frame(upstream: bool, undisturbed: Tensor) -> None:
    """Wherever a connection breaks, all workers end with the same bits, and every push was applied once."""
    steps = iter(range(STEPS))
    with cluster(2, 2) as served, proxies(served) as between:

        def strike(who: str, phase: str) -> None:
            if (who, phase) == ("worker 0", "compress") and 0 < (step := next(steps)) < STEPS - 1:
                between[step % 2].cut_after((0, 1, 900, 5000, 17000, 3)[step - 1], upstream=upstream)

        with faults.plan(strike):
            found = served.run(lambda session: train(behind(between, session)))
        assert applied(served) == [[STEPS] * 2] * 2
        assert sum(proxy.cuts for proxy in between) >= STEPS - 2
    assert all(torch.equal(weight, undisturbed) for weight in found)


def test_a_shard_that_cannot_be_found_for_a_while(undisturbed: Tensor) -> None:
    """A worker looks for it as long as its patience lasts, and goes on as if nothing had been."""
    pushes = iter(range(2 * STEPS))
    with cluster(2, 2) as served, proxies(served) as between:

        def strike(who: str, phase: str) -> None:
            if (who, phase) == ("worker 0", "in flight") and next(pushes) in (3, 8):
                between[0].hold(0.5)

        with faults.plan(strike):
            found = served.run(lambda session: train(behind(between, session)))
        assert applied(served) == [[STEPS] * 2] * 2
        assert between[0].cuts >= 2
    assert all(torch.equal(weight, undisturbed) for weight in found)


def test_a_connection_that_breaks_behind_an_update() -> None:
    """While a worker waits for one shard it has the other's update unread: that step is not taken for the next one."""
    pushes = iter(range(2 * STEPS))
    with cluster(2, 1, consistency=Consistency("async")) as served, proxies(served) as between:

        def strike(who: str, phase: str) -> None:
            if phase != "in flight":
                return
            match next(pushes):
                case 4:  # step 2 is on its way to the first shard, which is slow to answer
                    between[0].hold(1.0)
                case 5:  # and the second shard's answer has come when its connection breaks
                    wait_until(lambda: served.statistics(1).version == 3)
                    time.sleep(0.1)
                    between[1].cut()
                    time.sleep(0.4)
                case 6:  # now what is said next to the second shard is lost on its way
                    between[1].cut_after(0, upstream=True)
                case _:
                    pass

        with faults.plan(strike):
            (found,) = served.run(lambda session: train(reached_through(between, session)))
        assert [[member.steps for member in served.statistics(shard).members] for shard in range(2)] == [[STEPS]] * 2
        assert torch.equal(found.view(-1), torch.cat([one.state["parameters"] for one in served.snapshots()]))
