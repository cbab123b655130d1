"""Where shards go: a placement group that is made, waited for, described when it cannot be had, and removed."""

import math
import time
from collections.abc import Collection
from typing import Any, Final

import ray
from ray.exceptions import RaySystemError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from thresher.deploy.ray_cluster.calls import alive_nodes, taken
from thresher.deploy.ray_cluster.config import RayConfig
from thresher.protos.errors import ConfigurationError

_REMOVED: Final = "REMOVED"
_POLL_SECONDS: Final = 0.1


def reserve(config: RayConfig, *, until: float) -> PlacementGroup:
    """Reserve a bundle for each shard, bundle i for shard i, on nodes as different as can be had.

    Args:
        config: The run.
        until: Deadline on the monotonic clock; the cluster may grow until then.

    Raises:
        ConfigurationError: when it cannot be had by then; it says what was asked and what there is, and nothing is
            left reserved. When there is a group of that name in this driver's namespace.
    """
    # By this name: a group belongs to the namespace of whoever makes it, and any driver may end the run.
    try:
        group: PlacementGroup = placement_group(
            [{"CPU": config.cpus}] * config.shards,
            strategy="STRICT_SPREAD" if config.strict_spread else "SPREAD",
            name=_group_name(config.name),
            lifetime="detached",
        )
    except RaySystemError:
        if find(config.name):
            raise taken(config.name) from None
        raise
    begin = time.monotonic()
    try:
        is_ready = group.wait(max(1, math.ceil(until - begin)))
    except BaseException:
        remove_placement_group(group)
        raise
    if not is_ready:
        remove_placement_group(group)
        asked = f"{config.shards} shards with {config.cpus:g} CPU each" + (
            ", each on a node of its own" if config.strict_spread else ""
        )
        raise ConfigurationError(
            f"there is no room for {asked}, and none came free in {time.monotonic() - begin:.0f} s; there is: "
            f"{_room()}; ask for less, add nodes, or end what else runs there"
        )
    return group


def find(run: str) -> dict[str, PlacementGroup]:
    """Return the groups of a run by their ids: one, but two while two drivers begin it in the same instant."""
    return {number: PlacementGroup(ray.PlacementGroupID.from_hex(number)) for number in _groups(run)}


def nodes_of(run: str) -> dict[int, str]:
    """Return the node of each shard by its id; an empty one where it waits for a node."""
    return {shard: node for told in _groups(run).values() for shard, node in told["bundles_to_node_id"].items()}


def remove(groups: Collection[PlacementGroup], *, until: float) -> bool:
    """Give back what is reserved. Return whether it is given back by ``until``, on the monotonic clock."""
    numbers = {group.id.hex() for group in groups}
    for group in groups:
        remove_placement_group(group)
    while any(number in numbers and told["state"] != _REMOVED for number, told in _table().items()):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _group_name(run: str) -> str:
    return f"thresher-{run}"


def _groups(run: str) -> dict[str, dict[str, Any]]:
    """Return what Ray says of the groups of a run, all at one instant."""
    return {
        number: told
        for number, told in _table().items()
        if told["name"] == _group_name(run) and told["state"] != _REMOVED
    }


def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = placement_group_table()
    return table


def _room() -> str:
    nodes = [
        f"{node['Resources'].get('CPU', 0):g} CPU on {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        for node in alive_nodes()
    ]
    free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    return f"{', '.join(nodes) or 'no node'}, of which {free:g} CPU are free"
