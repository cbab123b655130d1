"""Where this worker is in the user's loop, so that a worker that was killed can go on there."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, final, runtime_checkable

import torch

from thresher.protos.bookmark import Bookmark, Share
from thresher.protos.errors import ConfigurationError, ProtocolError

_logger = logging.getLogger(__name__)

AGREEMENTS: Final = 64
"""How many of the newest agreements the shards can tell once more."""


@runtime_checkable
class Stateful(Protocol):
    """What `Session.keep` takes: schedulers, averages, scalers, anything of this kind."""

    def state_dict(self) -> Any:  # noqa: ANN401 - torch's own differ
        """Return its state: tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:  # noqa: ANN401
        """Take over a state."""
        ...


@final
class Schedule:
    """The hyper-parameters of an optimizer, which schedulers move but do not keep.

    Args:
        optimizer: The user's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at it; nothing changes."""
        self._groups = optimizer.param_groups

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters of each group."""
        return [{name: value for name, value in group.items() if name != "params"} for group in self._groups]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]], /) -> None:
        """Set them."""
        for group, values in zip(self._groups, state, strict=True):
            group.update(values)


@final
class Progress:
    """Counts steps, batches and passes, and what the user's loop has agreed on.

    A killed worker goes on with the iteration whose push was kept last: it makes that one again, with the same batch
    and the same randomness, so that the user's code behind ``optimizer.step()`` runs once. Hence everything here is
    kept as it was when that iteration began.

    A worker without a memory goes on at a `Bookmark` of the others. Where the number of workers changes in the middle
    of a pass, what is left of it is dealt anew: all workers begin with that at the same place.

    Args:
        workers: Among how many workers the data are dealt.

    Attributes:
        step: Optimizer steps made.
        batch: Batches taken since: gradients may be accumulated over several.
        pass_step: The step at which the pass over the data began.
        taken: Batches taken in this pass, since it is dealt for as many workers as now.
        dealt_for: How many that are.
        earlier: What was taken of this pass before, when it was dealt for other numbers of workers.
        schedule: Of the optimizer, once there is one; given back together with what the user keeps.
        resumed: This worker was killed before, or goes on where others are.
    """

    def __init__(self, workers: int = 1) -> None:
        """Begin at the first step."""
        self._workers = self.dealt_for = workers
        self.earlier: tuple[Share, ...] = ()
        self.step = self.batch = self.pass_step = self.taken = 0
        self._number = -1  # of the pass that `passes` has yielded last
        self._begun = 0  # passes over data in it
        self._to_skip = 0  # of them, those that were over when this worker was killed
        self._inside = False  # the pass over data that begins next was begun before this worker was killed
        self._resuming = False  # so was the pass that `passes` yields next
        self._counting = False  # `passes` has begun
        self._open = False  # a pass over data has begun and is not over
        self._results: list[Mapping[str, float]] = []  # of agreements that a next life asks for again
        self._before = 0  # how many of them are from before the first numbered pass
        self._outside: int | None = None  # how many are from before the loop over batches; None outside of one
        self._forgotten = 0  # agreements of passes and loops that are over
        self._asked = 0
        self._iteration = self._pushed = 0  # agreements when this iteration began, and the one whose push was the last
        self._pushed_step = 0
        self._kept: dict[str, Stateful] = {}
        self._restored: Mapping[str, Any] = {}
        self._scheduled: Sequence[Mapping[str, Any]] | None = None
        self._began: dict[str, Any] = {}
        self._redealt: tuple[Share, ...] = ()  # takes the place of the shares when this step is over
        self._lacking = ""  # what is to be said of things that are to be kept and were not
        self.schedule: Schedule | None = None
        self.resumed = False

    # The loop

    def passes(self, count: int) -> Iterator[int]:
        """Yield the numbers of those of ``count`` passes that are not over yet.

        Raises:
            ProtocolError: when there was a loop of numbered passes before.
        """
        if self._counting:
            raise ProtocolError(
                f"passes({count}) is called once more: a worker that is killed could not tell its loop from the first. "
                "Number all passes in one loop, and use range for others"
            )
        self._counting, begin = True, 0
        if self._resuming:
            begin, self._resuming, self._asked = self._number + 1, False, self._before
            yield self._number
        for number in range(begin, count):
            self._begin_numbered(number)
            yield number

    def _begin_numbered(self, number: int) -> None:
        self._leave_loop()
        if self._number < 0:
            self._before = len(self._results)
        self._forget(self._before)
        self._number = number
        self._begun = self._to_skip = 0
        self._inside = False

    def begin_pass(self) -> bool:
        """Begin a pass over the data; False when it was over before this worker was killed.

        Raises:
            ProtocolError: when another one is not over yet.
        """
        if self._open:
            raise ProtocolError(
                "a pass over session.batches begins while another one is open: a worker that is killed could go on in "
                "one of them only. Inside of a pass, evaluate with the loader itself; a pass that was left early in an "
                "iterator of your own must be closed"
            )
        if self._to_skip:
            self._to_skip -= 1
            return False
        if self._inside:
            self._inside = False
        else:
            self._begun += 1
            self.pass_step, self.taken = self.step, 0
            self.dealt_for, self.earlier = self._workers, ()
        self._leave_loop()
        self._open, self._outside = True, len(self._results)
        return True

    def begin_batch(self) -> None:
        """Take the next batch; the first of a step begins an iteration."""
        if self.batch == 0:
            self._restore()
            self._forget(self._outside)
            self._iteration, self._began = self._agreements, self._now()
        self.batch += 1
        self.taken += 1

    def end_pass(self) -> None:
        """End a pass over the data, at its end or before."""
        self._open = False
        self._leave_loop()

    def end_step(self, *, pushed: bool = True) -> None:
        """Count a step of the optimizer; ``pushed`` says that the shards took part in it."""
        if not self.batch:  # a loop that does not take its batches here: it begins with its first step
            self._iteration = self._agreements
            self._outside = len(self._results) if self._outside is None else self._outside
            self._forget(self._outside)
        if pushed:
            self._pushed, self._pushed_step = self._iteration, self.step
        self.step, self.batch = self.step + 1, 0
        if self._redealt:
            self._deal(self._redealt)

    def bookmark(self) -> Bookmark | None:
        """Return where this loop is when this step is over; None where it does not take its batches here."""
        if not self._begun:
            return None
        return Bookmark(self.step + 1, self._number + 1, self._begun, self.pass_step, self._shares, self._agreements)

    @property
    def fetched(self) -> int:
        """How many batches this worker, or one in its place, has taken in this pass."""
        return sum(taken for _, taken in self._shares)

    @property
    def _shares(self) -> tuple[Share, ...]:
        return (*self.earlier, (self.dealt_for, self.taken))

    def _deal(self, shares: Sequence[Share]) -> None:
        *earlier, (self.dealt_for, self.taken) = shares
        self.earlier, self._redealt = tuple(earlier), ()

    # What the user keeps

    def keep(self, objects: Mapping[str, object]) -> None:
        """Keep these, and give them back what was kept of them.

        Raises:
            ConfigurationError: when one has no state, or a name is taken.
        """
        for name, one in objects.items():
            if not isinstance(one, Stateful):
                raise ConfigurationError(f"{name} cannot be kept: {type(one).__name__} has no state_dict to load again")
            if name in self._kept:
                raise ConfigurationError(f"something is kept as {name} already; choose another name")
            self._kept[name] = one
            if name in self._restored:
                one.load_state_dict(copy.deepcopy(self._restored[name]))
            if self._lacking:
                _logger.warning(self._lacking, name)
        self._reschedule()

    def _restore(self) -> None:
        """Undo what the user's code did to kept objects on its way to the iteration that is made again."""
        for name, state in self._restored.items():
            if name in self._kept:
                self._kept[name].load_state_dict(copy.deepcopy(state))
        self._reschedule()
        self._restored, self._scheduled = {}, None

    def _reschedule(self) -> None:
        if self.schedule is not None and self._scheduled is not None:
            self.schedule.load_state_dict(copy.deepcopy(self._scheduled))

    # Agreements

    def repeated(self) -> Mapping[str, float] | None:
        """Return what the loop agreed on at this place before this worker was killed; None when it had not."""
        if self._asked == len(self._results):
            return None
        self._asked += 1
        return self._results[self._asked - 1]

    def next_agreement(self) -> int:
        """Return the number of the next one.

        Raises:
            ProtocolError: when a worker that is killed here could not be told again all that it would ask for.
        """
        if self._agreements - self._pushed >= AGREEMENTS:
            raise ProtocolError(
                f"there have been {AGREEMENTS} agreements since the iteration of step {self._pushed_step} began, and "
                "the shards remember no more for a worker that is killed: add up what you ask for, and agree once "
                "(Session.mean takes many numbers at a time), or agree less often"
            )
        return self._agreements

    @property
    def _agreements(self) -> int:
        return self._forgotten + len(self._results)

    def _forget(self, first: int | None) -> None:
        """Keep the ``first`` results only: those behind them are not asked for again."""
        kept = self._results[:first]
        self._forgotten += len(self._results) - len(kept)
        self._results, self._asked = kept, len(kept)

    def _leave_loop(self) -> None:
        self._forget(self._outside)
        self._outside = None

    def agreed(self, result: Mapping[str, float]) -> None:
        """Remember what was agreed."""
        self._results.append(dict(result))
        self._asked = len(self._results)

    # State

    def state(self) -> dict[str, Any]:
        """Return what it was when this iteration began; as it is, where the loop does not take its batches here."""
        return self._began if self.batch else self._now()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the iteration of a `state`."""
        self._begin_at(state["step"], state["number"], state["begun"], state["pass_step"])
        self._deal(state["shares"])
        self._results = list(state["results"])
        self._before, self._forgotten = state["before"], state["forgotten"]
        self._iteration = self._pushed = self._agreements
        self._pushed_step = self.step
        self._restored, self._scheduled, self.resumed = state["kept"], state["schedule"], True

    def _begin_at(self, step: int, number: int, begun: int, pass_step: int) -> None:
        self.step, self._number, self._begun, self.pass_step = step, number, begun, pass_step
        self._to_skip = max(0, begun - 1)
        self._inside = begun > 0
        self._resuming = number >= 0

    def deal_anew(self, place: Bookmark) -> None:
        """Go on at ``place``, in this pass, once the iteration is over that is made again: it was dealt otherwise."""
        self._redealt = place.shares

    def join(self, place: Bookmark, schedule: Sequence[Mapping[str, Any]] | None, lacking: str) -> None:
        """Go on at a bookmark of the others, who have come further than this worker remembers.

        Args:
            place: Where they are.
            schedule: Hyper-parameters in force, by group; None where only the workers know them.
            lacking: What is to be said of each thing that is to be kept; its name takes the place of ``%s``.
        """
        self._begin_at(place.step, place.passes - 1, place.begun, place.pass_step)
        self._deal(place.dealt_for(self._workers).shares)
        self._results, self._before, self._asked, self._forgotten = [], 0, 0, place.agreements
        self._iteration = self._pushed = self._agreements
        self._pushed_step = self.step
        self._scheduled, self._lacking, self.resumed = schedule, lacking, True

    def _now(self) -> dict[str, Any]:
        results = self._results[: self._outside]
        return {
            "step": self.step,
            "pass_step": self.pass_step,
            "shares": self._shares,
            "number": self._number,
            "begun": self._begun,
            "results": results,
            "before": self._before,
            "forgotten": self._agreements - len(results),
            "schedule": copy.deepcopy(self.schedule.state_dict()) if self.schedule is not None else None,
            "kept": {name: copy.deepcopy(one.state_dict()) for name, one in self._kept.items()},
        }
