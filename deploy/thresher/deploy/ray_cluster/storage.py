"""Whether the state folder is one that shards can live in: tried out on all nodes before any shard is placed."""

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from thresher.deploy.whole_files import write_whole
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, JournalError, ThresherError
from thresher.server.journal import Journal

_CLEANING_SECONDS: Final = 5.0


def probe(folder: Path, *, deadline: float) -> None:
    """Try on every node that may get a shard whether ``folder`` can keep its state, and is the same folder on all.

    Nodes without CPUs, such as a head that only manages, are left alone: they get no shard. What the trial writes is
    removed; the folder itself stays where it had to be made.

    Args:
        folder: An absolute path.
        deadline: Seconds for all of it.

    Raises:
        ConfigurationError: when something that a shard does there fails, the nodes do not see the same folder, or a
            lock does not hold between them; it names the nodes, what was tried and what happened.
        ConnectionTimeoutError: when nodes have not answered by then; it names them.
    """
    if not folder.is_absolute():
        raise ConfigurationError(f"{folder} may be another folder on each node; write the whole path, from / on")
    until = time.monotonic() + deadline
    nodes = _candidates()
    while nodes:  # without any no shard can be placed; who tries to says so
        trial = _Trial(folder, nodes, max(0.0, until - time.monotonic()))
        try:
            trial.run()
        except _NodeLostError:
            nodes = {node: name for node, name in nodes.items() if node in _candidates()}
        else:
            return
        finally:
            trial.clean()


def _candidates() -> dict[str, str]:
    """Return the nodes that may get a shard: names for people, by id."""
    return {
        node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU")
    }


class _NodeLostError(Exception):
    """A node has left the cluster, and gets no shard: the others are to be tried without it."""


@final
class _Trial:
    """One trial of ``folder`` within ``seconds``; ``nodes`` are names for people, by id."""

    def __init__(self, folder: Path, nodes: Mapping[str, str], seconds: float) -> None:
        self._folder, self._nodes, self._seconds = folder, nodes, seconds
        self._place = folder / f".probe-{secrets.token_hex(8)}"
        self._until = time.monotonic() + seconds
        self._home = min(nodes)
        keeper = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=_only_on(self._home))
        self._keeper: Any = keeper.remote()  # types of Ray's handles name no remote methods

    def run(self) -> None:
        """Let every node work there, then look at what the others left, then ask for a lock that is taken."""
        problems = self._answers(self._calls(_work))
        self._refuse({node: problem for node, problem in problems.items() if problem})
        seen = self._answers(self._calls(_look, sorted(self._nodes)))
        self._refuse(
            {
                node: f"it sees what was written on {self._named(there)} only: the folder is not the same on all nodes"
                for node, there in seen.items()
                if len(there) < len(self._nodes)
            }
        )
        self._answers({self._home: self._keeper.lock.remote(self._place)})
        granted = self._answers(self._calls(_is_granted))
        self._refuse(
            {
                node: f"a lock was granted that a process on {self._nodes[self._home]} holds; two lives of a shard "
                "could write at once (NFS: mount it with neither nolock nor local_lock)"
                for node, is_granted in granted.items()
                if is_granted
            }
        )
        self._answers({self._home: self._keeper.unlock.remote()})

    def clean(self) -> None:
        """Remove what was written, on all nodes that answer soon."""
        ray.kill(self._keeper)
        calls = list(self._calls(_remove).values())
        _, late = ray.wait(calls, num_returns=len(calls), timeout=_CLEANING_SECONDS)
        _cancel(late)

    def _calls(self, work: Callable[..., object], *arguments: object) -> "dict[str, ray.ObjectRef[Any]]":
        task: Any = ray.remote(num_cpus=0, max_retries=0)(work)
        return {
            node: task.options(scheduling_strategy=_only_on(node)).remote(self._place, node, *arguments)
            for node in self._nodes
        }

    def _answers(self, calls: "Mapping[str, ray.ObjectRef[Any]]") -> dict[str, Any]:
        left = max(0.0, self._until - time.monotonic())
        _, late = ray.wait(list(calls.values()), num_returns=len(calls), timeout=left)
        if late:
            _cancel(late)
            missing = self._named([node for node, call in calls.items() if call in late])
            raise ConnectionTimeoutError(
                f"{missing} did not answer within {self._seconds:.3g} s when asked to try out {self._folder}; see "
                "whether the file system hangs there, or the node is overloaded, or wait for longer"
            )
        answers, failures = {}, {}
        for node, call in calls.items():
            try:
                answers[node] = ray.get(call)
            except RayError as error:  # the node died, or has not what it takes to run a shard
                failures[node] = f"the trial could not run: {str(error).strip().splitlines()[-1]}"
        if failures.keys() - _candidates().keys():
            raise _NodeLostError
        self._refuse(failures)
        return answers

    def _refuse(self, problems: Mapping[str, str]) -> None:
        if problems:
            lines = "\n  ".join(f"{self._nodes[node]}: {problem}" for node, problem in problems.items())
            raise ConfigurationError(
                f"{self._folder} cannot keep the state of shards on these nodes:\n  {lines}\nmount one folder there on "
                "all nodes, which whoever runs Ray may write to, or name another one"
            )

    def _named(self, nodes: Sequence[str]) -> str:
        return ", ".join(self._nodes[node] for node in nodes) or "no node"


