"""How all figures look."""

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# One colour and marker for a method, in every figure.
STYLES: Final = {
    "dense": ("#222222", "x"),
    "hard threshold": ("#c1440e", "o"),
    "Top-k": ("#1f5aa6", "s"),
    "Random-k": ("#7a7a7a", "v"),
    "ACCORDION": ("#2e8b57", "^"),
    "DEF": ("#8e44ad", "D"),
    "DEF-A": ("#c98bdb", "d"),
    "EF": ("#1f5aa6", "s"),
    "SAEF": ("#e0a100", "P"),
    "CSER": ("#2e8b57", "^"),
    "EF21": ("#e0a100", "P"),
    "DGC": ("#2e8b57", "^"),
    "SIDCo": ("#0fa3b1", "v"),
    "budget": ("#e75480", "*"),
}


def panels(columns: int, *, rows: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels, and these from left to right and top to bottom."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.grid(visible=True, color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colour_of(method: str) -> str:
    """The colour of ``method``, grey if it has none of its own."""
    return STYLES.get(method, ("#999999", "."))[0]


def marker_of(method: str) -> str:
    """The marker of ``method``."""
    return STYLES.get(method, ("#999999", "."))[1]


def curve(axes: Axes, method: str, x: Sequence[float], y: Sequence[float], *, label: str | None = None) -> None:
    """A line over many points."""
    axes.plot(x, y, color=colour_of(method), linewidth=1.4, label=method if label is None else label)


def points(
    axes: Axes,
    method: str,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[float],
    *,
    label: str | None = None,
) -> None:
    """Points with their spread (as bars up and down, in the unit of y), joined by a line."""
    shown = method if label is None else label
    axes.errorbar(
        x,
        y,
        yerr=spread,
        color=colour_of(method),
        marker=marker_of(method),
        linewidth=1.2,
        markersize=5,
        capsize=2,
        label=shown,
    )
