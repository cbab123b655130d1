"""``connect("ray://NAME")``: a worker finds the shards of its run by name, and again after they moved."""

import sys
import time
from typing import Any, Final, final

from thresher.deploy.ray_cluster.requirement import check_ray

check_ray()  # before Ray is imported below: an entry point leads here, and the message must be a clear one

import ray  # noqa: E402

from thresher.deploy.ray_cluster.calls import actor_of, actors_of, answers, attach, own_ip  # noqa: E402
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, ThresherError  # noqa: E402
from thresher.protos.timeouts import CONNECT_SECONDS  # noqa: E402
from thresher.protos.transport import any_port  # noqa: E402

_ANSWER_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.5
_TRAIN: Final = "ray.train"


@final
class RayDirectory:
    """Asks the actors of a run: the `thresher.worker.directory.Directory` of the scheme ``ray``."""

    def variables(self, run: str) -> dict[str, str]:
        """Return what this worker is told: by the run, by its node, and inside Ray Train by its group.

        A lost node may take shards and workers alike, so shards that are being started again are waited for.

        Raises:
            ConfigurationError: when there is no cluster, or no such run on it.
            ConnectionTimeoutError: when no shard of it has answered in a minute.
        """
        attach()
        until = time.monotonic() + CONNECT_SECONDS
        while (told := _of_any_shard(run)) is None:
            if time.monotonic() > until:
                raise ConnectionTimeoutError(
                    f"no shard of the run {run} has answered in {CONNECT_SECONDS:g} s; `thresher ray status {run}` "
                    "says what is known of them"
                )
            time.sleep(_PAUSE_SECONDS)
        return {**told, "THRESHER_METRICS": any_port(own_ip()), **_place_in_train()}

    def locate(self, run: str, shard: int) -> str:
        """Return ``host:port`` of where a shard is now.

        Raises:
            ConnectionTimeoutError: when it does not answer: Ray may be starting it again.
            ThresherError: when it will not: there is none, or it says why it cannot serve.
        """
        attach()
        told = answers({shard: actor_of(run, shard).where.remote()}, _ANSWER_SECONDS)[shard]
        if isinstance(told, ThresherError):
            raise told
        address: str = told.address
        return address


def _of_any_shard(run: str) -> dict[str, Any] | None:
    """Return the run's variables from whichever shard answers first, for all say the same; None when none does soon."""
    calls: dict[int, Any] = {shard: actor.variables.remote() for shard, actor in actors_of(run).items()}
    if not calls:
        raise ConfigurationError(f"there is no run {run} on this cluster; start it first: thresher ray up {run}")
    ray.wait(list(calls.values()), num_returns=1, timeout=_ANSWER_SECONDS)
    told = answers(calls, 0.0).values()
    return next((variables for variables in told if not isinstance(variables, ThresherError)), None)


def _place_in_train() -> dict[str, str]:
    """Return rank and number of workers where this is a worker of Ray Train, which is imported there already."""
    if _TRAIN not in sys.modules:
        return {}
    from ray import train  # noqa: PLC0415 - it takes seconds to import, and only its own workers need it

    try:
        context = train.get_context()
        rank, workers = context.get_world_rank(), context.get_world_size()
    except RuntimeError:  # a script that is no worker of it
        return {}
    return {"THRESHER_RANK": str(rank), "THRESHER_WORKERS": str(workers)}
