"""``thresher top``: a run as it goes, redrawn in place on a terminal, a line a second elsewhere."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from thresher.deploy.results import bytes_text
from thresher.deploy.stop_signals import StopRequestedError, StopSignals
from thresher.deploy.watching import ShardLook, Watch, totals_of
from thresher.deploy.watching_columns import fitting
from thresher.deploy.watching_places import Place
from thresher.deploy.watching_rates import Pace, Rates, sparkline, total
from thresher.deploy.watching_tables import age_text, each_text, pace_rows, pace_text, troubles, worker_rows

_TIMEOUT_SECONDS: Final = 5.0
_SPARKS: Final = 24


@final
@dataclass(frozen=True, slots=True)
class View:
    """A run at one moment, with how fast it goes.

    Attributes:
        name: Of the run.
        looks: Each shard.
        rates: Of each shard.
        history: Bytes per iteration over all shards, of the looks so far, the latest last.
        is_over: Nothing more is to be expected of any shard.
    """

    name: str
    looks: Sequence[ShardLook]
    rates: Sequence[Rates]
    history: Sequence[float]
    is_over: bool

    def line(self) -> str:
        """Return the run on one line: what is said where nothing can be redrawn."""
        now, totals = total(self.rates), totals_of(self.looks)
        silent = "".join(f", {line.partition(': ')[0]}" for line in troubles(self.looks))
        return (
            f"{self.name}: iteration {totals.iterations:,}, {pace_text(now)}/s, last {age_text(now)}, per "
            f"iteration {each_text(now.up)} up and {each_text(now.down)} down, density {totals.density:.2%}, "
            f"ratio {totals.compression_ratio:,.1f}, {totals.members} of {totals.workers} workers{silent}"
        )

    def drawing(self, console: Console) -> Group:
        """Return the run as two lines and two tables, as wide as the console has room for."""
        now, totals = total(self.rates), totals_of(self.looks)
        first = Text.assemble(
            (self.name, "bold"),
            f": iteration {totals.iterations:,}, {pace_text(now)} per second, last ",
            age_text(now),
            f", density {totals.density:.2%}, ratio {totals.compression_ratio:,.1f}",
        )
        second = Text(
            f"{sparkline(self.history, _SPARKS)} bytes per iteration: "
            f"{each_text(now.up)} up, {each_text(now.down)} down"
        )
        parts: list[RenderableType] = [first, second, fitting("", pace_rows(self.looks, self.rates), console)]
        if workers := worker_rows(self.looks):
            parts.append(fitting("", workers, console))
        return Group(*parts, *(Text(line) for line in troubles(self.looks)))


@final
class Follower:
    """Makes views of a run from one look after the other."""

    def __init__(self, place: Place, watch: Watch) -> None:
        """Nothing has been seen."""
        self._place, self._watch = place, watch
        self._paces = [Pace() for _ in place.shards]
        self._history: list[float] = []

    def view(self, patience: float) -> View:
        """Look, and wait for answers for no longer than ``patience`` seconds."""
        looks = self._watch.look(patience)
        now = time.monotonic()
        rates = [
            pace.see(look.statistics if look.state == "SERVING" else None, now)
            for pace, look in zip(self._paces, looks, strict=True)
        ]
        return View(self._place.name, looks, rates, self._series(), self._is_over(looks))

    def _is_over(self, looks: Sequence[ShardLook]) -> bool:
        states = {look.state for look in looks}
        if "FAILED" in states and "SERVING" not in states:
            return True
        if self._place.outcome is None:
            return all(look.has_finished for look in looks)
        return states == {"ENDED"} and bool(self._place.outcome())  # a launch may run the baseline next

    def _series(self) -> list[float]:
        """Add the shards' histories up, aligned at their ends."""
        length = min(len(pace.history) for pace in self._paces)
        tails = (list(pace.history)[len(pace.history) - length :] for pace in self._paces)
        return [math.fsum(values) for values in zip(*tails, strict=True)]


@final
class Screen:
    """Shows views as they come."""

    def __init__(self, console: Console) -> None:
        """Show on ``console``."""
        self._console = console
        can_redraw = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False) if can_redraw else None

    def __enter__(self) -> Self:
        """Begin."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last view where it is."""
        if self._live is not None:
            self._live.stop()

    def show(self, view: View) -> None:
        """Show the run as it is now."""
        if self._live is None:
            self._console.print(view.line(), highlight=False, markup=False, soft_wrap=True)
        else:
            self._live.update(view.drawing(self._console), refresh=True)


def follow(place: Place, console: Console, *, seconds: float, interval: float) -> bool:
    """Show a run until it is over, ``seconds`` have passed, or Ctrl-C; then say in a line what it came to.

    Args:
        place: Where the run is. It need not have begun.
        console: Where it is shown.
        seconds: After which to end; infinity for never.
        interval: Seconds between two looks.

    Returns:
        False when a shard did not serve at the end, and its run was not over.

    Raises:
        StopRequestedError: after SIGTERM.
    """
    interrupted, view = False, View(place.name, (), (), (), is_over=False)
    with StopSignals() as stop, Watch(place, "thresher top", _TIMEOUT_SECONDS) as watch, Screen(console) as screen:
        try:
            for view in _views(Follower(place, watch), stop, seconds, interval):
                screen.show(view)
        except StopRequestedError as error:
            if error.number != signal.SIGINT:
                raise
            interrupted = True
    console.print(_summary(place, view), highlight=False, markup=False, soft_wrap=True)
    return interrupted or all(look.state in ("SERVING", "ENDED") for look in view.looks)


def _views(follower: Follower, stop: StopSignals, seconds: float, interval: float) -> Iterator[View]:
    """Yield a view each ``interval`` seconds, the last one when the run is over or the time is up."""
    now = begin = time.monotonic()
    view = follower.view(interval)
    while not view.is_over and (now := time.monotonic()) - begin < seconds:
        yield view
        due = min(now + interval, begin + seconds)
        stop.pause(due - now)
        view = follower.view(interval)
    yield view


def _summary(place: Place, view: View) -> str:
    if place.outcome is not None and (outcome := place.outcome()):
        return f"{place.name} has ended. {outcome}"
    totals = totals_of(view.looks)
    failed = [look for look in view.looks if look.state == "FAILED"]
    what = "goes on" if not view.is_over else f"has failed: {failed[0].reason}" if failed else "has ended"
    return (
        f"{place.name} {what}. {totals.iterations:,} iterations, {bytes_text(totals.push_bytes)} up, "
        f"{bytes_text(totals.pull_bytes)} down, compression ratio {totals.compression_ratio:,.1f}"
    )
