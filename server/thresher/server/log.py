"""The update log in memory: what members have not read yet, and never more than a cap."""

from collections import deque
from typing import final

from thresher.protos.errors import BehindError
from thresher.protos.sealed import SealedUpdate

_RECORD_BYTES = 512  # what an update weighs beside its tensors and its frame, roughly


@final
class UpdateLog:
    """A run of consecutive updates, cut at the slowest member or at ``cap_bytes``, whichever comes first.

    Behind the cut there is the snapshot. The newest update is always kept, however large.
    """

    def __init__(self, cap_bytes: int, version: int = 0) -> None:
        """Start empty, behind ``version``."""
        self._cap = cap_bytes
        self._updates: deque[SealedUpdate] = deque()
        self.version = version
        self.bytes = 0

    def append(self, sealed: SealedUpdate) -> None:
        """Take the next update and forget the oldest ones while the log is above its cap."""
        self._updates.append(sealed)
        self.version = sealed.update.version
        self.bytes += _memory_bytes(sealed)
        while self.bytes > self._cap and len(self._updates) > 1:
            self._forget_oldest()

    def cut(self, version: int) -> None:
        """Forget what creates ``version`` or an earlier one, but not the newest: every member has it."""
        while len(self._updates) > 1 and self._updates[0].update.version <= version:
            self._forget_oldest()

    def since(self, version: int) -> tuple[SealedUpdate, ...]:
        """Return the updates after ``version``.

        Raises:
            BehindError: when some of them are behind the cut; the reader takes a snapshot instead.
        """
        kept = tuple(sealed for sealed in self._updates if sealed.update.version > version)
        if len(kept) != self.version - version:
            raise BehindError(
                f"updates after version {version} are no longer in the log, which now ends at {self.version}; "
                "take a snapshot"
            )
        return kept

    def digest(self, version: int) -> bytes:
        """Return the digest of the history up to ``version``; nothing where it is behind the cut."""
        return next((sealed.update.digest for sealed in self._updates if sealed.update.version == version), b"")

    def _forget_oldest(self) -> None:
        self.bytes -= _memory_bytes(self._updates.popleft())


def _memory_bytes(sealed: SealedUpdate) -> int:
    mean = sealed.update.mean
    if mean is None:
        return _RECORD_BYTES
    dense = mean.count == mean.numel  # dense gradients share their indices
    frames = 2 * len(sealed.frame)  # its messages hold it again, from the first time that it is told
    return _RECORD_BYTES + frames + mean.values.nbytes + (0 if dense else mean.indices.nbytes)
