"""What the steps of a worker come to: its counters, and a row of each step for whoever listens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from thresher.protos.codec import decode
from thresher.protos.layout import Layout
from thresher.protos.sparse import SparseGradient
from thresher.worker.rounds import Pending, Rounds
from thresher.worker.rows import RowsFile, WorkerRow
from thresher.worker.selection import Selection
from thresher.worker.statistics import WorkerStatistics

Listener = Callable[[WorkerRow], None]
"""Hears of each step that exchanged."""

_LAYERS_EVERY: Final = 10
_MOST_LAYERS: Final = 256


@final
class Recorder:
    """Follows one worker's steps, of which each has three points in time: `begin`, `framed`, and `end`.

    Args:
        rank: The worker's.
        clock: Seconds from any origin, never backwards.

    Attributes:
        statistics: The worker's counters, frozen; replaced as a whole.
    """

    def __init__(self, rank: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin with zeros."""
        self.statistics = WorkerStatistics(rank)
        self._clock = clock
        self._listeners: list[Listener] = []
        self._file: RowsFile | None = None
        self._begun = self._framed = self._ended = clock()
        self._told = 0, 0  # bytes pushed and pulled, all that rows have said so far

    def open(self, path: Path) -> None:
        """Have rows written to a file, before anybody else hears of them. Raises what `RowsFile` raises."""
        self._file = RowsFile(path)
        self._listeners.insert(0, self._file)

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` of each step from now on, after those that listen already."""
        self._listeners.append(listener)

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._listeners.remove(self._file)
            self._file.close()
            self._file = None

    def start(self, layout: Layout, rounds: Rounds, selection: Selection, step: int, *, resumed: bool) -> None:
        """Begin to count: the worker has joined.

        Args:
            layout: Of its model.
            rounds: Whose clients count bytes.
            selection: What is kept, and which threshold is in force for its first step.
            step: How many steps it has made.
            resumed: It goes on with them; the file keeps their rows, and that of the step in which it was killed.
        """
        if self._file is not None:
            self._file.keep(step + 1 if resumed else 0)
        self._layers = Layers(layout)
        self.statistics = replace(
            self.statistics,
            **_traffic(rounds),
            steps=step,
            numel=layout.numel,
            residual_norm=float(selection.residual.norm()),
            threshold=selection.threshold,
        )
        self._ended = self._clock()

    def begin(self) -> None:
        """Take note that a step begins, which may exchange or not."""
        self._begun = self._clock()

    def framed(self) -> None:
        """Take note that what this step pushes is ready to be sent."""
        self._framed = self._clock()

    def end(self, step: int, rounds: Rounds, selection: Selection, sent: SparseGradient | None) -> None:
        """Count a step that has exchanged, and tell who listens; what a listener raises comes out of it.

        Args:
            step: How many steps there have been, this one included.
            rounds: Whose clients count bytes.
            selection: What is kept, and which threshold is in force from now on.
            sent: What was pushed, [numel]; None where the step was skipped.
        """
        self._end(step, rounds, selection, sent, skipped=sent is None, pushed=0 if sent is None else sent.count)

    def end_repeated(
        self, step: int, rounds: Rounds, selection: Selection, number: int, pushes: Sequence[Pending]
    ) -> None:
        """Do as `end` for a step that an earlier life of the worker had begun, and may have told already.

        Its row has all of the bytes that belong to it, whichever life has said or heard them.

        Args:
            step: As `end` takes it.
            rounds: Likewise.
            selection: Likewise.
            number: Of the round.
            pushes: To the shards, as they were kept.
        """
        frames = [(shard.slice.numel, frame) for shard, (_, frame) in zip(rounds.shards, pushes, strict=True) if frame]
        sent = SparseGradient.concatenate([decode(frame, numel=numel) for numel, frame in frames]) if frames else None
        first = [shard.client.first_update or (number + 1, 0) for shard in rounds.shards]
        told_before = (
            sum(wire_bytes for version, wire_bytes in first if version <= number) if rounds.consistency.lockstep else 0
        )
        self._end(step, rounds, selection, sent, said_before=rounds.said_before, told_before=told_before)

    def _end(
        self,
        step: int,
        rounds: Rounds,
        selection: Selection,
        sent: SparseGradient | None,
        *,
        skipped: bool = False,
        pushed: int = 0,
        said_before: int = 0,
        told_before: int = 0,
    ) -> None:
        """Renew the counters; then make the row, if anybody listens.

        Args:
            step: As `end` takes it.
            rounds: Likewise.
            selection: Likewise.
            sent: Likewise.
            skipped: It counts as a step without a contribution.
            pushed: Elements that count as pushed.
            said_before: Bytes of its pushes that another life has said.
            told_before: Bytes of updates that came and belong to an earlier step, whose row another life has told.
        """
        then, seconds = self.statistics, self._seconds()
        now = self.statistics = replace(
            then,
            **_traffic(rounds),
            steps=step,
            skipped=then.skipped + skipped,
            pushed_elements=then.pushed_elements + pushed,
            density=0.0 if sent is None else sent.density,
            residual_norm=float(selection.residual.norm()),
            threshold=selection.threshold,
            timed_steps=then.timed_steps + 1,
            **{phase: getattr(then, phase) + value for phase, value in seconds.items()},
        )
        told, self._told = self._told, (sum(now.push_bytes), sum(now.pull_bytes))
        if not self._listeners:
            return
        row = WorkerRow(
            time=time.time(),
            rank=now.rank,
            step=step,
            version=max(shard.follower.version for shard in rounds.shards),
            **seconds,
            push_bytes=self._told[0] - told[0] + said_before,
            pull_bytes=self._told[1] - told[1] - told_before,
            pushed_elements=0 if sent is None else sent.count,
            numel=now.numel,
            residual_norm=now.residual_norm,
            threshold=then.threshold,
            layers=self._layers.count(sent) if step == 1 or step % _LAYERS_EVERY == 0 else None,
        )
        for listener in tuple(self._listeners):
            listener(row)

    def _seconds(self) -> dict[str, float]:
        """Return how long each part has taken since the last exchange, and begin anew: no time falls in between."""
        ended, before = self._clock(), self._ended
        self._ended = ended
        return {
            "compute_seconds": self._begun - before,
            "compress_seconds": self._framed - self._begun,
            "exchange_seconds": ended - self._framed,
        }


@final
class Layers:
    """The largest tensors of a model, and how much of each is pushed."""

    def __init__(self, layout: Layout) -> None:
        """Find them."""
        sizes = [spec.numel for spec in layout.trained]
        largest = sorted(sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:_MOST_LAYERS])
        self._names = [layout.trained[tensor].name for tensor in largest]
        self._begins = np.array(layout.offsets)[largest]
        self._ends = np.array(layout.offsets)[[tensor + 1 for tensor in largest]]

    def count(self, sent: SparseGradient | None) -> dict[str, int]:
        """Return the elements of each tensor that are in ``sent``, by name."""
        if sent is None:
            return dict.fromkeys(self._names, 0)
        if sent.count == sent.numel:
            return dict(zip(self._names, (self._ends - self._begins).tolist(), strict=True))
        indices = sent.indices.cpu().numpy()  # increasing, as SparseGradient has them
        counts = np.searchsorted(indices, self._ends) - np.searchsorted(indices, self._begins)
        return dict(zip(self._names, counts.tolist(), strict=True))


def _traffic(rounds: Rounds) -> dict[str, Any]:
    """Return what the worker's clients have counted so far, as `WorkerStatistics` has it."""
    clients = [shard.client for shard in rounds.shards]
    return {
        "push_bytes": tuple(client.push_bytes for client in clients),
        "pull_bytes": tuple(client.pull_bytes for client in clients),
        "resent_bytes": tuple(client.resent_bytes for client in clients),
        "setup_bytes": sum(client.calls.setup_bytes for client in clients),
    }
