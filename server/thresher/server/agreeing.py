"""Numbers on which the members agree outside of rounds: means of metrics, and whether to stop."""

import math
from collections.abc import Collection, Mapping
from typing import final

from thresher.protos.errors import ProtocolError
from thresher.server.events import Agree
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
        self._said: dict[int, Mapping[str, float]] = {}
        self.since = math.inf

    def hear(self, asked: Agree) -> None:
        """Take what one member says.

        Raises:
            ProtocolError: when another member speaks of other names.
        """
        for rank, values in self._said.items():
            if set(values) != set(asked.values):
                raise ProtocolError(
                    f"worker {asked.worker.rank} wants to agree on {sorted(asked.values)}, worker {rank} on "
                    f"{sorted(values)}: all must ask alike"
                )
        self._said[asked.worker.rank] = asked.values

    def asks(self, rank: int) -> bool:
        """Return True for a member that waits for the others to speak: it cannot push meanwhile."""
        return rank in self._said

    def conclude(self, ranks: Collection[int], number: int, now: float) -> Agreed | None:
        """Return the mean over ``ranks`` once all have spoken, and begin anew."""
        said = [values for rank, values in sorted(self._said.items()) if rank in ranks]
        self.since = min(self.since, now) if said else math.inf
        if not said or len(said) < len(ranks):
            return None
        self._said, self.since = {}, math.inf
        return Agreed(number, {name: math.fsum(values[name] for values in said) / len(said) for name in said[0]})
