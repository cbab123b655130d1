"""``thresher replay``: a run's journals read again, for the model at any version they reach, and to verify them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from thresher.deploy.results import model_tensors
from thresher.protos.errors import ConfigurationError, DataLossError, OptimizerError, ProtocolError
from thresher.server.checkpoints import Checkpoint
from thresher.server.facts import record_from_bytes
from thresher.server.history import History, generations_of, read_history
from thresher.server.state import RunState
from thresher.v1 import records_pb2 as disk

Span = tuple[int, int]
"""First and last of versions without a gap."""


@final
@dataclass(frozen=True, slots=True)
class Verified:
    """What was found right at one shard.

    Attributes:
        shard: Position of the shard.
        first: Version of the oldest checkpoint, at which the replay began.
        last: Version at which the log ends.
        records: How many were replayed.
        checkpoints: Versions of the checkpoints to which the replay came, bit for bit.
        begun: Versions of those at which it began anew: the first, and where a worker had refilled the shard.
    """

    shard: int
    first: int
    last: int
    records: int
    checkpoints: tuple[int, ...]
    begun: tuple[int, ...]


@final
class ShardReplay:
    """One shard's journal, read without its lock and without changing anything.

    Args:
        shard: Position of the shard.
        folder: Of its journal.

    Raises:
        JournalError: when the folder cannot be read.
    """

    def __init__(self, shard: int, folder: Path) -> None:
        """Look at the folder."""
        self.shard = shard
        self._where = f"shard {shard} ({folder})"
        self._history: History = read_history(folder)
        self._generations = range(
            self._history.generations[0] if self._history.generations else 0,
            max(generations_of(folder, "log"), default=-1) + 1,
        )

    def reaches(self) -> dict[int, range]:
        """Return the versions that can be made again from each checkpoint and the records behind it.

        Raises:
            DataLossError: when records are damaged; a damaged checkpoint only shortens what can be made again.
        """
        reach: dict[int, range] = {}
        begin = None
        for generation in self._generations:
            checkpoint = self._readable(generation)
            if checkpoint is not None:
                begin, version = generation, RunState.restored(checkpoint.table, checkpoint.tensors).version
                reach[begin] = range(version, version + 1)
            closed = sum(disk.Record.FromString(data).HasField("closed") for data in self._records(generation))
            if begin is not None:
                reach[begin] = range(reach[begin].start, reach[begin].stop + closed)
        return reach

    def state_at(self, version: int) -> RunState:
        """Return what the shard knew at a version.

        Raises:
            DataLossError: when it cannot be made again.
        """
        reach = self.reaches()
        begin = next((generation for generation in reversed(reach) if version in reach[generation]), None)
        if begin is None:
            raise DataLossError(f"{self._where} cannot go back to version {version}; its journal does not reach it")
        state = _restored(self._history.checkpoint(begin))
        for generation in range(begin, self._generations.stop):
            for data in self._records(generation):
                if state.version == version:
                    return state
                self._fold(state, data)
        return state

    def verify(self) -> Verified:
        """Replay everything, and compare with every checkpoint on the way.

        Raises:
            DataLossError: at the first difference or damage.
        """
        state: RunState | None = None
        begun: list[int] = []
        compared: list[int] = []
        records = 0
        for generation in self._generations:
            if generation in self._history.generations:
                checkpoint = self._history.checkpoint(generation)
                restored = _restored(checkpoint)
                refilled = restored.newest is None and restored.version > 0  # by a worker's replica, not by the log
                if state is None or refilled:
                    state = restored
                    begun.append(state.version)
                else:
                    self._compare(state, restored, checkpoint)
                    compared.append(state.version)
            for data in self._records(generation):
                records += 1
                if state is not None:  # before the seed there is nothing to be changed
                    self._fold(state, data)
        if state is None:
            raise DataLossError(f"{self._where} holds no checkpoint: the run never had a model, or it was removed")
        return Verified(self.shard, begun[0], state.version, records, tuple(compared), tuple(begun))

    def _readable(self, generation: int) -> Checkpoint | None:
        if generation not in self._history.generations:
            return None
        try:
            return self._history.checkpoint(generation)
        except DataLossError:
            return None

    def _records(self, generation: int) -> Iterator[bytes]:
        found = takewhile(lambda one: one[0] == generation, self._history.records(generation))
        return (data for _, data in found)

    def _fold(self, state: RunState, data: bytes) -> None:
        try:
            state.fold(record_from_bytes(data, state.piece))
        except (OptimizerError, ProtocolError) as error:
            raise DataLossError(
                f"{self._where}: a record after version {state.version} does not follow: {error}"
            ) from error

    def _compare(self, state: RunState, restored: RunState, checkpoint: Checkpoint) -> None:
        where = f"{self._where}, checkpoint {checkpoint.generation} of version {restored.version}"
        if (restored.version, restored.digest) != (state.version, state.digest):
            raise DataLossError(f"{where}: the log leads to version {state.version} with another history digest")
        replayed = state.tensors()
        if replayed.keys() != checkpoint.tensors.keys():
            names = ", ".join(sorted(replayed.keys() ^ checkpoint.tensors.keys()))
            raise DataLossError(f"{where}: only one of checkpoint and replay has {names}")
        for name, tensor in replayed.items():
            differing = _differing(tensor, checkpoint.tensors[name])
            if differing:
                raise DataLossError(
                    f"{where}: {differing} of {tensor.numel()} elements of {name} are not what the log leads to: one "
                    "of the two was changed, checksum included"
                )


@final
class Replay:
    """All journals of a run.

    Args:
        run: The run's folder, or what its shards were given as the folder of their state.

    Raises:
        ConfigurationError: when it holds none, or not those of all shards.
        JournalError: when one of them cannot be read.
    """

    def __init__(self, run: Path) -> None:
        """Look at the run's state."""
        state = run / "state" if (run / "state").is_dir() else run
        found = sorted(state.glob("shard-*"), key=lambda path: int(path.name.removeprefix("shard-")))
        if not found:
            raise ConfigurationError(
                f"{run} holds no state of shards; name the folder of a run that was not run with --durability none"
            )
        self._run = run
        self._shards = [ShardReplay(shard, folder) for shard, folder in enumerate(found)]
        reaches = [{version for reach in shard.reaches().values() for version in reach} for shard in self._shards]
        self._kept = sorted(set.intersection(*reaches))

    @property
    def spans(self) -> list[Span]:
        """The versions that all shards can make again."""
        runs = groupby(enumerate(self._kept), key=lambda one: one[1] - one[0])
        groups = [[version for _, version in group] for _, group in runs]
        return [(group[0], group[-1]) for group in groups]

    def verify(self) -> list[Verified]:
        """Replay all journals and compare with all checkpoints.

        Raises:
            DataLossError: at the first difference or damage.
        """
        return [shard.verify() for shard in self._shards]

    def model(self, version: int) -> dict[str, Tensor]:
        """Return the model at a version: of all shards after so many updates of each.

        In lockstep that is what the workers saw. Elsewhere each shard closes rounds for itself: no worker need have
        seen this model, and what a shard closed after the last version of another one is not in it. Buffers are those
        that rank 0 began, or left, with.

        Raises:
            ConfigurationError: when that version is not kept; the message lists those that are.
            DataLossError: when something of it is damaged.
        """
        if version not in self._kept:
            raise ConfigurationError(f"version {version} of {self._run} is not kept; kept are {_listed(self.spans)}")
        states = [shard.state_at(version) for shard in self._shards]
        opened = states[0].opened
        if opened is None or opened.registration.shards != len(states):
            raise ConfigurationError(f"{self._run} holds the state of {len(states)} shards, which are not all of them")
        untrained = {name: value for state in states for name, value in state.untrained.items()}
        return model_tensors(opened.registration.layout, torch.cat([_visible(state) for state in states]), untrained)

    def write(self, version: int, path: Path) -> None:
        """Write `model` as safetensors.

        Raises:
            ConfigurationError: also when ``path`` cannot be written.
        """
        tensors = self.model(version)
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{path} cannot be written: {error}; choose another --output") from None


