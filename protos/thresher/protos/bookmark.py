"""Where the members' loops over the data are, so that all of them are at one place."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

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
        since: The step at which the data were dealt for this number of workers; 0 where they were from the beginning.
    """

    step: int
    passes: int
    begun: int
    pass_step: int
    shares: tuple[Share, ...]
    agreements: int = 0
    since: int = 0

    @property
    def workers(self) -> int:
        """Among how many workers the pass is dealt now."""
        return self.shares[-1][0]

    @property
    def data(self) -> tuple[object, ...]:
        """What says which data come next, and what is drawn for them."""
        return self.step, self.pass_step, self.shares

    @property
    def dealing(self) -> tuple[int, int]:
        """By which dealing they come: two workers of one have passes that begin at the same steps."""
        return self.since, self.workers

    def dealt_for(self, workers: int) -> "Bookmark":
        """Return the same place, with the rest of the pass dealt for ``workers``."""
        if workers == self.workers:
            return self
        return replace(self, shares=(*self.shares, (workers, 0)), since=self.step)


def furthest(told: Iterable[Bookmark | None], before: Bookmark | None) -> Bookmark | None:
    """Return where the loops are after a round: of two that are equally far the first one counts.

    Args:
        told: What its pushes say, in rank order.
        before: Where they were; a worker that has fallen behind does not call the others back.
    """
    places = [place for place in (before, *told) if place is not None]
    return max(places, key=lambda place: (place.step, place.passes, place.begun), default=None)
