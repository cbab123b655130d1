"""What a worker is told about its run, and the only place that reads it from the environment."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar, final

from thresher.protos.errors import ConfigurationError
from thresher.worker.method import Method

Value = TypeVar("Value", int, float, str)

_PREFIX: Final = "THRESHER_"
_EVERYTHING: Final = Method(threshold=0.0)
_KINDS: Final = {
    "threshold": float, "density": float, "precision": float, "budget": int, "steps": int, "period": int,
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """How one worker takes part.

    Attributes:
        addresses: ``host:port`` of each shard, in the order of the shards.
        rank: This worker's position, 0 … workers - 1.
        workers: Number of workers.
        seed: Keys data order and randomness, together with rank and step.
        method: What is sent.
        connect_timeout: Seconds to wait for the shards to come up.
        threshold_factor: This worker's factor on the run's λ: above 1 where its uplink is slow.
        metrics_listen: ``host:port`` of the Prometheus endpoint; port 0 takes a free one, None serves none.
        insecure: Plain text beyond this machine is fine.
    """

    addresses: tuple[str, ...]
    rank: int
    workers: int
    seed: int = 0
    method: Method = _EVERYTHING
    connect_timeout: float = 60.0
    threshold_factor: float = 1.0
    metrics_listen: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Check before anything is sent."""
        if not self.addresses:
            raise ConfigurationError("no shard is named; set THRESHER_SHARDS to host:port,host:port,…")
        if not 0 <= self.rank < self.workers:
            raise ConfigurationError(f"rank {self.rank} is not one of 0 … {self.workers - 1}")
        if not (math.isfinite(self.connect_timeout) and self.connect_timeout >= 0):
            raise ConfigurationError(f"connect timeout must be finite seconds >= 0, not {self.connect_timeout}")
        if not (math.isfinite(self.threshold_factor) and self.threshold_factor > 0):
            raise ConfigurationError(f"threshold factor must be a finite number > 0, not {self.threshold_factor}")

    def environment(self) -> dict[str, str]:
        """Return the variables that `settings_from` reads: how a launcher tells a worker."""
        values: dict[str, Any] = {
            "SHARDS": ",".join(self.addresses),
            "RANK": self.rank,
            "WORKERS": self.workers,
            "SEED": self.seed,
            "CONNECT_TIMEOUT": self.connect_timeout,
            "THRESHOLD_FACTOR": self.threshold_factor,
            "METRICS": self.metrics_listen,
            "INSECURE": self.insecure,
            **{field.name.upper(): getattr(self.method, field.name) for field in fields(Method)},
        }
        return {
            _PREFIX + name: str(int(value)) if isinstance(value, bool) else str(value)
            for name, value in values.items()
            if value is not None
        }


def settings_from(environment: Mapping[str, str] = os.environ, *, addresses: str | None = None) -> Settings:
    """Read the settings from ``THRESHER_*`` variables; ``addresses`` go before ``THRESHER_SHARDS``.

    Raises:
        ConfigurationError: when one is missing or cannot be read; the message names it.
    """
    found = {name.removeprefix(_PREFIX): value for name, value in environment.items() if name.startswith(_PREFIX)}
    if addresses is not None:
        found["SHARDS"] = addresses
    if "SHARDS" not in found:
        raise ConfigurationError(
            "this script connects to a parameter server, and none is named: start it with "
            "`thresher launch script.py`, or set THRESHER_SHARDS, THRESHER_RANK and THRESHER_WORKERS"
        )
    method: dict[str, Any] = {
        field.name: _read(found, field.name.upper(), _KINDS.get(field.name, str))
        for field in fields(Method)
        if field.name.upper() in found
    }
    if not method.keys() & {"compressor", "threshold", "density", "budget", "precision"}:
        method["threshold"] = 0.0
    factor = _read(found, "THRESHOLD_FACTOR", float)
    timeout = _read(found, "CONNECT_TIMEOUT", float)
    return Settings(
        addresses=tuple(address for address in found["SHARDS"].split(",") if address),
        rank=_required(found, "RANK"),
        workers=_required(found, "WORKERS"),
        seed=_read(found, "SEED", int) or 0,
        method=Method(**method),
        connect_timeout=60.0 if timeout is None else timeout,
        threshold_factor=1.0 if factor is None else factor,
        metrics_listen=found.get("METRICS"),
        insecure=_flag(found, "INSECURE"),
    )


def _required(found: Mapping[str, str], name: str) -> int:
    value = _read(found, name, int)
    if value is None:
        raise ConfigurationError(f"{_PREFIX}{name} is not set")
    return value


def _read(found: Mapping[str, str], name: str, kind: type[Value]) -> Value | None:
    if name not in found:
        return None
    try:
        return kind(found[name])
    except ValueError:
        raise ConfigurationError(f"{_PREFIX}{name} must be of type {kind.__name__}, not {found[name]!r}") from None


def _flag(found: Mapping[str, str], name: str) -> bool:
    value = found.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigurationError(f"{_PREFIX}{name} must be 0 or 1, not {value!r}")
    return value == "1"
