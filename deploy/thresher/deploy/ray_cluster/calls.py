"""Calls to the actors of a run: a cluster is reached, actors are found by name, each answers or it is said why not."""

import logging
import socket
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.util import list_named_actors

from thresher.protos.errors import (
    ConfigurationError,
    ConnectionTimeoutError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
)

_REACH_SECONDS: Final = 5.0
_PREFIX: Final = "shard-"


def attach(address: str = "auto") -> None:
    """Connect this process to a cluster, unless it is connected to one.

    Args:
        address: As `ray.init` takes it; ``auto`` is that of RAY_ADDRESS, or of a node of this machine.

    Raises:
        ConfigurationError: when there is no cluster.
    """
    if ray.is_initialized():
        return
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"there is no Ray cluster at {address!r}: {why}; start one with `ray start --head`, or name the address of "
            "one that runs, such as 10.0.0.1:6379"
        ) from None


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive, as Ray describes them: ``NodeID``, ``NodeManagerAddress``, ``Resources``."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def own_ip() -> str:
    """Return the address of this process's node."""
    ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return ip


def namespace_of(run: str) -> str:
    """Return Ray's namespace of a run: two runs never see each other."""
    return f"thresher-{run}"


def name_of(shard: int) -> str:
    """Return the name of a shard's actor in the namespace of its run."""
    return f"{_PREFIX}{shard}"


def actor_of(run: str, shard: int) -> Any:  # noqa: ANN401 - Ray's handle has the methods of whatever it is of
    """Return the handle of a shard's actor.

    Raises:
        RoundFailedError: when there is none: the run has ended, or Ray has given the shard up.
    """
    try:
        return ray.get_actor(name_of(shard), namespace=namespace_of(run))
    except ValueError:
        raise RoundFailedError(
            f"the run {run} has no shard {shard} on this cluster (any more); see `thresher ray status {run}`; "
            f"`thresher ray up {run}` with the same state folder goes on with a run that has ended"
        ) from None


def actors_of(run: str) -> dict[int, Any]:
    """Return the handles of all shards that Ray knows, also of those that it is starting again."""
    found: dict[int, Any] = {}
    everything: Any = list_named_actors(all_namespaces=True)  # annotated as the names alone
    for named in everything:
        if named["namespace"] == namespace_of(run) and named["name"].startswith(_PREFIX):
            shard = int(named["name"].removeprefix(_PREFIX))
            try:
                found[shard] = actor_of(run, shard)
            except RoundFailedError:  # it has ended since
                continue
    return found


def taken(run: str) -> ConfigurationError:
    """Return what to raise when there is a run of that name already."""
    return ConfigurationError(
        f"there is a run {run} on this cluster; choose another name, or end that one with `thresher ray down {run}`"
    )


def answers(calls: "Mapping[int, ray.ObjectRef[Any]]", timeout: float) -> dict[int, Any]:
    """Wait for calls to shards.

    Args:
        calls: By shard.
        timeout: Seconds, for all together.

    Returns:
        By shard what came back; a ThresherError where nothing did. That is ConnectionTimeoutError where a later call
        may have an answer.
    """
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout)
    return {shard: _answer(shard, call, timeout) for shard, call in calls.items()}


def _answer(shard: int, call: "ray.ObjectRef[Any]", waited: float) -> Any:  # noqa: ANN401 - of any method
    try:
        return ray.get(call, timeout=0)
    except GetTimeoutError:
        return ConnectionTimeoutError(
            f"shard {shard} has not answered in {waited:g} s: it is starting, recovering, or waiting for a node"
        )
    except ActorUnavailableError:
        return ConnectionTimeoutError(f"shard {shard} has lost its process or its node, and Ray starts it again")
    except ActorDiedError as error:
        return RoundFailedError(f"Ray has given shard {shard} up: {_last_line(error)}")
    except RayTaskError as error:
        if isinstance(error.cause, ThresherError):
            return error.cause
        return ProtocolError(f"shard {shard} could not answer: {_last_line(error)}")
    except RayError as error:
        return ConnectionTimeoutError(f"shard {shard} cannot be asked: {_last_line(error)}")


def _last_line(error: RayError) -> str:
    """Return where a traceback says what happened."""
    return str(error).strip().splitlines()[-1]


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would try for a quarter of an hour."""
    where = urlsplit(address).netloc if "://" in address else canonicalize_bootstrap_address(address)
    if where is not None:
        host, _, port = where.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
