"""Ray's own ways to hand bytes to another process, for ``thresher bench transport``; no gradient goes through them.

Bytes are numpy arrays to Ray: those it writes into its object store as they are, and maps where they are read.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from thresher.deploy.ray_cluster.local import local_cluster

_STORE_BYTES: Final = 1_000_000_000
_SECONDS: Final = 600.0
_ELSEWHERE: Final = "elsewhere"

Bytes = npt.NDArray[np.uint8]


@contextmanager
def ray_calls() -> Iterator[Mapping[str, Callable[[bytes], Callable[[], int]]]]:
    """Start a Ray of our own, with a second node on this machine and an actor of each kind, and end it.

    Returns:
        By name, what makes an exchange of some bytes: a call that hands them to an actor and returns how many it has.
    """
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": _STORE_BYTES}
    with local_cluster(**node) as cluster:
        cluster.add_node(**node, resources={_ELSEWHERE: 1})
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        plain = ray.remote(_Actor).options(num_cpus=0, scheduling_strategy=here).remote()
        on_loop = ray.remote(_AsyncActor).options(num_cpus=0, scheduling_strategy=here).remote()
        remote = ray.remote(_Actor).options(num_cpus=0, resources={_ELSEWHERE: 1}).remote()
        yield {
            "Ray actor call": _calls(plain),
            "Ray async actor call": _calls(on_loop),
            "Ray put, actor gets": _puts(plain),
            "Ray actor call to another node": _calls(remote),
            "Ray put, actor on another node gets": _puts(remote),
        }


def _calls(actor: Any) -> Callable[[bytes], Callable[[], int]]:  # noqa: ANN401 - Ray's handles have no type
    return lambda data: partial(_call, actor, np.frombuffer(data, np.uint8))


def _puts(actor: Any) -> Callable[[bytes], Callable[[], int]]:  # noqa: ANN401
    return lambda data: partial(_put, actor, np.frombuffer(data, np.uint8))


def _call(actor: Any, data: Bytes) -> int:  # noqa: ANN401 - Ray's handles have no type
    return int(ray.get(actor.take.remote(data), timeout=_SECONDS))


def _put(actor: Any, data: Bytes) -> int:  # noqa: ANN401
    return int(ray.get(actor.fetch.remote([ray.put(data)]), timeout=_SECONDS))  # in a list, a reference stays one


@final
class _Actor:
    def take(self, data: Bytes) -> int:
        return len(data)

    def fetch(self, references: "list[ray.ObjectRef[Bytes]]") -> int:
        return len(ray.get(references[0]))


@final
class _AsyncActor:
    async def take(self, data: Bytes) -> int:
        return len(data)
