"""The figures of what goes up and down: numbers over iterations and over bytes, ready to be drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, final, get_args

import numpy as np

from thresher.deploy.report.rows import Numbers
from thresher.deploy.report.runs import Run
from thresher.deploy.report.thinning import Thinned, thin, thin_growing
from thresher.deploy.results import bytes_text

Against = Literal["bytes", "iteration"]
Unit = Literal["bytes", "%", ""]

_LAST_PART: Final = 20  # one in twenty iterations are "the end"


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """One run in a panel.

    Attributes:
        run: Its position among the runs of the report: the same in all figures, and so are colour and line.
        name: Its name.
        points: Where it goes.
    """

    run: int
    name: str
    points: Thinned


@final
@dataclass(frozen=True, slots=True)
class Panel:
    """Axes with a curve for each run.

    Attributes:
        quantity: What goes up.
        unit: Its unit: ``bytes``, ``%`` (of values 0 … 1) or none.
        against: What goes right.
        curves: Of those runs that have it.
        is_sum: It adds up from the beginning on.
    """

    quantity: str
    unit: Unit
    against: Against
    curves: tuple[Curve, ...]
    is_sum: bool = False


@final
@dataclass(frozen=True, slots=True)
class Curves:
    """A figure of panels side by side.

    Attributes:
        name: Of its files.
        title: For people.
        caption: What is seen, in numbers.
        panels: From left to right.
    """

    name: str
    title: str
    caption: tuple[str, ...]
    panels: tuple[Panel, ...]

    def table(self) -> Iterator[Sequence[Any]]:
        """Yield the numbers, a header first: a line per point."""
        yield "run", "quantity", "against", "at", "mean", "least", "most"
        for panel in self.panels:
            for curve in panel.curves:
                points = curve.points
                for at in zip(points.x, points.mean, points.least, points.most, strict=True):
                    yield curve.name, panel.quantity, panel.against, *map(float, at)


@final
@dataclass(frozen=True, slots=True)
class LeftOut:
    """A figure that cannot be drawn.

    Attributes:
        title: What it would have been.
        why: What is missing.
    """

    title: str
    why: str


def curve_figures(runs: Sequence[Run]) -> list[Curves | LeftOut]:
    """Return the figures of all that has a value per iteration."""
    both = {"up": "push_bytes", "down": "pull_bytes"}
    densities = {"pushes": "push_density", "updates": "update_density"}
    return [
        _printed(runs, "loss"),
        _printed(runs, "accuracy"),
        _over_iterations(
            runs, "bytes", "Bytes of each iteration", "bytes",
            {f"{way}, bytes": partial(_column, field=field) for way, field in both.items()},
            lambda run: "; ".join(f"{way} {_volume(run.rounds[field])}" for way, field in both.items()),
        ),
        _over_iterations(
            runs, "density", "Density of pushes and of updates", "%",
            {f"of the {name}": partial(_compressed, field=field) for name, field in densities.items()},
            lambda run: "; ".join(
                f"{name} {_mean_text(_compressed(run, field), _percent)}" for name, field in densities.items()
            ),
        ),
        _over_iterations(
            runs, "threshold", "Threshold", "",
            {"λ, gradient units": partial(_compressed, field="threshold")},
            lambda run: _mean_text(_compressed(run, "threshold"), _short),
        ),
        _over_iterations(
            runs, "residual", "Norm of what the workers keep", "",
            {"residual norm": _residual_norm},
            lambda run: f"{_mean_text(_residual_norm(run), _short)}; {_short(_last(_residual_norm(run)))} at the end",
        ),
        _over_iterations(
            runs, "total-error", "Total error", "",
            {"Σ of squared residual norms": _total_error},
            lambda run: f"{_short(_total_error(run)[-1])} after {run.rounds['version'][-1]:.0f} iterations",
            is_sum=True,
        ),
    ]  # fmt: skip


def _over_iterations(
    runs: Sequence[Run],
    name: str,
    title: str,
    unit: Unit,
    columns: Mapping[str, Callable[[Run], Numbers]],
    said: Callable[[Run], str],
    *,
    is_sum: bool = False,
) -> Curves | LeftOut:
    """Make a figure with a panel for each of ``columns``: of the runs that have it."""
    have = {i: run for i, run in enumerate(runs) if any(np.isfinite(column(run)).any() for column in columns.values())}
    if not have:
        return LeftOut(title, "no run has it")
    thinned = thin_growing if is_sum else thin
    panels = tuple(
        Panel(quantity, unit, "iteration", tuple(
            Curve(position, run.name, thinned(run.rounds["version"], column(run))) for position, run in have.items()
        ), is_sum)
        for quantity, column in columns.items()
    )  # fmt: skip
    return Curves(name, title, tuple(f"{run.name}: {said(run)}." for run in have.values()), panels)


def _printed(runs: Sequence[Run], name: str) -> Curves | LeftOut:
    title = f"{name.capitalize()} against bytes and iterations"
    found = {position: data for position, run in enumerate(runs) if (data := _placed(run, name)) is not None}
    if not found:
        return LeftOut(title, f"no run has a printed.jsonl with {name}, as the script of rank 0 prints it")
    panels = tuple(
        Panel(name, "%" if name == "accuracy" else "", against, tuple(
            Curve(position, runs[position].name, thin(places[against], value))
            for position, (places, value) in found.items()
        ))
        for against in get_args(Against)
    )  # fmt: skip
    caption = tuple(
        f"{runs[position].name}: {_course(value, _percent if name == 'accuracy' else _short)} after "
        f"{bytes_text(places['bytes'][-1])} and {places['iteration'][-1]:.0f} iterations."
        for position, (places, value) in found.items()
    )
    return Curves(name, title, caption, panels)


def _placed(run: Run, name: str) -> tuple[dict[Against, Numbers], Numbers] | None:
    """Return where a printed number belongs, joined on time, and the number; None where nothing was printed.

    Without a file of what was printed, a result still has the last value, which belongs to the end of the run.
    """
    iteration, moved = np.append(0.0, run.rounds["version"]), np.append(0.0, run.moved)
    if name in run.printed:
        printed = run.printed[name]
        closed = np.searchsorted(run.rounds["time"], printed.time, side="right")
        return {"bytes": moved[closed], "iteration": iteration[closed]}, printed.value
    last = run.number(name)
    return None if last is None else ({"bytes": moved[-1:], "iteration": iteration[-1:]}, np.array([last]))


def _column(run: Run, field: str) -> Numbers:
    return run.rounds[field]


def _compressed(run: Run, field: str) -> Numbers:
    """Return a column of what compression did; NaN in rounds for a mean only, in which nothing was compressed."""
    return np.where(run.rounds["only_mean"] == 0, run.rounds[field], np.nan)


def _residual_norm(run: Run) -> Numbers:
    return np.sqrt(_compressed(run, "residual_squared"))


def _total_error(run: Run) -> Numbers:
    return np.nancumsum(_compressed(run, "residual_squared"))


def _last(column: Numbers) -> float:
    return float(column[np.isfinite(column)][-1])


def _volume(column: Numbers) -> str:
    return f"{_mean_text(column, bytes_text)}, {bytes_text(column.sum())} in all"


def _mean_text(column: Numbers, text: Callable[[float], str]) -> str:
    there = column[np.isfinite(column)]
    if not there.size:
        return "none"
    mean, least, most = (text(value) for value in (there.mean(), there.min(), there.max()))
    return f"{mean} throughout" if least == most else f"{mean} on average ({least} … {most})"


def _course(column: Numbers, text: Callable[[float], str]) -> str:
    """Say where a series began and where it ended."""
    there = column[np.isfinite(column)]
    strange = (
        f" (without {column.size - there.size} of {column.size} that are not finite)"
        if there.size < column.size
        else ""
    )
    if not there.size:
        return f"no finite value{strange}"
    end = there[-max(1, there.size // _LAST_PART) :]
    begin = f"from {text(there[0])} to " if there.size > 1 else ""
    return f"{begin}{text(end.mean())}{' (mean of the last twentieth)' if end.size > 1 else ''}{strange}"


def _percent(value: float) -> str:
    return f"{value:.3g}" if value == 0 else f"{value:.2%}" if value >= 1e-3 else f"{100 * value:.2g}%"


def _short(value: float) -> str:
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
