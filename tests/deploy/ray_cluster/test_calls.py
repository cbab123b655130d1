"""A cluster that is not there, and actors that answer late, never, or no more: each is told as what it is."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.util import list_named_actors

from thresher.deploy.ray_cluster.calls import (
    actor_of,
    actors_of,
    alive_nodes,
    answers,
    attach,
    name_of,
    namespace_of,
    own_ip,
)
from thresher.protos.errors import (
    ConfigurationError,
    ConnectionTimeoutError,
    DataLossError,
    ProtocolError,
    RoundFailedError,
)

pytestmark = pytest.mark.xdist_group("ray")

SECONDS = 60.0


@pytest.fixture
def dead_address() -> str:
    """Where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_where_no_cluster_is_it_is_said_how_to_start_one(dead_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whether the address was typed or is in the environment; Ray itself tries for a quarter of an hour."""
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    for address in (dead_address, f"ray://{dead_address}", "auto"):
        with pytest.raises(ConfigurationError, match="start one with `ray start --head`"):
            attach(address)
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["nowhere.invalid:6379", "127.0.0.1:port", "here"])
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no Ray cluster at"):
        attach(address)
    assert not ray.is_initialized()


class Shard:
    """Answers as it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def pid(self) -> int:
        return os.getpid()

    def fail(self, error: Exception) -> None:
        raise error

    def hang(self) -> None:
        signal.pause()


@contextmanager
def acting(run: str, *arguments: Any, restarts: int = 0) -> Iterator[Any]:
    """One actor of a run."""
    options: dict[str, Any] = {"name": name_of(0), "namespace": namespace_of(run), "num_cpus": 0}
    actor: Any = ray.remote(Shard).options(max_restarts=restarts, **options).remote(*arguments)
    try:
        yield actor
    finally:
        ray.kill(actor)


def answer(call: Any, timeout: float = SECONDS) -> Any:
    return answers({0: call}, timeout)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_node")
def test_actors_are_found_by_the_name_of_their_run() -> None:
    """Those of another run are not, nor others in the same namespace; a connected process stays connected."""
    attach("nowhere.invalid:1")
    assert [node["NodeManagerAddress"] for node in alive_nodes()] == [own_ip()]
    with acting("one") as actor, acting("another"):
        assert answer(actor.pid.remote()) == answer(actor_of("one", 0).pid.remote())
        assert list(actors_of("one")) == [0]
        for run, shard in (("one", 1), ("on", 0)):
            with pytest.raises(RoundFailedError, match=f"{run} has no shard {shard}"):
                actor_of(run, shard)
    assert answers({}, 0.0) == {}
    while list_named_actors(all_namespaces=True):
        pass  # a kill takes a moment
    assert actors_of("one") == {}


@pytest.mark.slow
@pytest.mark.usefixtures("one_node")
def test_what_an_actor_raises_is_raised_here_as_it_was_there() -> None:
    with acting("errors") as actor:
        mine = answer(actor.fail.remote(DataLossError("a record is gone")))
        assert (type(mine), str(mine)) == (DataLossError, "a record is gone")
        foreign = answer(actor.fail.remote(ZeroDivisionError("by zero")))
        assert isinstance(foreign, ProtocolError)
        assert "ZeroDivisionError: by zero" in str(foreign)


@pytest.mark.slow
@pytest.mark.usefixtures("one_node")
def test_an_actor_that_does_not_answer_may_later_and_one_that_is_dead_will_not() -> None:
    """Silent, killed and started again: ask once more. Given up: no more."""
    with acting("lives", restarts=-1) as actor:
        before = answer(actor.pid.remote())
        assert isinstance(answer(actor.hang.remote(), 0.1), ConnectionTimeoutError)
        os.kill(before, signal.SIGKILL)
        while isinstance(after := answer(actor.pid.remote()), ConnectionTimeoutError):
            pass
        assert after != before
    with acting("broken", ImportError("no such module")) as actor:
        given_up = answer(actor.pid.remote())
        assert type(given_up) is RoundFailedError
        assert "ImportError: no such module" in str(given_up)
