"""Numbers on which the members agree outside of rounds: means of metrics, and whether to stop."""

import math
from collections.abc import Collection, Mapping
from typing import final

from thresher.protos.errors import ProtocolError
from thresher.server.events import Agree
from thresher.server.facts import Agreed


@final
class OpenAgreement:
    """What the members have said so far about the next agreement."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._said: dict[int, Mapping[str, float]] = {}

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

    def conclude(self, ranks: Collection[int], number: int) -> Agreed | None:
        """Return the mean over ``ranks`` once all have spoken, and begin anew."""
        said = [values for rank, values in sorted(self._said.items()) if rank in ranks]
        if not said or len(said) < len(ranks):
            return None
        self._said = {}
        return Agreed(number, {name: math.fsum(values[name] for values in said) / len(said) for name in said[0]})
