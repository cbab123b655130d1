"""Worker processes that wait for something to do together: to start them takes seconds, a process group hardly any."""

import faulthandler
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore  # which torch.distributed re-exports

T = TypeVar("T")

DEADLINE = 90.0  # seconds for all workers to answer; gloo itself gives up a little earlier, and says for whom it waits
PATIENCE = timedelta(seconds=60)


class Ranks:
    """Processes of ranks 0 … workers - 1, each with one thread for arithmetic."""

    def __init__(self, workers: int) -> None:
        self._started = [_start() for _ in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process, connection in self._started:
            process.kill()  # it waits for work, or for what never comes
            process.join()
            connection.close()

    def outcomes(self, work: Callable[..., T], *arguments: Any, workers: int | None = None) -> list[T | BaseException]:
        """Call ``work`` on each rank in a new gloo group; return what each returned or raised, by rank.

        What a process sends that ends without an answer is an EOFError; the next call has another one in its place.
        """
        self._started = [one if one[0].is_alive() else _start() for one in self._started]
        taking_part = [connection for _, connection in self._started[:workers]]
        with tempfile.TemporaryDirectory() as folder:
            for rank, connection in enumerate(taking_part):
                # Pickled here: torch teaches `send` to hand tensors over in shared memory, which outlives no process.
                connection.send_bytes(pickle.dumps((work, arguments, rank, len(taking_part), f"{folder}/store")))
            until = time.monotonic() + DEADLINE
            return [_answer(rank, connection, until) for rank, connection in enumerate(taking_part)]

    def run(self, work: Callable[..., T], *arguments: Any, workers: int | None = None) -> list[T]:
        """As `outcomes`, but raise what the first rank raised that did."""
        results = []
        for outcome in self.outcomes(work, *arguments, workers=workers):
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results


def _start() -> tuple[ForkServerProcess, Connection]:
    context = multiprocessing.get_context("forkserver")  # which imports once, has no threads, and is forked from
    context.set_forkserver_preload(["numba", "thresher.ddp"])
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def _answer(rank: int, connection: Connection, until: float) -> Any:
    if not connection.poll(max(0.0, until - time.monotonic())):
        raise AssertionError(f"worker {rank} has not answered within {DEADLINE} s: it hangs")
    try:
        return pickle.loads(connection.recv_bytes())  # noqa: S301 - of a process started here
    except EOFError as error:
        return error


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            work, arguments, rank, workers, path = pickle.loads(connection.recv_bytes())  # noqa: S301 - of the process that started this one
        except (EOFError, ConnectionError):
            return
        faulthandler.dump_traceback_later(DEADLINE - 5)
        store = FileStore(path, workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=PATIENCE)
        try:
            outcome = work(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            outcome = error
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(outcome))
