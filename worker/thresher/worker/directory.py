"""Shards that are found by name: `SCHEME://RUN/SHARD` instead of ``host:port``, and who knows where they are."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol, TypeVar, final

from thresher.protos.errors import ConfigurationError, ProtocolError, ThresherError
from thresher.protos.transport import check_address

T = TypeVar("T")

GROUP: Final = "thresher.directories"
"""The group of entry points in which a package names its directories, each by its scheme."""

_RUN: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
_NAME: Final = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<run>[^/]*)(/(?P<shard>[0-9]{1,9}))?")


class Directory(Protocol):
    """Knows runs by name, and where their shards are at the moment. Called from several threads.

    A package offers one as an entry point of the group `thresher.directories`, whose name is the scheme and whose
    object returns a directory when it is called without arguments. `locate` answers within
    seconds, `variables` within a minute, or they raise.
    """

    def variables(self, run: str) -> Mapping[str, str]:
        """Return the ``THRESHER_*`` variables of this worker in a run, ``THRESHER_SHARDS`` among them.

        Raises:
            ThresherError: when there is no such run, or it cannot be asked.
        """
        ...

    def locate(self, run: str, shard: int) -> str:
        """Return ``host:port`` of where a shard is now.

        Raises:
            ConnectionTimeoutError: when it cannot be said at the moment; it will be asked again.
            ThresherError: when it will never be; the worker ends with it.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Name:
    """A run, or one of its shards, as a directory knows it.

    Attributes:
        scheme: Of the directory.
        run: The run's name.
        shard: Position of the shard; None for the run.
    """

    scheme: str
    run: str
    shard: int | None = None

    def __str__(self) -> str:
        """As it is written: ``ray://digits/1``."""
        return f"{self.scheme}://{self.run}" + ("" if self.shard is None else f"/{self.shard}")


def check_run(run: str) -> None:
    """Refuse what is no name of a run.

    Raises:
        ConfigurationError: when it is not 1 to 100 letters, digits, dashes, underscores and dots.
    """
    if not _RUN.fullmatch(run):
        raise ConfigurationError(
            f"{run!r} is no name of a run; take letters without accents, digits, '-', '_' and '.', at most 100 of them"
        )


def name_in(address: str) -> Name | None:
    """Return the name that an address is; None for ``host:port``.

    Raises:
        ConfigurationError: when it has ``://``, and is no name.

    >>> name_in("ray://digits/1")
    Name(scheme='ray', run='digits', shard=1)
    >>> name_in("127.0.0.1:5000") is None
    True
    """
    if "://" not in address:
        return None
    found = _NAME.fullmatch(address)
    if found is None:
        raise ConfigurationError(
            f"{address!r} is neither host:port nor a name; write SCHEME://RUN for a run and SCHEME://RUN/SHARD for a "
            "shard of it, such as ray://digits/0"
        )
    check_run(found["run"])
    return Name(found["scheme"], found["run"], None if found["shard"] is None else int(found["shard"]))


def check_shard(address: str, *, insecure: bool, encrypted: bool) -> None:
    """Refuse what is no address of a shard, and plain text that would leave the machine, as far as it is known here.

    Where a name leads is checked each time it is looked up.

    Raises:
        ConfigurationError: it says which, and what to write instead.
    """
    name = name_in(address)
    if name is None:
        check_address(address, insecure=insecure, encrypted=encrypted)
    elif name.shard is None:
        raise ConfigurationError(
            f"{name} names a run, and no shard of it; give it alone, to `connect` or as THRESHER_SHARDS, and its "
            f"shards are looked up; one of them is {name}/0"
        )


def locate(address: str) -> str:
    """Return ``host:port`` of where a shard is now; a ``host:port`` is that already.

    Args:
        address: ``host:port`` or ``SCHEME://RUN/SHARD``.

    Raises:
        ConnectionTimeoutError: when its directory cannot say so at the moment.
        ThresherError: as the directory raises it, where another attempt would not help.
        ConfigurationError: when the address is no shard's, or there is no such directory.
        ProtocolError: when the directory fails.
    """
    name = name_in(address)
    if name is None:
        return address
    scheme, run, shard = name.scheme, name.run, name.shard
    if shard is None:
        raise ConfigurationError(f"{name} names a run, and no shard of it; write {name}/0 for its first")
    return _asked(name, lambda: _directory(scheme).locate(run, shard))


def variables_of(name: Name) -> Mapping[str, str]:
    """Return the ``THRESHER_*`` variables of this worker in a run.

    Raises:
        ThresherError: as the directory raises it.
        ConfigurationError: when there is no such directory.
        ProtocolError: when the directory fails, or does not name the shards.
    """
    found = _asked(name, lambda: _directory(name.scheme).variables(name.run))
    if not found.get("THRESHER_SHARDS"):
        raise ProtocolError(f"the directory of {name} does not name its shards: THRESHER_SHARDS is missing or empty")
    return found


def _asked(name: Name, question: Callable[[], T]) -> T:
    """Return a directory's answer; what it raises on purpose goes on, anything else is a fault of it."""
    try:
        return question()
    except ThresherError:
        raise
    except Exception as error:
        raise ProtocolError(f"the directory of {name} has failed: {type(error).__name__}: {error}") from error


@cache  # to look through what is installed takes a while, and a directory may hold connections
def _directory(scheme: str) -> Directory:
    found = entry_points(group=GROUP, name=scheme)
    if not found:
        known = ", ".join(f"{name}://" for name in sorted(entry_points(group=GROUP).names)) or "none"
        raise ConfigurationError(
            f"nothing that is installed knows addresses of {scheme}://; known: {known}. Correct the address, or "
            "install the package that does"
        )
    return _loaded(next(iter(found)))  # the first, as with modules of one name


def _loaded(point: EntryPoint) -> Directory:
    try:
        made: Directory = point.load()()
    except ModuleNotFoundError as error:
        remedy = "pip install 'thresher[ray]'" if point.name == "ray" else f"install {error.name}"
        raise ConfigurationError(f"{point.name}:// cannot be used here: {error}; {remedy}") from error
    return made
