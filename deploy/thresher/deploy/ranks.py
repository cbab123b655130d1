"""``thresher worker``: a process that becomes whichever worker of the run nobody is, where nothing deals out ranks."""

import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, final

import typer
from rich.console import Console

from thresher.deploy.exit_codes import errors_told
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError

_PREFIX: Final = "THRESHER_"
_PAUSE_SECONDS: Final = 0.2


def worker(
    script: Annotated[list[str], typer.Argument(help="The training script and its arguments.")],
) -> None:
    """Run SCRIPT as a worker of whichever rank is free, with the settings in the environment.

    Ranks are locks in THRESHER_STATE_DIR, which all workers of the run share. A lock is held for as long as the process
    lives, so one that was killed and started again finds its rank, or that of another one that was, and the memory that
    belongs to it. In the values of THRESHER_ variables {rank} stands for the rank.
    """
    with errors_told(Console(stderr=True)):
        seat = take_rank(os.environ)
        if seat is None:
            typer.echo("all workers whose rank is free have left the run: nothing is left to do", err=True)
            return
        typer.echo(json.dumps({"rank": seat.rank}))
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-u", *script], seat.variables)  # noqa: S606 - no shell is wanted


@final
@dataclass(frozen=True, slots=True)
class Seat:
    """A rank that this process has.

    Attributes:
        rank: The worker's position.
        variables: Its environment.
        lock: Descriptor of the file that is locked for as long as the process, or one that it becomes, lives.
    """

    rank: int
    variables: dict[str, str]
    lock: int


def take_rank(environment: Mapping[str, str]) -> Seat | None:
    """Lock the first rank that is free, and that has something left to do.

    Args:
        environment: As `settings_from` reads it, but for THRESHER_RANK.

    Returns:
        None when there is none with something left to do, because workers have left the run.

    Raises:
        ConfigurationError: when a setting is missing or wrong, the folder cannot be used, or all ranks are taken.
        ConnectionTimeoutError: when a shard cannot be reached within THRESHER_CONNECT_TIMEOUT.
    """
    folder, workers = _settings(environment)
    somebody_left = False
    for rank in range(workers):
        lock = _locked(folder / f"rank-{rank}.lock")
        if lock is None:
            continue
        variables = _variables(environment, rank)
        try:
            left = has_left(variables)
        except BaseException:
            os.close(lock)
            raise
        if not left:
            os.set_inheritable(lock, True)  # noqa: FBT003 - its only parameter
            return Seat(rank, variables, lock)
        somebody_left = True
        os.close(lock)
    if somebody_left:
        return None
    raise ConfigurationError(
        f"all {workers} ranks in {folder} are taken; start no more workers than THRESHER_WORKERS, or set it to more"
    )


def has_left(variables: Mapping[str, str]) -> bool:
    """Return True when a worker has said goodbye to all shards: nothing is left for it to do.

    Args:
        variables: As `settings_from` reads them.

    Raises:
        ConfigurationError: when a setting is missing or wrong.
        ConnectionTimeoutError: when a shard cannot be reached within THRESHER_CONNECT_TIMEOUT.
    """
    # These take torch, and `--help` none.
    from thresher.worker.calls import ShardCalls  # noqa: PLC0415
    from thresher.worker.directory import check_shard  # noqa: PLC0415
    from thresher.worker.settings import settings_from  # noqa: PLC0415

    settings = settings_from(variables)
    deadline = time.monotonic() + settings.connect_timeout
    for shard, address in enumerate(settings.addresses):
        check_shard(address, insecure=settings.insecure, encrypted=settings.credentials.tls is not None)
        who = f"worker {settings.rank}"
        calls = ShardCalls(shard, address, who, settings.credentials, insecure=settings.insecure)
        try:
            if _state(calls, settings.rank, deadline) != "left":
                return False
        finally:
            calls.close()
    return True


def _state(calls: Any, rank: int, deadline: float) -> str:  # noqa: ANN401 - ShardCalls, which takes torch
    from thresher.worker.calls import ShardLostError  # noqa: PLC0415

    while True:
        calls.wait_ready(deadline)
        try:
            told = calls.statistics(timeout=max(_PAUSE_SECONDS, deadline - time.monotonic()))
        except (ShardLostError, ConnectionTimeoutError) as error:  # it was killed just now
            if isinstance(error, ConnectionTimeoutError) and time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return next((seen.state for seen in told.workers if seen.rank == rank), "")


def _settings(environment: Mapping[str, str]) -> tuple[Path, int]:
    if "THRESHER_RANK" in environment:
        raise ConfigurationError("THRESHER_RANK is set: unset it to be given a rank, or run the script itself with it")
    if "THRESHER_STATE_DIR" not in environment:
        raise ConfigurationError(
            "THRESHER_STATE_DIR is not set: ranks are locks in it; name a folder that all workers of the run share"
        )
    text = environment.get("THRESHER_WORKERS", "")
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigurationError(f"THRESHER_WORKERS must be the number of workers, 1 or more, not {text!r}")
    folder = Path(environment["THRESHER_STATE_DIR"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be made: {error.strerror}; name another THRESHER_STATE_DIR"
        ) from None
    return folder, int(text)


def _locked(path: Path) -> int | None:
    """Return the descriptor of a file that this process has locked; None where another one has."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be opened: {error.strerror}; mend THRESHER_STATE_DIR") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _variables(environment: Mapping[str, str], rank: int) -> dict[str, str]:
    told = {
        name: value.replace("{rank}", str(rank)) if name.startswith(_PREFIX) else value
        for name, value in environment.items()
    }
    return {**told, "THRESHER_RANK": str(rank)}