def _only_on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _cancel(calls: "Sequence[ray.ObjectRef[Any]]") -> None:
    for call in calls:
        with suppress(ValueError, TypeError):  # those of an actor cannot be forced; the actor is killed
            ray.cancel(call, force=True)


# What runs on the nodes


def _work(place: Path, node: str) -> str:
    """Do what a shard does with its files; return what did not work."""
    for doing, step in _STEPS.items():
        try:
            step(place / node, node)
        except (OSError, ThresherError) as error:
            return f"{doing} failed: {error}"
    return ""


def _make(mine: Path, _: str) -> None:
    mine.mkdir(parents=True)


def _replace(mine: Path, text: str) -> None:
    write_whole(mine / "signature", "")
    write_whole(mine / "signature", text)
    found = (mine / "signature").read_text(encoding="utf-8")
    if found != text:
        raise OSError(f"{found!r} was read after {text!r} was written over it")


def _append(mine: Path, text: str) -> None:
    records = [text.encode(), text[::-1].encode()]
    with closing(Journal(mine / "journal", sync=True)) as journal:
        journal.recover()
        for record in records:
            journal.append(record)
    with closing(Journal(mine / "journal", sync=True)) as journal:
        found = list(journal.recover().records)
        journal.checkpoint(b"", {})
        journal.wait()
    if found != records:
        raise OSError(f"{found!r} was read after {records!r} were appended")


_STEPS: Final[dict[str, Callable[[Path, str], None]]] = {
    "making a folder": _make,
    "writing a file, and another one over it": _replace,
    "appending to a journal and opening it again": _append,
}


def _look(place: Path, _: str, nodes: Sequence[str]) -> list[str]:
    """Return the nodes whose work can be seen here. Names that nobody asked for before: no cache knows them absent."""
    there = []
    for node in nodes:
        with suppress(OSError):
            if (place / node / "signature").read_text(encoding="utf-8") == node:
                there.append(node)
    return there


@final
class _Keeper:
    """Holds a lock as a shard does."""

    def lock(self, place: Path) -> None:
        self._journal = Journal(place / "taken")

    def unlock(self) -> None:
        self._journal.close()


def _is_granted(place: Path, _: str) -> bool:
    try:
        Journal(place / "taken").close()
    except JournalError:
        return False
    return True


def _remove(place: Path, _: str) -> None:
    shutil.rmtree(place, ignore_errors=True)
