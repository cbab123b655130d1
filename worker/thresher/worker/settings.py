"""What a worker is told about its run, and the only place that reads it from the environment."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar, final

from thresher.protos.consistency import Consistency
from thresher.protos.credentials import NO_CREDENTIALS, Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import CONNECT_SECONDS, RECONNECT_SECONDS, check_timeouts
from thresher.worker.directory import name_in, variables_of
from thresher.worker.method import Method

Value = TypeVar("Value", int, float, str)

_PREFIX: Final = "THRESHER_"
_EVERYTHING: Final = Method(threshold=0.0)
_SYNC: Final = Consistency()
_CONSISTENCY: Final = {
    "mode": str, "quorum": int, "grace": float, "staleness": int, "max_staleness": int, "downlink": str,
    "shadow_threshold": float, "momentum_per_push": bool, "staleness_aware": bool,
}  # fmt: skip
_KINDS: Final = {
    "threshold": float, "density": float, "precision": float, "budget": int, "steps": int, "period": int,
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """How one worker takes part.

    Attributes:
        addresses: ``host:port`` of each shard, or ``SCHEME://RUN/SHARD``, which a directory finds (see `Directory`); in
            the order of the shards.
        rank: This worker's position, 0 … workers - 1.
        workers: Number of workers.
        seed: Keys data order and randomness, together with rank and step.
        method: What is sent.
        consistency: When rounds close.
        state_dir: Folder of the file in which this worker's state survives the worker; None keeps it in memory only.
        state_sync: That file is synced with each step, and so survives the machine.
        state_is_local: Other machines have another ``state_dir``, so that what is there may be older than what the
            shards know of this worker.
        connect_timeout: Seconds to wait for the shards to come up.
        reconnect_timeout: Seconds to look for a shard that was lost; no less than the shards' lease.
        threshold_factor: This worker's factor on the run's λ: above 1 where its uplink is slow.
        metrics_listen: ``host:port`` of the Prometheus endpoint; port 0 takes a free one, None serves none.
        rows: File of a line per step (see `WorkerRow`); None writes none.
        insecure: Plain text beyond this machine is fine.
        credentials: What is shown to the shards, and trusted.
    """

    addresses: tuple[str, ...]
    rank: int
    workers: int
    seed: int = 0
    method: Method = _EVERYTHING
    consistency: Consistency = _SYNC
    state_dir: Path | None = None
    state_sync: bool = False
    state_is_local: bool = False
    connect_timeout: float = CONNECT_SECONDS
    reconnect_timeout: float = RECONNECT_SECONDS
    threshold_factor: float = 1.0
    metrics_listen: str | None = None
    rows: Path | None = None
    insecure: bool = False
    credentials: Credentials = NO_CREDENTIALS

    def __post_init__(self) -> None:
        """Check before anything is sent."""
        if not self.addresses:
            raise ConfigurationError("no shard is named; set THRESHER_SHARDS to host:port,host:port,…")
        if not 0 <= self.rank < self.workers:
            raise ConfigurationError(f"rank {self.rank} is not one of 0 … {self.workers - 1}")
        check_timeouts(connect_timeout=self.connect_timeout, reconnect_timeout=self.reconnect_timeout)
        if not (math.isfinite(self.threshold_factor) and self.threshold_factor > 0):
            raise ConfigurationError(f"threshold factor must be a finite number > 0, not {self.threshold_factor}")
        if self.method.budget is not None and not self.consistency.lockstep:
            raise ConfigurationError(
                "a budget in bytes counts rounds in which all members push, not those of "
                f"{self.consistency.describe()}; give a density or a threshold"
            )
        if self.consistency.momentum_per_push and self.method.placement == "update" and not self.method.outer:
            raise ConfigurationError(
                "momentum_per_push is about the shards' optimizer, and with placement 'update' there is none without "
                "an outer one; each worker's own momentum decays with its own steps anyway"
            )

    def environment(self) -> dict[str, str]:
        """Return the variables that `settings_from` reads: how a launcher tells a worker."""
        tls = self.credentials.tls
        values: dict[str, Any] = {
            "SHARDS": ",".join(self.addresses),
            "RANK": self.rank,
            "WORKERS": self.workers,
            "SEED": self.seed,
            "CONNECT_TIMEOUT": self.connect_timeout,
            "RECONNECT_TIMEOUT": self.reconnect_timeout,
            "STATE_DIR": self.state_dir,
            "STATE_SYNC": self.state_sync,
            "STATE_IS_LOCAL": self.state_is_local,
            **{name.upper(): getattr(self.consistency, name) for name in _CONSISTENCY},
            "THRESHOLD_FACTOR": self.threshold_factor,
            "METRICS": self.metrics_listen,
            "ROWS": self.rows,
            "INSECURE": self.insecure,
            "TLS_CA": tls and tls.ca,
            "TLS_CERT": tls and tls.certificate,
            "TLS_KEY": tls and tls.key,
            "TOKEN_FILE": self.credentials.token_file,
            **{field.name.upper(): getattr(self.method, field.name) for field in fields(Method)},
        }
        return {
            _PREFIX + name: str(int(value)) if isinstance(value, bool) else str(value)
            for name, value in values.items()
            if value is not None
        }


def settings_from(environment: Mapping[str, str] = os.environ, *, addresses: str | None = None) -> Settings:
    """Read the settings from ``THRESHER_*`` variables; ``addresses`` go before ``THRESHER_SHARDS``.

    Where these are ``SCHEME://RUN``, the run's directory has the variables. Those that are set here go before them, but
    for the shards, of which only the directory knows.

    Raises:
        ConfigurationError: when one is missing or cannot be read; the message names it.
        ThresherError: as the directory of a named run raises it.
    """
    found = _ours(environment)
    if addresses is not None:
        found["SHARDS"] = addresses
    if "SHARDS" not in found:
        raise ConfigurationError(
            "this script connects to a parameter server, and none is named: start it with `thresher launch script.py`, "
            "name a run (connect('ray://NAME')), or set THRESHER_SHARDS, THRESHER_RANK and THRESHER_WORKERS"
        )
    found = _with_those_of_the_run(found)
    method: dict[str, Any] = {
        field.name: _read(found, field.name.upper(), _KINDS.get(field.name, str))
        for field in fields(Method)
        if field.name.upper() in found
    }
    if not method.keys() & {"compressor", "threshold", "density", "budget", "precision"}:
        method["threshold"] = 0.0
    consistency: dict[str, Any] = {
        name: _flag(found, name.upper()) if kind is bool else _read(found, name.upper(), kind)
        for name, kind in _CONSISTENCY.items()
        if name.upper() in found
    }
    factor = _read(found, "THRESHOLD_FACTOR", float)
    timeout, patience = _read(found, "CONNECT_TIMEOUT", float), _read(found, "RECONNECT_TIMEOUT", float)
    return Settings(
        addresses=tuple(address for address in found["SHARDS"].split(",") if address),
        rank=_required(found, "RANK"),
        workers=_required(found, "WORKERS"),
        seed=_read(found, "SEED", int) or 0,
        method=Method(**method),
        consistency=Consistency(**consistency),
        state_dir=Path(found["STATE_DIR"]) if "STATE_DIR" in found else None,
        state_sync=_flag(found, "STATE_SYNC"),
        state_is_local=_flag(found, "STATE_IS_LOCAL"),
        connect_timeout=CONNECT_SECONDS if timeout is None else timeout,
        reconnect_timeout=RECONNECT_SECONDS if patience is None else patience,
        threshold_factor=1.0 if factor is None else factor,
        metrics_listen=found.get("METRICS"),
        rows=Path(found["ROWS"]) if "ROWS" in found else None,
        insecure=_flag(found, "INSECURE"),
        credentials=_credentials(found),
    )


def _ours(variables: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(_PREFIX): value for name, value in variables.items() if name.startswith(_PREFIX)}


def _with_those_of_the_run(found: dict[str, str]) -> dict[str, str]:
    """Add what the directory says of a run that is named as a whole."""
    if "," in found["SHARDS"]:
        return found
    name = name_in(found["SHARDS"])
    if name is None or name.shard is not None:
        return found
    of_the_run = _ours(variables_of(name))
    return {**of_the_run, **found, "SHARDS": of_the_run["SHARDS"]}


def _credentials(found: Mapping[str, str]) -> Credentials:
    ca, certificate, key, token = (
        Path(found[name]) if name in found else None for name in ("TLS_CA", "TLS_CERT", "TLS_KEY", "TOKEN_FILE")
    )
    return Credentials(TlsFiles(ca, certificate, key) if ca or certificate or key else None, token)


def _required(found: Mapping[str, str], name: str) -> int:
    value = _read(found, name, int)
    if value is None:
        raise ConfigurationError(
            f"{_PREFIX}{name} is not set: a launcher and Ray Train say it; in processes, actors or tasks of your own "
            f"set {_PREFIX}RANK and {_PREFIX}WORKERS in each worker before connect"
        )
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
