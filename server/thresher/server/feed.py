"""What workers are told of closed rounds, and what those are told who come back."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, final

from thresher.protos.errors import BehindError, DataLossError, LostHistoryError
from thresher.protos.sealed import SealedUpdate, with_assignments
from thresher.protos.sparse import SparseGradient
from thresher.server.effects import Publish
from thresher.server.events import History, Push
from thresher.server.log import UpdateLog
from thresher.server.members import Member
from thresher.server.shadow import Shadow
from thresher.server.state import RunState

_PIN_SECONDS: Final = 60.0


@final
class Feed:
    """The newest part of the log, in memory, and who has read how much of it.

    Args:
        state: Of the shard; only read here.
        cap_bytes: Memory for updates that members have not read.
    """

    def __init__(self, state: RunState, cap_bytes: int) -> None:
        """Begin at the version of ``state``."""
        self._state = state
        self._pins: list[tuple[int, float]] = []  # versions of which snapshots were taken, and until when they count
        self._log = UpdateLog(cap_bytes, state.version)
        if state.newest is not None:
            self._log = UpdateLog(cap_bytes, state.version - 1)
            self._log.append(state.newest.sealed)

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return self._log.bytes

    @property
    def version(self) -> int:
        """Of the newest update in it."""
        return self._log.version

    def check(self, there: History, who: str) -> None:
        """Hold the history that a worker was told against this shard's.

        Raises:
            LostHistoryError: when the shard has lost what the worker was told.
            DataLossError: when they have nothing to do with each other.
        """
        here = self._state.history
        if there.run and there.run != here.run:
            raise LostHistoryError(
                f"{who} was told of run {there.run:x}; the shard is in run {here.run:x}: it has lost its state"
            )
        if there.version > here.version:
            raise LostHistoryError(
                f"{who} was told of version {there.version}; the shard is at {here.version}: it lost the end of its log"
            )
        known = here.digest if there.version == here.version else self._log.digest(there.version)
        if there.digest and known and known != there.digest:
            raise DataLossError(
                f"{who} and the shard have different histories up to version {there.version}: one of them was restored "
                "from another copy. Start all from one checkpoint"
            )

    def check_refill(self, there: History, who: str) -> None:
        """Refuse a worker's replica where it is not all that the shard knew.

        Raises:
            DataLossError: when it is of another run, or the run is not in lockstep.
        """
        here = self._state.history
        if here.version and here.run != there.run:
            raise DataLossError(f"{who} is in run {there.run:x}, this shard in run {here.run:x}: use one of them")
        if not self._state.consistency.lockstep or self._state.consistency.downlink == "shadow":
            raise DataLossError(
                f"the shard lost the updates after version {here.version}, and {who} was told of version "
                f"{there.version}; a worker's replica replaces them in lockstep only. Restore the state folder"
            )

    def since(self, version: int) -> Sequence[SealedUpdate]:
        """Return what a worker at ``version`` lacks. Raises BehindError when only a snapshot will do."""
        newest, shadow = self._state.newest, self._state.shadow
        if shadow is None:
            return self._log.since(version)
        if newest is None or version == self._state.version:
            return ()
        return (self._assigned(newest.sealed, shadow.since(version), self._state.version - version),)

    def publish(self, newest: SealedUpdate) -> list[Publish]:
        """Take the newest update, and say who is told what of it.

        Updates go to everybody. Of the shadow a worker is told when its push is answered, everything since the last
        time in one; and those who wait to belong to the run are told always.
        """
        self._log.append(newest)
        state, version = self._state, self._state.version
        readers = state.members.exchanging
        if state.shadow is None:
            return [Publish(newest, tuple(member.rank for member in readers))] if readers else []
        by_version: dict[int, list[int]] = {}
        for member in readers:
            if self._is_due(member, newest):
                by_version.setdefault(member.told, []).append(member.rank)
                member.told = version
        return [
            Publish(self._assigned(newest, _assignments(state.shadow, told), version - told), tuple(ranks))
            for told, ranks in by_version.items()
        ]

    def deliveries(self, publications: Sequence[Publish], pushes: Sequence[Push]) -> tuple[tuple[int, int], ...]:
        """Return to whom the newest update goes, by rank, and in how many bytes of exchange messages.

        In lockstep it also goes to who has pushed for it and lost its connection since: when that worker comes back.

        Args:
            publications: As `publish` returned them.
            pushes: Of the round.
        """
        told = {rank: one.sealed.wire_bytes for one in publications for rank in one.ranks}
        version = self._state.version
        for rank in {push.worker.rank for push in pushes} - told.keys() if self._state.consistency.lockstep else ():
            with suppress(BehindError):  # that one takes a snapshot
                told[rank] = sum(one.wire_bytes for one in self.since(version - 1))
        return tuple(told.items())

    def _assigned(self, newest: SealedUpdate, assignments: SparseGradient, versions: int) -> SealedUpdate:
        """Say with them who belongs to the run: what was said of that in between is not told on its own."""
        membership = self._state.members.membership if self._state.decides else None
        return with_assignments(newest, assignments, versions, membership)

    def again(self, push: Push) -> list[Publish]:
        """Return the mean of the newest round, where it is what a repeated push wanted: nothing else remembers it."""
        newest = self._state.newest
        if newest is None or not newest.sealed.update.only_mean or newest.sealed.update.version != push.step + 1:
            return []
        return [Publish(newest.sealed, (push.worker.rank,))]

    def pin(self, now: float) -> None:
        """Keep what follows the newest version: somebody takes a snapshot of it, and will ask for the rest."""
        version = self._state.version
        self._pins = [pin for pin in self._pins if pin[0] != version] + [(version, now + _PIN_SECONDS)]

    def cut(self, now: float) -> None:
        """Forget what all members are known to have, and nobody with a snapshot will ask for."""
        self._pins = [(version, until) for version, until in self._pins if until > now]
        known = [member.version for member in self._state.members.counted] or [0]
        oldest = min(known + [version for version, _ in self._pins])
        self._log.cut(oldest)
        if self._state.shadow is not None:
            self._state.shadow.cut(oldest)

    def _is_due(self, member: Member, newest: SealedUpdate) -> bool:
        arrived = {rank for rank, _ in newest.update.arrivals}
        return self._state.consistency.lockstep or member.rank in arrived or not self._state.members.counts(member)


def _assignments(shadow: Shadow, told: int) -> SparseGradient:
    """Return what a connected worker has to hear: all of the shadow, where what it missed is no longer known."""
    try:
        return shadow.since(told)
    except BehindError:
        return SparseGradient.dense(shadow.values.clone())
