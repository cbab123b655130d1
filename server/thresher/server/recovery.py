"""What a shard knew before it was ended: the newest whole checkpoint, and every record since."""

import logging
from collections.abc import Iterator
from typing import final

from thresher.protos.errors import DataLossError, OptimizerError, ProtocolError
from thresher.protos.faults import reached
from thresher.server.aggregation import row_of
from thresher.server.config import ShardConfig
from thresher.server.events import IterationRow
from thresher.server.facts import Closed, record_from_bytes
from thresher.server.journal import Journal
from thresher.server.state import RunState

_logger = logging.getLogger(__name__)


@final
class Recovery:
    """Reads a journal back.

    Attributes:
        state: What the shard knew; None when it never had a run.
        rows: Of the rounds that were read, for the per-iteration file, which may lack the last.
    """

    def __init__(self, journal: Journal, config: ShardConfig) -> None:
        """Read everything.

        Raises:
            DataLossError: when something that was kept is damaged or gone.
            JournalError: when the journal cannot be read.
        """
        self._config = config
        self.rows: list[IterationRow] = []
        recovered = journal.recover()
        for notice in recovered.notices:
            _logger.warning("%s", notice)
        self.state: RunState | None = None
        if recovered.checkpoint is not None:
            self.state = RunState.restored(recovered.checkpoint.table, recovered.checkpoint.tensors)
        self._fold(recovered.records)
        if self.state is not None:
            self._check_run(self.state)

    def _fold(self, records: Iterator[bytes]) -> None:
        for number, data in enumerate(records):
            state = self.state or RunState(self._config.run, self._config.workers)
            record = record_from_bytes(data, state.piece)
            try:
                state.fold(record)
            except (OptimizerError, ProtocolError) as error:
                raise DataLossError(f"record {number} since the checkpoint does not follow: {error}") from error
            if isinstance(record, Closed):
                self.rows.append(row_of(record, self._config.shard, state.slice.numel, state.spec))
            self.state = state
        reached(f"shard {self._config.shard}", "recovery")

    def _check_run(self, state: RunState) -> None:
        """Refuse the state folder of another shard or another run."""
        if state.opened is None:
            return
        said, config = state.opened.registration, self._config
        workers = config.workers or said.workers
        if (said.shard, said.shards, said.workers) != (config.shard, config.shards, workers):
            raise DataLossError(
                f"the state folder is that of shard {said.shard} of {said.shards} for {said.workers} workers, not of "
                f"shard {config.shard} of {config.shards} for {config.workers}; name the right folder, or an empty one"
            )
