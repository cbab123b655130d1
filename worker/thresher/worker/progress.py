"""Where this worker is in the user's loop, so that a worker that was killed can go on there."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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

    A worker whose loop is not where those of the others are goes to their `Bookmark`: before its first pass, or in the
    middle of one. Where the number of workers changes in the middle of a pass, what is left of it is dealt anew.

    Args:
        workers: Among how many workers the data are dealt.

    Attributes:
        step: Optimizer steps made.
        batch: Batches taken since: gradients may be accumulated over several.
        pass_step: The step at which the pass over the data began.
        taken: Batches taken in this pass, since it is dealt for as many workers as now.
        dealt_for: How many that are.
        earlier: What was taken of this pass before, when it was dealt for other numbers of workers.
        inside: A pass over the data has begun and is not over.
        moves: How often this worker went to another place; what is loaded beforehand is of no use then.
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
        self._since = 0  # the step at which the data were dealt for as many workers as now
        self._to_skip = 0  # passes over data that are over at the place to which this worker goes
        self._amid = False  # the one that begins next has begun at that place
        self._resuming = False  # so has the pass that `passes` yields next
        self._due: int | None = None  # agreements at that place; None for one that this worker was at itself
        self._counting = False  # `passes` has begun
        self.inside = False
        self.moves = 0
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
        self._counting = True
        if self._resuming and self._due is None:
            self._resuming, self._asked = False, self._before
            yield self._number
        else:
            self._leave_loop()
            self._before = len(self._results)
        while self._resuming or self._number + 1 < count:
            self._begin_numbered()
            yield self._number

    def _begin_numbered(self) -> None:
        self._leave_loop()
        self._forget(self._before)
        if self._resuming:  # where the others are
            self._resuming = False
            return
        self._number += 1
        self._begun = self._to_skip = 0
        self._amid = False

    def begin_pass(self) -> bool:
        """Begin a pass over the data; False when it is over at the place at which this worker goes on.

        Raises:
            ProtocolError: when another one is not over yet.
        """
        if self.inside:
            raise ProtocolError(
                "a pass over session.batches begins while another one is open: a worker that is killed could go on in "
                "one of them only. Inside of a pass, evaluate with the loader itself; a pass that was left early in an "
                "iterator of your own must be closed"
            )
        if self._resuming:
            return False
        if self._to_skip:
            self._to_skip -= 1
            return False
        if self._amid:
            self._amid = False
            self._arrive()
        else:
            self._begun += 1
            self.pass_step, self.taken = self.step, 0
            self.dealt_for, self.earlier = self._workers, ()
        self._leave_loop()
        self.inside, self._outside = True, len(self._results)
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
        self.inside = False
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

    @property
    def place(self) -> Bookmark | None:
        """Where this loop is; None where it does not take its batches here."""
        if not self._begun:
            return None
        passes, shares, agreements = self._number + 1, self._shares, self._agreements
        return Bookmark(self.step, passes, self._begun, self.pass_step, shares, agreements, self._since)

    @property
    def bookmark(self) -> Bookmark | None:
        """Where it is when this step is over."""
        return None if self.place is None else replace(self.place, step=self.step + 1)

    @property
    def fetched(self) -> int:
        """How many batches this worker, or one in its place, has taken in this pass."""
        return sum(taken for _, taken in self._shares)

    @property
    def _shares(self) -> tuple[Share, ...]:
        return (*self.earlier, (self.dealt_for, self.taken))

    def _deal(self, shares: Sequence[Share]) -> None:
        *earlier, (self.dealt_for, self.taken) = shares
        self.earlier = tuple(earlier)

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
        self._turn_to(state["number"], state["begun"])
        self.step, self.pass_step, self._since = state["step"], state["pass_step"], state["since"]
        self._deal(state["shares"])
        self._results = list(state["results"])
        self._before, self._forgotten = state["before"], state["forgotten"]
        self._iteration = self._pushed = self._agreements
        self._pushed_step = self.step
        self._restored, self._scheduled, self.resumed = state["kept"], state["schedule"], True

    def go_to(self, place: Bookmark) -> None:
        """Go on at a place of the others, between two steps: in this pass over data, or in another one.

        Then this one ends, and the loop goes on with what is behind it, up to the pass of that place. What it asks on
        the way the others have agreed on before: it is told the same.
        """
        self._due = place.agreements
        if (place.passes, place.begun) == (self._number + 1, self._begun):
            self._arrive()
        else:
            self.inside = False
            self._turn_to(place.passes - 1, place.begun)
        self.step = self._pushed_step = place.step
        self.pass_step, self._since = place.pass_step, place.since
        self._deal(place.shares)
        self.moves += 1

    def join(self, place: Bookmark, schedule: Sequence[Mapping[str, Any]] | None, lacking: str) -> None:
        """Go to a place of the others at another step than this worker's.

        Args:
            place: Where they are.
            schedule: Hyper-parameters in force, by group; None where only the workers know them.
            lacking: What is to be said of each thing that is to be kept; its name takes the place of ``%s``.
        """
        self.go_to(place)
        self._scheduled, self._lacking, self.resumed = schedule, lacking, True
        for name in self._kept:
            _logger.warning(lacking, name)

    @property
    def on_its_way(self) -> bool:
        """This worker goes to a place of the others, and has not come to its pass yet."""
        return self._due is not None

    def _turn_to(self, number: int, begun: int) -> None:
        """Have the loop go on in the ``begun``-th pass over data of a numbered pass, -1 where they are not numbered."""
        over = self._begun if number == self._number else 0
        self._to_skip, self._amid = max(0, begun - over - 1), begun > 0
        self._resuming = number >= 0 and number != self._number
        self._number, self._begun = number, begun

    def _arrive(self) -> None:
        if self._due is not None:
            self._forgotten, self._due = self._due - len(self._results), None
            self._iteration = self._pushed = self._agreements

    def _now(self) -> dict[str, Any]:
        results = self._results[: self._outside]
        return {
            "step": self.step,
            "pass_step": self.pass_step,
            "since": self._since,
            "shares": self._shares,
            "number": self._number,
            "begun": self._begun,
            "results": results,
            "before": self._before,
            "forgotten": self._agreements - len(results),
            "schedule": copy.deepcopy(self.schedule.state_dict()) if self.schedule is not None else None,
            "kept": {name: copy.deepcopy(one.state_dict()) for name, one in self._kept.items()},
        }
