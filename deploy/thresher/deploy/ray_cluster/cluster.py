"""The verbs: start a run on a Ray cluster, look at it, end it. Any driver may, also one that did not start it."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import ray
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from thresher.deploy.ray_cluster import placement, storage
from thresher.deploy.ray_cluster.calls import actors_of, alive_nodes, answers, attach, name_of, namespace_of, taken
from thresher.deploy.ray_cluster.config import RayConfig
from thresher.deploy.ray_cluster.shard import RemoteShard, Whereabouts
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, ThresherError
from thresher.protos.transport import any_port, check_address
from thresher.worker.directory import check_run

_logger = logging.getLogger(__name__)

_CLEANING_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.1

State = Literal["SERVING", "SILENT", "FAILED"]
"""It answers; it does not at the moment, and may again; it will not."""


@final
@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One shard, as far as it is known now.

    Attributes:
        shard: Its position.
        state: Whether it serves.
        reason: What the run is doing, or why the shard does not serve.
        node: Address of its node; empty while it has none.
        address: ``host:port`` for workers; empty where it does not answer, as all that follows is.
        metrics_address: ``host:port`` of its Prometheus endpoint.
        pid: Of its process.
        version: Number of updates applied.
        members: Number of workers that belong to the run.
        bytes_up: Bytes received from workers.
        bytes_down: Bytes sent to workers.
        last_iteration_age: Seconds since the last round closed; None before the first of this process.
        worker_metrics: ``host:port`` of the Prometheus endpoints of the workers that have one.
    """

    shard: int
    state: State
    reason: str
    node: str
    address: str = ""
    metrics_address: str = ""
    pid: int = 0
    version: int = 0
    members: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    last_iteration_age: float | None = None
    worker_metrics: tuple[str, ...] = ()


def up(config: RayConfig, *, deadline: float = 60.0) -> None:
    """Start the shards of a run, or of one that goes on with what is in its state folder. Returns when all serve.

    They live until `down`, whatever becomes of this process, and Ray starts them again whenever they die.

    Args:
        config: What to run.
        deadline: Seconds for all of it; a long journal to recover takes longer.

    Raises:
        ConfigurationError: when there is no cluster, no room on it, a run of that name, or a state folder that cannot
            be used; nothing is left behind then, nor with the other errors.
        DataLossError: when what the state folder holds is damaged, or of another run.
        ConnectionTimeoutError: when shards do not serve by the deadline; it names them.
    """
    until = time.monotonic() + deadline
    attach()
    _check_nodes(config)
    if actors_of(config.name) or placement.find(config.name):
        raise taken(config.name)
    if config.state_dir is not None:
        storage.probe(config.state_dir, deadline=max(1.0, until - time.monotonic()))
    group = placement.reserve(config, until=until)
    actors: dict[int, Any] = {}
    try:
        for shard in range(config.shards):
            actors[shard] = _start(config, shard, group)
        _wait_for(actors, until)
    except BaseException:
        _kill(actors)
        placement.remove([group], until=time.monotonic() + _CLEANING_SECONDS)
        raise


def status(name: str, *, timeout: float = _LOOK_SECONDS) -> list[ShardStatus]:
    """Ask all shards at once how they stand.

    Args:
        name: Of the run.
        timeout: Seconds; a shard that has not answered by then is told as such.

    Returns:
        One for each shard, in their order.

    Raises:
        ConfigurationError: when there is no cluster, or no such run on it.
    """
    nodes, actors = _found(name)
    shards = sorted(nodes.keys() | actors.keys())
    where, how = _asked(actors, timeout)
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in alive_nodes()}
    gone = ConfigurationError(
        "Ray has given it up, and its log says why, or it is about to be started for the first time; "
        f"`thresher ray down {name}` clears it away"
    )
    return [
        _status(shard, where.get(shard, gone), how.get(shard, gone), addresses.get(nodes.get(shard, ""), ""))
        for shard in shards
    ]


def down(name: str, *, timeout: float = 120.0) -> None:
    """End a run: every shard that answers finishes what has come and writes a checkpoint; then all is given back.

    The state folder stays, and `up` with the same one goes on with the run.

    Args:
        name: Of the run.
        timeout: Seconds for all of it. A shard that is not drained by then is ended all the same, and reads its
            journal the next time: nothing is lost.

    Raises:
        ConfigurationError: when there is no cluster, or no such run on it.
        ConnectionTimeoutError: when something is left after that time; it names it.
    """
    until = time.monotonic() + timeout
    _, actors = _found(name)
    _drain(actors, until)
    _kill(actors)
    until = max(until, time.monotonic() + _CLEANING_SECONDS)
    is_free = placement.remove(list(placement.find(name).values()), until=until)
    while left := sorted(actors_of(name)):
        if time.monotonic() > until:
            break
        time.sleep(_POLL_SECONDS)
    if left or not is_free:
        what = [f"shard {shard}" for shard in left] + ([] if is_free else ["its placement group"])
        raise ConnectionTimeoutError(
            f"of the run {name} there is still {', '.join(what)}, {timeout:g} s after its end was asked for; see "
            f"whether the cluster answers (`ray status`), and ask again: thresher ray down {name}"
        )


