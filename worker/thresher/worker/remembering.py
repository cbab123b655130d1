"""What a worker would lose by dying is kept in its memory, step by step; one that was killed goes on from there."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.errors import DataLossError
from thresher.protos.faults import reached
from thresher.protos.optimizers import Hyperparameter
from thresher.worker.memory import Memory, MemoryFileError
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import GradientPlaced, Placement
from thresher.worker.progress import Progress
from thresher.worker.rounds import Rounds
from thresher.worker.selection import Selection
from thresher.worker.settings import Settings

_logger = logging.getLogger(__name__)


@final
class Remembering:
    """One worker's memory; where the settings name no folder for it, it stays empty.

    Args:
        settings: Of the worker.
        model: What it trains.
        selection, placement, progress: Whose state is kept, beside the pushes of the round that is being made.

    Attributes:
        kept: Of the iteration that is to be made again; None where there is none.

    Raises:
        ConfigurationError: when the memory is that of another worker, model or method.
        MemoryFileError: when its file cannot be opened.
        DataLossError: when it is damaged.
    """

    def __init__(
        self, settings: Settings, model: ModelParameters, selection: Selection, placement: Placement, progress: Progress
    ) -> None:
        """Open the memory."""
        self._model, self._selection, self._placement, self._progress = model, selection, placement, progress
        self._settings = settings
        self._who, self._folder = f"worker {settings.rank}", settings.state_dir
        self._path = Path()
        self._memory: Memory | None = None
        self._means: list[Tensor | None] = []  # made since the last push
        self._asked = 0  # how many of them the user's loop has been given
        self.kept: dict[str, Any] | None = None
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MemoryFileError(f"{self._who} cannot keep its state in {self._folder}: {error.strerror}") from error
        identity = f"{self._who}: {model.layout.fingerprint}, {settings.method.describe()}"
        self._path = self._folder / f"worker-{settings.rank}.state"
        self._memory = Memory(
            self._path, identity, sync=settings.state_sync, between=lambda: reached(self._who, "flip")
        )
        for notice in self._memory.notices:
            _logger.warning("%s", notice)
        try:
            self.kept = self._memory.load()
        except BaseException:
            self.close()
            raise

    @property
    def run(self) -> int | None:
        """The run that the kept iteration belongs to; None where there is none."""
        return None if self.kept is None else int(self.kept["run"])

    def go_on(self, rounds: Rounds) -> bool:
        """Give everything its state back, and have the round finished in which this worker was ended.

        Returns:
            False where there is nothing to go on from, or what there is has been discarded.

        Raises:
            DataLossError: when the shards have taken later pushes: the newest state was damaged, or the file is an old
                copy. To go on from it would send once more what was sent, or never what was kept back. Where the
                folder is a local one it is discarded instead, because a newer one may be on another machine.
        """
        if self.kept is not None and not self._fits(self.kept, rounds):
            self.kept = None
        kept = self.kept
        if kept is None:
            return False
        self._progress.load(kept["progress"])
        self._selection.load_state_dict(kept["selection"])
        self._placement.load_state_dict(kept["placement"])
        rounds.follows = kept["follows"]
        rounds.resume(kept["number"], kept["pending"])
        _logger.info("%s goes on with step %d", self._who, self._progress.step)
        return True

    def _fits(self, kept: Mapping[str, Any], rounds: Rounds) -> bool:
        """Return False for a memory that is to be discarded."""
        if kept["run"] != rounds.shards[0].client.history.run:  # as `join` has said
            return False
        most = kept["number"] + 1 + kept["means_begun"]
        ahead = next((shard for shard in rounds.shards if shard.answer.settled_steps > most), None)
        if ahead is None:
            return True
        reason = (
            f"{self._who} finds push {kept['number']} in {self._path}, but {ahead.client} has taken its push "
            f"{ahead.answer.settled_steps - 1}: the file is older than that, and what was kept back since is lost"
        )
        if self._settings.state_is_local:
            _logger.warning("%s. It is discarded", reason)
            return False
        reason += ". Bring the newest file back, or remove it to go on without"
        rounds.abort(reason)
        raise DataLossError(reason)

    def begin(self, rounds: Rounds) -> None:
        """Begin without a memory: where the others are, if they have told."""
        rounds.begin()
        place = rounds.shards[0].bookmark
        if place is not None:
            self._go_to(place.dealt_for(self._settings.workers), rounds, "begins as the script made it")

    def go_along(self, rounds: Rounds) -> None:
        """Go where the others' loops are behind a round, if this one is elsewhere.

        In lockstep all are at one place. In the other modes each is at its own, but their passes must begin at the same
        steps: a worker that was killed goes there if its data were dealt otherwise than the run's are, and any if they
        were dealt once more for as many workers as it was told.
        """
        told, here = rounds.shards[0].bookmark, self._progress.place
        if told is None or here is None:
            return
        place = told.dealt_for(self._settings.workers)
        if self._settings.consistency.lockstep:
            elsewhere = here.data != place.data
        else:
            elsewhere = here.dealing != place.dealing and (self.kept is not None or told is place)
        if elsewhere:
            self._go_to(place, rounds, f"is as it was in step {here.step - 1}")

    def _go_to(self, place: Bookmark, rounds: Rounds, otherwise: str) -> None:
        """Go to a place; with the hyper-parameters in force, where this worker's schedule is that of another step.

        Args:
            place: Where the others are.
            rounds: Know those hyper-parameters.
            otherwise: What is said of the things that are to be kept.
        """
        if place.step == self._progress.step:
            self._progress.go_to(place)
            return
        groups: list[dict[str, Hyperparameter]] = []
        if isinstance(self._placement, GradientPlaced) and not self._settings.consistency.momentum_per_push:
            groups = [dict(group) for group in self._placement.shard_optimizer.groups]
            for one in rounds.shards[0].overrides:
                groups[one.group][one.name] = one.value
        where = f"{self._who} goes on where the others are, behind step {place.step - 1}"
        rounds.follows = True
        self._progress.join(place, groups or None, f"{where}; what is kept as %s {otherwise}")
        _logger.warning(
            "%s: its own state was lost, or it was away for longer than its lease, or it is new, or the data are dealt "
            "for another number of workers",
            where,
        )

    def repeated(self, rounds: Rounds) -> bool:
        """Take note that the kept iteration has been made again; False where it was not to be.

        The model gets back the buffers that were kept: its forward pass was made again, on other parameters. The means
        that had been made behind it need not be made again; one that had begun is asked for once more.
        """
        kept = self.kept
        if kept is None:
            return False
        self._model.assign_untrained(kept["untrained"])
        self._means, self._asked = list(kept["means"]), 0
        if rounds.number <= kept["number"] + 1 + kept["means_begun"]:
            rounds.number = kept["number"] + 1 + len(self._means)
        self.kept = None
        return True

    def keep(self, rounds: Rounds) -> None:
        """Keep everything, between the compression of a message and its sending.

        Raises:
            MemoryFileError: when the file cannot be written, as on a full disk.
        """
        if self._memory is None:
            return
        self._means, self._asked = [], 0
        self._memory.flip(
            {
                "run": rounds.shards[0].client.history.run,
                "progress": self._progress.state(),
                "number": rounds.number,
                "follows": rounds.follows,
                "pending": rounds.pending,
                "selection": self._selection.state_dict(),
                "placement": self._placement.state_dict(),
                "untrained": self._model.untrained(buffers_only=True),
                "means": [],
                "means_begun": 0,
            }
        )

    def mean(self, rounds: Rounds, vector: Tensor) -> Tensor | None:
        """Return the mean of all workers' ``vector``, [numel] float32; what it was, where it was made before a kill.

        Such a round moves the shards on by one, like a push; so it is kept that it begins, and what it came to. None
        for a worker on its way to the others, who have made it before.

        Raises:
            MemoryFileError: when the file cannot be written.
        """
        if self._progress.on_its_way:
            return None
        if self._memory is None:
            return rounds.mean(vector)
        self._asked += 1
        if self._asked > len(self._means):
            self._keep_means(self._memory, begun=self._asked)
            self._means.append(rounds.mean(vector))
            self._keep_means(self._memory, begun=self._asked)
        return self._means[self._asked - 1]

    def _keep_means(self, memory: Memory, begun: int) -> None:
        state = memory.load()
        if state is not None:
            memory.flip({**state, "means": self._means, "means_begun": begun})

    def forget(self) -> None:
        """Empty the memory: this worker has left the run."""
        if self._memory is not None:
            self._memory.clear()

    def close(self) -> None:
        """Close the memory; what is in it stays."""
        if self._memory is not None:
            self._memory.close()
