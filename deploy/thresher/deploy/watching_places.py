"""Where the shards of a run are that somebody wants to look at: in a list of addresses, by name, or by its folder."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, final

from thresher.deploy.launch import CONFIG_FILE
from thresher.deploy.launch_config import LaunchConfig
from thresher.deploy.processes import printed_data
from thresher.deploy.results import RunResult, bytes_text, read_results
from thresher.protos.credentials import NO_CREDENTIALS, Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError
from thresher.worker.directory import Name, check_shard, name_in, variables_of

LATEST: Final = Path("runs", "latest")
"""What is looked at when nothing is named: the newest run of `thresher launch` here."""


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A run to look at.

    Attributes:
        name: For people: the folder, the name, or the addresses.
        shards: For each shard, what returns its address now, ``host:port`` or ``SCHEME://RUN/SHARD``; it raises
            ConnectionTimeoutError while there is none.
        credentials: What is shown to the shards, and trusted.
        insecure: Plain text beyond this machine is fine.
        outcome: Returns what the run came to, as one line; nothing while it goes on. None where only the shards know.
    """

    name: str
    shards: tuple[Callable[[], str], ...]
    credentials: Credentials = NO_CREDENTIALS
    insecure: bool = False
    outcome: Callable[[], str] | None = None


@final
@dataclass(frozen=True, slots=True)
class Access:
    """What the caller was given to reach shards with; the rest a named run's directory may know.

    Attributes:
        tls_ca: PEM file of the authority that signed the shards' certificates.
        tls_cert: PEM file of the certificate to show.
        tls_key: PEM file of its private key.
        token_file: File of the token to show.
        insecure: Plain text beyond this machine is fine.
    """

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    insecure: bool = False

    def credentials(self, known: Mapping[str, str]) -> Credentials:
        """Return what to show and trust; ``known`` are the ``THRESHER_*`` variables of the run."""

        def one(given: Path | None, variable: str) -> Path | None:
            return given or (Path(known[variable]) if variable in known else None)

        ca, certificate = one(self.tls_ca, "THRESHER_TLS_CA"), one(self.tls_cert, "THRESHER_TLS_CERT")
        key, token = one(self.tls_key, "THRESHER_TLS_KEY"), one(self.token_file, "THRESHER_TOKEN_FILE")
        return Credentials(TlsFiles(ca, certificate, key) if ca or certificate or key else None, token)


def find(where: str | None, access: Access, environment: Mapping[str, str] = os.environ) -> Place:
    """Find a run.

    Args:
        where: ``host:port,…``, ``SCHEME://RUN``, or the folder of a run of `thresher launch`, which need not have begun
            or may have ended; None for `LATEST`, or else what THRESHER_SHARDS says.
        access: What the shards are reached with; those of a launch need nothing.
        environment: Where THRESHER_SHARDS is looked up.

    Raises:
        ConfigurationError: when it is none of these, no such run is known, or a file of ``access`` cannot be used.
        ThresherError: as the directory of a named run raises it.
    """
    if where is None:
        where = str(LATEST) if LATEST.is_dir() else environment.get("THRESHER_SHARDS", "")
    if not where:
        raise ConfigurationError(
            f"nothing to look at: there is no {LATEST} here; name host:port,…, ray://NAME or the folder of a run, or "
            "set THRESHER_SHARDS"
        )
    if Path(where).is_dir():
        return _of_folder(Path(where))
    name = None if "," in where else name_in(where)
    if name is not None and name.shard is None:
        return _of_name(name, access)
    return _of_addresses(where, where, access, {})


def _of_addresses(title: str, listed: str, access: Access, known: Mapping[str, str]) -> Place:
    addresses = [address.strip() for address in listed.split(",") if address.strip()]
    credentials = access.credentials(known)
    insecure = access.insecure or known.get("THRESHER_INSECURE") == "1"
    for address in addresses:
        if ":" not in address:
            raise ConfigurationError(f"{address!r} is neither a folder here nor host:port nor ray://NAME; correct it")
        check_shard(address, insecure=insecure, encrypted=credentials.tls is not None)
    if not addresses:
        raise ConfigurationError(f"{listed!r} names no shard; write host:port,host:port,…")
    return Place(title, tuple(partial(str, address) for address in addresses), credentials, insecure)


def _of_name(name: Name, access: Access) -> Place:
    known = variables_of(name)
    return _of_addresses(str(name), known["THRESHER_SHARDS"], access, known)


def _of_folder(folder: Path) -> Place:
    """Find the shards of a launch by what they have printed; its ports are others when it goes on by --resume."""
    config = LaunchConfig.read(folder / CONFIG_FILE)
    stages = {name: where for name, (_, where) in config.stages(folder).items()}
    shards = tuple(partial(_address_in, folder, stages, shard) for shard in range(config.shards))
    return Place(str(folder), shards, outcome=partial(_outcome, folder, stages))


def _address_in(folder: Path, stages: Mapping[str, Path], shard: int) -> str:
    done = read_results(folder / "result.json")
    current = next((where for name, where in stages.items() if name not in done), folder)
    log = current / f"shard-{shard}.log"
    address = printed_data(log).get("address")
    if not isinstance(address, str):
        raise ConnectionTimeoutError(f"shard {shard} has not said yet where it serves; see {log} and launch.log there")
    return address


def _outcome(folder: Path, stages: Mapping[str, Path]) -> str:
    done = read_results(folder / "result.json")
    return "; ".join(_told(name, done[name]) for name in stages) if stages.keys() <= done.keys() else ""


def _told(name: str, result: RunResult) -> str:
    return (
        f"{name}: {result.steps:,} iterations in {result.seconds:,.1f} s, {bytes_text(result.push_bytes)} up, "
        f"{bytes_text(result.pull_bytes)} down, compression ratio {result.compression_ratio:,.1f}"
    )
