"""How rank 0 finds the run's λ on the way: calibrated on the first rounds, or steered to a budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, final

from torch import Tensor

from thresher.compression import Budget, Calibration
from thresher.protos.update import Update

CALIBRATION_STEPS: Final = 50
_FIRST_PRICE: Final = 6.0  # bytes: an element with its index in a frame of its own


class Steering(Protocol):
    """Proposes λ, in the unit of the gradient; the very first round, before there is one, sends `density`."""

    @property
    def density(self) -> float:
        """Wanted density of a round, in (0, 1]."""
        ...

    def observe(self, corrected: Callable[[], Tensor], sent: float) -> float | None:
        """Return λ for the next round; None while there was nothing to find one from.

        Args:
            corrected: Makes message + residual of this round, [numel] float32 in the unit of the gradient.
            sent: Density of rank 0's own push.
        """
        ...

    def settle(self, updates: Sequence[Update], pulled_bytes: int) -> None:
        """Hear what a round came to: the updates of all shards, and the bytes in which this worker pulled them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return its state, plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state this is."""
        ...


@final
class Calibrated:
    """The quantile of the first rounds, then constant."""

    def __init__(self, density: float) -> None:
        """Calibrate for a density."""
        self.density = density
        self._calibration = Calibration(density, CALIBRATION_STEPS)

    def observe(self, corrected: Callable[[], Tensor], sent: float) -> float:  # noqa: ARG002 - for the other one
        """Look at the round as long as the calibration lasts."""
        if self._calibration.finished and self._calibration.threshold is not None:
            return self._calibration.threshold
        return self._calibration.observe(corrected())

    def settle(self, updates: Sequence[Update], pulled_bytes: int) -> None:
        """Do nothing: a calibration does not look at what others sent."""

    def state_dict(self) -> dict[str, Any]:
        """Return the calibration's state."""
        return self._calibration.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state this is."""
        self._calibration.load_state_dict(state)


@final
class Budgeted:
    """λ is steered so that the whole run comes out at a mean density, or at a number of bytes.

    Bytes are counted over all workers in both directions: what the shards say was pushed, and what this worker pulled
    times the number of members, as all pull the same. From the mean price of an element so far follows how many the
    rest of the run can afford.

    Args:
        numel: Elements of the model.
        workers: Number of workers.
        density: Wanted mean density; None where ``budget`` is given.
        budget: Wanted bytes of the run; needs ``steps``.
        steps: Rounds of the whole run, where known.
    """

    def __init__(
        self, numel: int, workers: int, *, density: float | None, budget: int | None, steps: int | None
    ) -> None:
        """Begin with nothing spent."""
        self._numel = numel
        self._affordable = budget / (steps * workers * numel) if budget is not None and steps is not None else None
        # The shards answer each worker with the union of all pushes, which is at most their sum.
        first = density if self._affordable is None else _fraction(self._affordable / (_FIRST_PRICE * (1 + workers)))
        self._budget = Budget(1.0 if first is None else first, steps)
        self._settled: float | None = None
        self._bytes = self._elements = 0

    @property
    def density(self) -> float:
        """Wanted mean density of the run, as far as it is known."""
        return self._budget.density

    def observe(self, corrected: Callable[[], Tensor], sent: float) -> float | None:
        """Book the round, and choose λ anew where that is due."""
        return self._budget.observe(corrected, sent, self._settled)

    def settle(self, updates: Sequence[Update], pulled_bytes: int) -> None:
        """Learn what all workers sent, and what an element costs."""
        members = updates[0].members
        elements = sum(update.pushed_elements for update in updates)
        pushes = len(updates[0].arrivals) or members
        self._settled = elements / (pushes * self._numel)
        self._elements += elements
        self._bytes += sum(update.push_bytes for update in updates) + members * pulled_bytes
        if self._affordable is not None and self._elements:
            self._budget.allow(_fraction(self._affordable * self._elements / self._bytes))

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state, and what was spent."""
        return {
            "budget": self._budget.state_dict(),
            "settled": self._settled,
            "bytes": self._bytes,
            "elements": self._elements,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state this is."""
        self._budget.load_state_dict(state["budget"])
        self._settled, self._bytes, self._elements = state["settled"], state["bytes"], state["elements"]


def _fraction(density: float) -> float:
    return min(1.0, max(1e-9, density))
