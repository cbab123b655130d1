"""Shards that go by a name: found again wherever they are, and never spoken to where plain text must not go."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.worker.conversing import registration, wait_until
from tests.worker.phonebook import Phonebook, install
from tests.worker.training import Cluster, Scale, cluster, set_gradients, sgd
from torch import Tensor

from thresher.deploy.in_process import in_process
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, DataLossError, ThresherError
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub
from thresher.worker import Session
from thresher.worker.calls import ShardCalls


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phonebook:
    """A directory of the run ``digits``, which has no shard yet."""
    folder = tmp_path / "installed"
    folder.mkdir()
    return install(folder, monkeypatch)


@contextmanager
def calling(*, patience: float = 0.0, insecure: bool = False) -> Iterator[ShardCalls]:
    calls = ShardCalls(0, "phone://digits/0", "worker 0", patience=patience, insecure=insecure)
    try:
        yield calls
    finally:
        calls.close()


def look_again(calls: ShardCalls) -> None:
    """Have the next call look the shard up, although that was done just before."""
    calls._line._next_look = 0.0


def test_a_named_shard_is_told_with_its_place(book: Phonebook) -> None:
    """Both are said, the name and where it is; and before it was found, that it was not."""
    with in_process(shards=1, workers=1) as served, calling() as calls:
        assert str(calls) == "shard 0 at phone://digits/0 (not found yet)"
        book.places["digits"] = list(served.addresses)
        calls.statistics()
        assert str(calls) == f"shard 0 at phone://digits/0 ({served.addresses[0]})"


def test_a_directory_is_asked_about_once_per_second(book: Phonebook) -> None:
    """However many calls are made meanwhile."""
    with in_process(shards=1, workers=1) as served, calling() as calls:
        book.places["digits"] = list(served.addresses)
        for _ in range(100):
            calls.register(registration())
        seconds = time.monotonic() - book.looks[0]
    assert len(book.looks) <= 1 + seconds


def test_plain_text_does_not_go_wherever_a_name_leads(book: Phonebook) -> None:
    """Not a connection is made to where it must not go, unless that was asked for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"0.0.0.0:{listener.getsockname()[1]}"  # leads to this machine, and is no address of loopback
        book.places["digits"] = [place]
        refused = f"phone://digits/0 was looked up: {place} is reached over a network"
        with calling(patience=3600.0) as calls:
            for call in (lambda: calls.wait_ready(time.monotonic() + 3600), calls.statistics, lambda: register(calls)):
                with pytest.raises(ConfigurationError, match=refused):
                    call()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.settimeout(60)
        with calling(insecure=True) as calls:
            with pytest.raises(ConnectionTimeoutError):
                calls.statistics(timeout=0.2)
            listener.accept()[0].close()


def register(calls: ShardCalls) -> None:
    calls.register(registration())


def test_a_place_that_is_none(book: Phonebook) -> None:
    book.places["digits"] = ["somewhere"]
    with (
        calling() as calls,
        pytest.raises(ConfigurationError, match=r"phone://digits/0 was .*'somewhere' is not an add"),
    ):
        calls.statistics()


def test_a_directory_that_does_not_answer_for_a_while(book: Phonebook) -> None:
    """It is waited for as the shard is: to the deadline, with its own words, or until it answers."""
    book.trouble = ConnectionTimeoutError("it starts")
    with in_process(shards=1, workers=1) as served, calling() as calls, ThreadPoolExecutor(1) as pool:
        with pytest.raises(
            ConnectionTimeoutError, match=r"could not reach shard 0 at phone://digits/0 \(not found yet; it starts\)"
        ):
            calls.wait_ready(time.monotonic() + 0.1)
        with pytest.raises(ConnectionTimeoutError, match="it starts"):
            register(calls)  # without patience
        asked = len(book.looks)
        waiting = pool.submit(calls.wait_ready, time.monotonic() + 60)
        wait_until(lambda: len(book.looks) > asked)
        book.places["digits"], book.trouble = list(served.addresses), None
        waiting.result()
        register(calls)


def test_a_place_that_is_known_stays_while_the_directory_is_away(book: Phonebook) -> None:
    """A shard that is where it was needs nobody to find it."""
    with in_process(shards=1, workers=1) as served, calling() as calls:
        book.places["digits"] = list(served.addresses)
        register(calls)
        book.trouble = ConnectionTimeoutError("it restarts")
        look_again(calls)
        register(calls)
        assert str(calls).endswith(f"({served.addresses[0]}; it restarts)")
        book.trouble = None
        look_again(calls)
        register(calls)
        assert str(calls).endswith(f"({served.addresses[0]})")


