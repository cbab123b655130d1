"""Shards as supervised actors of a Ray cluster: start a run, look at it, end it. ``connect("ray://NAME")`` finds it."""

from typing import TYPE_CHECKING, Any, Final

from thresher.deploy.ray_cluster.requirement import check_ray

if TYPE_CHECKING:
    from thresher.deploy.ray_cluster.cluster import ShardStatus, down, status, up
    from thresher.deploy.ray_cluster.config import RayConfig, TlsPaths

__all__ = ["RayConfig", "ShardStatus", "TlsPaths", "down", "status", "up"]

_HOME: Final = {
    "RayConfig": "config",
    "ShardStatus": "cluster",
    "TlsPaths": "config",
    "down": "cluster",
    "status": "cluster",
    "up": "cluster",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import what is asked for: the command line lies in this package too, and must work where Ray is not installed.

    Raises:
        ConfigurationError: when there is no Ray, or not one that this package knows.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_ray()
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
