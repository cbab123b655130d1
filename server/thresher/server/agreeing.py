"""Numbers on which the members agree outside of rounds: means of metrics, and whether to stop."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import final

from thresher.protos.errors import ProtocolError
from thresher.server.events import Agree, Worker
from thresher.server.facts import Agreed


def earlier_agreement(asked: Agree, known: Mapping[int, Agreed], number: int, who: str) -> Agreed | None:
    """Return what was agreed already, where that is asked for; None for the next agreement.

    Args:
        asked: What a member asks.
        known: The newest agreements, by number.
        number: Of the next one.
        who: The member, for people.

    Raises:
        ProtocolError: when it is forgotten, or is not the next one.
    """
    if asked.number > number:
        raise ProtocolError(f"{who} asks for agreement {asked.number}; {number} is next: all must ask alike")
    if asked.number < number and asked.number not in known:
        raise ProtocolError(f"{who} asks for agreement {asked.number}, which is forgotten; {number} is next")
    return known.get(asked.number)


@final
class OpenAgreement:
    """What the members have said so far about the next agreement.

    Attributes:
        since: When a member began to wait for it; infinity while none does.
    """

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._said: dict[int, Agree] = {}
        self.since = math.inf

    def hear(self, asked: Agree) -> None:
        """Take what one member says.

        Raises:
            ProtocolError: when another member speaks of other names.
        """
        for rank, other in self._said.items():
            if set(other.values) != set(asked.values):
                raise ProtocolError(
                    f"worker {asked.worker.rank} wants to agree on {sorted(asked.values)}, worker {rank} on "
                    f"{sorted(other.values)}: all must ask alike"
                )
        self._said[asked.worker.rank] = asked

    @property
    def asking(self) -> tuple[int, ...]:
        """The ranks of those who wait for the others to speak."""
        return tuple(sorted(self._said))

    def asks(self, rank: int) -> bool:
        """Return True for a member that waits for the others to speak: it cannot push meanwhile."""
        return rank in self._said

    def is_asked_by(self, worker: Worker) -> bool:
        """Return True for a worker that waits in this life; an earlier one of its rank may have asked, too."""
        return worker.rank in self._said and self._said[worker.rank].worker == worker

    def conclude(self, ranks: Collection[int], number: int, now: float) -> Agreed | None:
        """Return the mean over ``ranks`` once all have spoken, and begin anew."""
        said = [asked.values for rank, asked in sorted(self._said.items()) if rank in ranks]
        self.since = min(self.since, now) if said else math.inf
        if not said or len(said) < len(ranks):
            return None
        agreed = Agreed(number, {name: _mean([values[name] for values in said]) for name in said[0]})
        self._said, self.since = {}, math.inf
        return agreed


def _mean(values: Sequence[float]) -> float:
    """Return the mean, of an exact sum; NaN where there is none, as of inf and -inf, or where float64 is too small."""
    try:
        return math.fsum(values) / len(values)
    except (ValueError, OverflowError):
        return math.nan