def test_a_shard_that_moves_between_calls(book: Phonebook) -> None:
    """The next call goes to where it is, and what is open at the old place ends as if the shard had."""
    with in_process(shards=1, workers=1) as one, in_process(shards=1, workers=1) as other, calling() as calls:
        book.places["digits"] = list(one.addresses)
        register(calls)
        said: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        told: Any = calls.exchange(iter(said.get, None))
        with ThreadPoolExecutor(1) as pool:
            heard = pool.submit(next, told)
            try:
                book.places["digits"] = list(other.addresses)
                look_again(calls)
                register(calls)
                error: Any = heard.exception(10)
            finally:
                told.cancel()
                said.put(None)
        assert error.code() is grpc.StatusCode.CANCELLED
        assert other.addresses[0] in str(calls)


def test_a_shard_that_moves_while_a_call_begins(book: Phonebook) -> None:
    """A call on the channel that another thread has closed just then is made on the new one."""
    with in_process(shards=1, workers=1) as one, in_process(shards=1, workers=1) as other, calling() as calls:
        book.places["digits"] = list(one.addresses)
        calls.statistics()
        tried: list[AggregationServiceStub] = []

        def moved(stub: AggregationServiceStub) -> pb.StatisticsResponse:
            tried.append(stub)
            book.places["digits"] = list(other.addresses)
            look_again(calls)
            calls._line.find()
            return stub.Statistics(pb.StatisticsRequest(), timeout=60.0)

        calls._line.call(moved)
        assert [len(tried), tried[0] is tried[-1]] == [2, False]


# Whole runs


def train(session: Session, strike: Callable[[], None]) -> Tensor:
    """Some steps, with gradients that are a function of (rank, step); ``strike`` is called in the middle."""
    model = Scale(5)
    optimizer = sgd(model, lr=0.1, momentum=0.9)
    session.wrap(model, optimizer)
    for step in range(8):
        if (session.rank, step) == (0, 4):
            strike()
        set_gradients(model, 0.3 * session.rank - 0.1 * step)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@contextmanager
def digits(book: Phonebook, folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """Serve the run ``digits`` on two shards, whose workers know it by name only."""
    with cluster(2, workers, folder) as served:
        book.places["digits"] = list(served.settings.addresses)
        names = ("phone://digits/0", "phone://digits/1")
        served.settings = replace(served.settings, addresses=names, reconnect_timeout=3600.0)
        yield served


def move(served: Cluster, book: Phonebook, shard: int) -> None:
    """Kill a shard, and start it at another port of which only the directory knows."""
    served.kill(shard)
    served._listen[shard] = "127.0.0.1:0"
    served.start(shard)
    assert served._listen[shard] != book.places["digits"][shard]


def tell(served: Cluster, book: Phonebook) -> None:
    book.places["digits"], book.trouble = list(served._listen), None


def test_a_shard_is_found_again_where_it_is(book: Phonebook, tmp_path: Path) -> None:
    """In the middle of a run, twice, by all workers; the result has the bits of a run in which nothing happened.

    The directory learns of the move a while after the workers have lost the shard: it tells the old place meanwhile,
    or nothing.
    """
    with cluster(2, 2) as served:
        expected, _ = served.run(lambda session: train(session, lambda: None))
    with digits(book, tmp_path / "run") as served:

        def strike() -> None:
            move(served, book, 0)
            move(served, book, 1)
            book.trouble = ConnectionTimeoutError("it looks for them itself")
            asked = len(book.looks)

            def later() -> None:
                wait_until(lambda: len(book.looks) >= asked + 2)
                book.trouble = None
                wait_until(lambda: len(book.looks) >= asked + 4)
                tell(served, book)

            threading.Thread(target=later).start()

        results = served.run(lambda session: train(session, strike))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    ("trouble", "place", "kind", "message"),
    [
        (DataLossError("its disk is gone"), "127.0.0.1:1", DataLossError, "its disk is gone"),
        (None, "0.0.0.0:1", ConfigurationError, r"phone://digits/0 was looked up: 0\.0\.0\.0:1 is reached over a net"),
    ],
)
def test_what_no_patience_mends_ends_the_worker_at_once(
    book: Phonebook,
    tmp_path: Path,
    trouble: ThresherError | None,
    place: str,
    kind: type[ThresherError],
    message: str,
) -> None:
    """With the directory's own error, although the worker would look for the shard for an hour."""
    with digits(book, tmp_path / "run", workers=1) as served:

        def strike() -> None:
            book.places["digits"][0], book.trouble = place, trouble
            served.kill(0)

        with pytest.raises(kind, match=message):
            served.run(lambda session: train(session, strike))