def _start(config: RayConfig, shard: int, group: PlacementGroup) -> Any:  # noqa: ANN401 - Ray's handle
    options: dict[str, Any] = {
        "name": name_of(shard),
        "namespace": namespace_of(config.name),
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,
        "num_cpus": config.cpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=shard),
    }
    advice = logging.getLogger("ray.actor")
    advice.addFilter(_is_news)
    try:
        return RemoteShard.options(**options).remote(config, shard)
    except ActorAlreadyExistsError:  # another driver was faster
        raise taken(config.name) from None
    finally:
        advice.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Keep back Ray's advice that an actor ends with its placement group: `down` removes both."""
    return "restartable detached actor with a placement group" not in record.getMessage()


def _wait_for(actors: Mapping[int, Any], until: float) -> None:
    """Wait until all shards serve. Raises what the first one raised that cannot."""
    begin = time.monotonic()
    calls = {shard: actor.where.remote() for shard, actor in actors.items()}
    told = answers(calls, max(0.0, until - begin))
    errors = {shard: error for shard, error in told.items() if isinstance(error, ThresherError)}
    late = sorted(shard for shard, error in errors.items() if isinstance(error, ConnectionTimeoutError))
    for shard, error in errors.items():
        if shard not in late:
            raise error
    if late:
        names = ", ".join(f"shard {shard}" for shard in late)
        raise ConnectionTimeoutError(
            f"{names} did not serve within {time.monotonic() - begin:.0f} s of being placed; see the actors' logs, or "
            "wait for longer where a long journal is to be read"
        )


def _found(name: str) -> tuple[dict[int, str], dict[int, Any]]:
    """Return the nodes and the actors of a run, by shard. Raises ConfigurationError when there is none."""
    check_run(name)
    attach()
    nodes, actors = placement.nodes_of(name), actors_of(name)
    if not nodes and not actors:
        raise ConfigurationError(
            f"there is no run {name} on this cluster; `thresher ray up {name}` starts one, and `ray list actors` shows "
            "what there is"
        )
    return nodes, actors


def _asked(actors: Mapping[int, Any], timeout: float) -> tuple[dict[int, Any], dict[int, Any]]:
    begin = time.monotonic()
    places = {shard: actor.where.remote() for shard, actor in actors.items()}
    pictures = {shard: actor.statistics.remote() for shard, actor in actors.items()}
    where = answers(places, timeout)
    return where, answers(pictures, max(0.0, timeout - (time.monotonic() - begin)))


def _status(
    shard: int, where: Whereabouts | ThresherError, how: dict[str, Any] | ThresherError, node: str
) -> ShardStatus:
    for told in (where, how):
        if isinstance(told, ThresherError):
            return ShardStatus(
                shard, "SILENT" if isinstance(told, ConnectionTimeoutError) else "FAILED", str(told), node
            )
    assert isinstance(where, Whereabouts)  # noqa: S101
    assert isinstance(how, dict)  # noqa: S101
    members = how["members"]
    return ShardStatus(
        shard,
        "FAILED" if how["failure"] else "SERVING",
        how["failure"] or how["state"],
        where.node_ip,
        where.address,
        where.metrics_address,
        where.pid,
        how["version"],
        sum(member["counts"] for member in members),
        sum(member["push_bytes"] for member in members),
        sum(member["pull_bytes"] for member in members),
        how["last_iteration_age"],
        tuple(member["metrics_address"] for member in members if member["metrics_address"]),
    )


def _drain(actors: Mapping[int, Any], until: float) -> None:
    """Drain the shards that answer; the others are left to their journals."""
    calls = {shard: actor.where.remote() for shard, actor in actors.items()}
    where = answers(calls, min(_LOOK_SECONDS, max(0.0, until - time.monotonic())))
    # Also those that serve no more: another `down` may have asked, and then this call waits until they are drained.
    here = [shard for shard, told in where.items() if not isinstance(told, ConnectionTimeoutError)]
    drained = answers({shard: actors[shard].drain.remote() for shard in here}, max(0.0, until - time.monotonic()))
    for shard, error in (where | drained).items():
        if isinstance(error, ThresherError):
            _logger.warning(
                "shard %d is ended without a checkpoint; what it has told is in its journal, where it keeps one: %s",
                shard,
                error,
            )


def _kill(actors: Mapping[int, Any]) -> None:
    for shard, actor in actors.items():
        try:
            ray.kill(actor, no_restart=True)
        except (RayError, ValueError) as error:  # it is dead
            _logger.info("shard %d could not be killed: %s", shard, error)


def _check_nodes(config: RayConfig) -> None:
    """Refuse plain text between nodes, unless it is asked for, before anything is placed on one."""
    for node in alive_nodes():
        listen = any_port(node["NodeManagerAddress"])
        check_address(listen, insecure=config.insecure, encrypted=config.tls is not None)
