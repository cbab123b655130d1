"""What is going on, for people: a live table on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thresher.deploy.results import bytes_text
from thresher.protos.accounting import compression_ratio
from thresher.v1 import aggregation_pb2 as pb

_PLAIN_SECONDS: Final = 10.0


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """A run at one moment.

    Attributes:
        title: What runs.
        shards: Counters of each shard that answers.
        printed: What each worker's script printed as data, by rank.
        seconds: Since the run began.
        passes: For each rank the epoch it is in and the step at which that began, as far as its script says.
    """

    title: str
    shards: Sequence[pb.StatisticsResponse]
    printed: Sequence[Mapping[str, Any]]
    seconds: float
    passes: Mapping[int, tuple[int, int]]

    def lines(self) -> list[tuple[str, ...]]:
        """Return a line for each worker, then one for each shard, in the columns of `COLUMNS`."""
        ranks = range(len(self.printed))
        return [self._worker(rank) for rank in ranks] + [_shard(shard) for shard in self.shards]

    def _worker(self, rank: int) -> tuple[str, ...]:
        seen = [shard.workers[rank] for shard in self.shards if rank < len(shard.workers)]
        if not seen:
            return (f"worker {rank}", "starting", *("",) * 7)
        step, push, pull = min(w.steps for w in seen), sum(w.push_bytes for w in seen), sum(w.pull_bytes for w in seen)
        numel = sum(shard.numel for shard in self.shards)
        now = sum(w.density * shard.numel for w, shard in zip(seen, self.shards, strict=True)) / max(1, numel)
        pushable = sum(w.pushable_elements for w in seen)
        printed = self.printed[rank]
        return (
            f"worker {rank}",
            min((w.state for w in seen), key=_progress),
            str(step),
            f"{printed['loss']:.4f}" if isinstance(printed.get("loss"), float) else "",
            f"{now:.2%}",
            bytes_text(push),
            bytes_text(pull),
            f"{compression_ratio(pushable, push + pull):.1f}" if pushable else "",
            self._time_left(rank, step),
        )

    def _time_left(self, rank: int, step: int) -> str:
        """Estimate from the steps that the epochs so far have taken."""
        epoch, begin = self.passes.get(rank, (0, 0))
        epochs = self.printed[rank].get("epochs")
        if not isinstance(epochs, int) or not 0 < epoch < epochs or not begin:
            return ""
        return f"{self.seconds / step * max(0.0, begin / epoch * epochs - step):.0f} s"


COLUMNS: Final = ("", "state", "step", "loss", "density", "up", "down", "ratio", "left")


def _shard(shard: pb.StatisticsResponse) -> tuple[str, ...]:
    push, pull = sum(w.push_bytes for w in shard.workers), sum(w.pull_bytes for w in shard.workers)
    pushable = sum(w.pushable_elements for w in shard.workers)
    return (
        f"shard {shard.shard}",
        shard.state,
        str(shard.version),
        "",
        f"{shard.update_density:.2%}",
        bytes_text(push),
        bytes_text(pull),
        f"{compression_ratio(pushable, push + pull):.1f}" if pushable else "",
        "",
    )


def _progress(state: str) -> int:
    order = ("aborted", "lost", "waited for", "registered", "exchanging", "left")
    return order.index(state) if state in order else 0


def table_of(picture: Picture) -> Table:
    """Draw a picture: density is that of the last push (workers) or update (shards), bytes are totals."""
    table = Table(title=f"{picture.title}, {picture.seconds:.0f} s", title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for line in picture.lines():
        table.add_row(*line)
    return table


@final
class Display:
    """Shows pictures as they come: redrawn in place on a terminal, one line every ten seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        """Show on ``console``."""
        self._console = console
        can_redraw = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True) if can_redraw else None
        self._last_plain = time.monotonic()

    def __enter__(self) -> "Display":
        """Begin."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def show(self, picture: Picture) -> None:
        """Show the run as it is now."""
        if self._live is not None:
            self._live.update(Group(table_of(picture), Text()), refresh=True)
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            first = dict(zip(COLUMNS, picture.lines()[0], strict=True))
            self._console.print(
                f"{picture.title}: {first['state']}, step {first['step']}, loss {first['loss']}, "
                f"density {first['density']}, up {first['up']}, down {first['down']} (worker 0)",
                highlight=False,
                soft_wrap=True,
            )
