"""The update log in memory: what members have not read yet, and never more than a cap."""

from collections import deque
from typing import final

from thresher.protos.errors import ProtocolError
from thresher.protos.update import Update

_RECORD_BYTES = 256  # what an update weighs beside its tensors, roughly


@final
class UpdateLog:
    """A run of consecutive updates, cut at the slowest member or at ``cap_bytes``, whichever comes first.

    Behind the cut there is the snapshot. The newest update is always kept, however large.
    """

    def __init__(self, cap_bytes: int) -> None:
        """Start empty, at version 0."""
        self._cap = cap_bytes
        self._updates: deque[Update] = deque()
        self.version = 0
        self.bytes = 0

    def append(self, update: Update) -> None:
        """Take the next update and forget the oldest ones while the log is above its cap."""
        self._updates.append(update)
        self.version = update.version
        self.bytes += _memory_bytes(update)
        while self.bytes > self._cap and len(self._updates) > 1:
            self._forget_oldest()

    def cut(self, version: int) -> None:
        """Forget what creates ``version`` or an earlier one: every member has it."""
        while self._updates and self._updates[0].version <= version:
            self._forget_oldest()

    def since(self, version: int) -> tuple[Update, ...]:
        """Return the updates after ``version``.

        Raises:
            ProtocolError: when some of them are behind the cut; the reader takes a snapshot instead.
        """
        kept = tuple(update for update in self._updates if update.version > version)
        if len(kept) != self.version - version:
            raise ProtocolError(
                f"updates after version {version} are no longer in the log, which now ends at {self.version}; "
                "take a snapshot"
            )
        return kept

    def _forget_oldest(self) -> None:
        self.bytes -= _memory_bytes(self._updates.popleft())


def _memory_bytes(update: Update) -> int:
    if update.mean is None:
        return _RECORD_BYTES
    dense = update.mean.count == update.mean.numel  # dense gradients share their indices
    return _RECORD_BYTES + update.mean.values.nbytes + (0 if dense else update.mean.indices.nbytes)
