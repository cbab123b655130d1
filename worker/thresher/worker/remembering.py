"""What a worker would lose by dying is kept in its memory, step by step; one that was killed goes on from there."""

import logging
from typing import Any, final

from thresher.protos.faults import reached
from thresher.worker.memory import Memory, MemoryFileError
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import Placement
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
        self._who, self._folder = f"worker {settings.rank}", settings.state_dir
        self._memory: Memory | None = None
        self.kept: dict[str, Any] | None = None
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MemoryFileError(f"{self._who} cannot keep its state in {self._folder}: {error.strerror}") from error
        identity = f"{self._who}: {model.layout.fingerprint}, {settings.method.describe()}"
        path = self._folder / f"worker-{settings.rank}.state"
        self._memory = Memory(path, identity, between=lambda: reached(self._who, "flip"))
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

    def go_on(self, rounds: Rounds) -> None:
        """Give everything its state back, and have the round finished in which this worker was ended."""
        kept = self.kept
        if kept is None:
            return
        self._progress.load(kept["progress"])
        self._selection.load_state_dict(kept["selection"])
        self._placement.load_state_dict(kept["placement"])
        rounds.resume(kept["number"], kept["pending"])
        _logger.info("%s goes on with step %d", self._who, self._progress.step)

    def repeated(self) -> bool:
        """Take note that the kept iteration has been made again; False where it was not to be.

        The model gets back the buffers that were kept: its forward pass was made again, on other parameters.
        """
        if self.kept is None:
            return False
        self._model.assign_untrained(self.kept["untrained"])
        self.kept = None
        return True

    def keep(self, rounds: Rounds) -> None:
        """Keep everything, between the compression of a message and its sending."""
        if self._memory is None:
            return
        self._memory.flip(
            {
                "run": rounds.shards[0].client.history.run,
                "progress": self._progress.state(),
                "number": rounds.number,
                "pending": rounds.pending,
                "selection": self._selection.state_dict(),
                "placement": self._placement.state_dict(),
                "untrained": self._model.untrained(buffers_only=True),
            }
        )

    def forget(self) -> None:
        """Empty the memory: this worker has left the run."""
        if self._memory is not None:
            self._memory.clear()

    def close(self) -> None:
        """Close the memory; what is in it stays."""
        if self._memory is not None:
            self._memory.close()
