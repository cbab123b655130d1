"""Where the members' loops over the data are, so that who joins without a memory goes on there."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

from thresher.protos.errors import ProtocolError
from thresher.v1 import aggregation_pb2 as pb

Share = tuple[int, int]
"""Among how many workers a pass is dealt, and how many batches each of them has taken."""


@final
@dataclass(frozen=True, slots=True)
class Bookmark:
    """A place in the loop that all members make.

    Attributes:
        step: Optimizer steps made.
        passes: How many numbered passes have begun; 0 where they are not numbered.
        begun: Passes over data that have begun in the last of them.
        pass_step: The step at which the last of these began.
        shares: What was taken of it, one entry for each number of workers it was dealt for, in turn; at least one.
        agreements: How many agreements have been asked for.
    """

    step: int
    passes: int
    begun: int
    pass_step: int
    shares: tuple[Share, ...]
    agreements: int = 0

    @property
    def workers(self) -> int:
        """Among how many workers the pass is dealt now."""
        return self.shares[-1][0]

    def dealt_for(self, workers: int) -> "Bookmark":
        """Return the same place, with the rest of the pass dealt for ``workers``."""
        return self if workers == self.workers else replace(self, shares=(*self.shares, (workers, 0)))

    def redealt(self, before: "Bookmark | None", workers: int) -> "Bookmark":
        """Return this place, one step behind ``before``, as if that step's batches had been dealt for ``workers``.

        A step whose push was made for another number of workers counts, in a pass that is dealt anew, as one of theirs.
        """
        if before is None:
            return self.dealt_for(workers)
        begin = before.dealt_for(workers)
        taken = self.shares[-1][1]
        if self.pass_step != before.pass_step:
            return replace(self, shares=((workers, taken),))
        if len(self.shares) == len(before.shares):
            taken -= before.shares[-1][1]
        *earlier, (_, already) = begin.shares
        return replace(self, shares=(*earlier, (workers, already + taken)))


def furthest(told: Iterable[Bookmark | None], before: Bookmark | None) -> Bookmark | None:
    """Return where the loops are after a round.

    Args:
        told: What its pushes say, in rank order.
        before: Where they were; a worker that has fallen behind does not call the others back. Of two that are equally
            far the one counts that has the pass dealt for another number of workers: it knows what is new.
    """
    places = [place for place in told if place is not None]
    if before is None:
        return max(places, key=lambda place: place.step, default=None)
    return max([before, *places], key=lambda place: (place.step, place.workers != before.workers))


def bookmark_to_message(bookmark: Bookmark) -> pb.Bookmark:
    """Write a bookmark."""
    return pb.Bookmark(
        step=bookmark.step,
        passes=bookmark.passes,
        begun=bookmark.begun,
        pass_step=bookmark.pass_step,
        shares=[pb.Share(workers=workers, taken=taken) for workers, taken in bookmark.shares],
        agreements=bookmark.agreements,
    )


def bookmark_from_message(message: pb.Bookmark) -> Bookmark:
    """Read a bookmark. Raises ProtocolError when it is no place in a pass over data."""
    shares = tuple((share.workers, share.taken) for share in message.shares)
    if not message.begun or not shares or not all(workers for workers, _ in shares) or message.pass_step > message.step:
        raise ProtocolError(
            f"a bookmark in pass {message.begun} from step {message.pass_step} of {list(shares)} is told"
        )
    return Bookmark(message.step, message.passes, message.begun, message.pass_step, shares, message.agreements)