def report(said: Mapping[str, Any]) -> str:
    """Say for people what the command has found: ``kept``, and ``verified`` and ``model`` where that was asked for."""
    lines = [f"kept are {_listed([(first, last) for first, last in said['kept']])}"]
    for one in said.get("verified", []):
        equal = ", ".join(map(str, one["checkpoints"])) or "none"
        lines.append(
            f"shard {one['shard']}: versions {one['first']} … {one['last']}, {one['records']} records replayed from "
            f"{', '.join(map(str, one['begun']))}; equal to the checkpoints of versions {equal}, bit for bit"
        )
    if "model" in said:
        lines.append(f"model: {said['model']}")
    return "\n".join(lines)


def _listed(spans: list[Span]) -> str:
    return "versions " + ", ".join(f"{a} … {b}" if a < b else str(a) for a, b in spans) if spans else "no versions"


def _restored(checkpoint: Checkpoint) -> RunState:
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}  # the replay writes to them
    return RunState.restored(checkpoint.table, tensors)


def _visible(state: RunState) -> Tensor:
    if state.shadow is not None:
        return state.shadow.values
    if state.replica is None:
        raise DataLossError("a shard had no model at that version")
    return state.replica.parameters


def _differing(one: Tensor, other: Tensor) -> int:
    """Return how many elements differ in any bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.numel(), other.numel())
    mine, others = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return int((mine != others).view(max(one.numel(), 1), -1).any(1).sum())
