"""The figures, drawn: as SVG that takes the colours of the page it is in, and as PNG for everywhere else.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart; each
run has a line style and a marker of its own, too, and each phase a hatching.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from thresher.deploy.report.breakdown import PHASES, LayerDensity, RunTime, ShardBytes, Times
from thresher.deploy.report.rows import Numbers
from thresher.deploy.report.series import Curves, Panel, Unit
from thresher.deploy.results import bytes_text

AnyFigure = Curves | Times | ShardBytes | LayerDensity
"""The numbers of one figure."""

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS: Final = "os^Dv"
_PHASE_LOOKS: Final = dict(
    zip(PHASES, (("#56B4E9", ""), ("#E69F00", "//"), ("#999999", ".."), ("#009E73", "\\\\")), strict=True)
)
# Stand for the colours of the page until the drawing is text.
_INK, _GRID = "#010203", "#040506"
_WIDTH: Final = 11.0  # inches; 72 points each
_FEW: Final = 60  # points, up to which each has its marker
_DECADES: Final = 1.5  # from which an axis is logarithmic
_FEW_DECADES: Final = 2.0  # up to which a logarithmic axis of bytes has more numbers than the powers of ten
_LEAST_SPAN: Final = 0.05  # of values shown in percent: what is nearly the same has to look so
_MOST_LAYERS: Final = 40
_LIMIT_QUANTILE: Final = 0.98

_LOOK: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a name may have dollars
    "svg.fonttype": "none",  # text stays text: small, selectable, in the font of the page
    "svg.hashsalt": "thresher",  # the same numbers make the same file
}


def svg(figure: AnyFigure) -> str:
    """Return a figure as an ``<svg>`` element to be put into a page; its ink is ``currentColor``.

    Args:
        figure: Its ``name`` begins the ids inside, its ``title`` and ``caption`` are what a screen reader says.
    """
    drawing = _drawn(figure, _INK, _GRID)
    file = io.StringIO()
    with mpl.rc_context(_LOOK):
        drawing.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)  # the page has one
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda one: f' id="{figure.name}-{one[1]}"' if one[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{figure.name}-", text)
    text = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(?<=\d\.\d\d)\d+", "", path[0]), text)  # less is not seen
    labels = f'role="img" aria-labelledby="{figure.name}-title"'
    title = f'<title id="{figure.name}-title">{escape(figure.title)}</title>'
    text = re.sub(r"<svg([^>]*)>", rf"<svg {labels}\1>{title}", text, count=1)
    return text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")


def png(figure: AnyFigure) -> bytes:
    """Return a figure as a PNG image, dark on white."""
    drawing = _drawn(figure, "#1b1f24", "#d8dce0")
    drawing.suptitle(figure.title, x=0.01, ha="left", fontsize=12)
    file = io.BytesIO()
    with mpl.rc_context(_LOOK):
        drawing.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _drawn(figure: AnyFigure, ink: str, grid: str) -> Figure:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "hatch.color")
    inks: dict[Any, Any] = dict.fromkeys(inked, ink)
    with mpl.rc_context({**_LOOK, **inks, "grid.color": grid}):
        match figure:
            case Curves():
                return _curves(figure)
            case Times():
                return _times(figure)
            case ShardBytes():
                return _shards(figure)
            case LayerDensity():
                return _layers(figure)


def _empty(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _curves(figure: Curves) -> Figure:
    drawing = _empty(3.1)
    grid = drawing.subplots(1, len(figure.panels), squeeze=False)[0]
    lines, *_ = [_panel(axes, panel) for axes, panel in zip(grid, figure.panels, strict=True)]
    names = [curve.name for curve in figure.panels[0].curves]
    drawing.legend(lines, names, loc="outside lower left", ncols=min(5, len(names)))
    return drawing


def _panel(axes: Axes, panel: Panel) -> list[Line2D]:
    """Draw the curves, and return their lines."""
    values = np.concatenate([np.concatenate([curve.points.least, curve.points.most]) for curve in panel.curves])
    is_log = not panel.is_sum and _decades(values) > _DECADES
    lines: list[Line2D] = []
    for curve in panel.curves:
        colour, line, marker = _look(curve.run)
        points = curve.points
        many = points.x.size > _FEW
        every = (curve.run * 7 % 40, max(1, points.x.size // 8)) if many else 1
        lines += axes.plot(
            points.x, _drawable(points.mean, is_log=is_log), color=colour, linestyle=line, marker=marker,
            markevery=every,
        )  # fmt: skip
        if many:
            least, most = _drawable(points.least, is_log=is_log), _drawable(points.most, is_log=is_log)
            axes.fill_between(points.x, least, most, color=colour, alpha=0.18, linewidth=0)
    _set_upright(axes, panel, values, is_log=is_log)
    _set_along(axes, panel)
    axes.set_title(panel.quantity)
    return lines


def _set_upright(axes: Axes, panel: Panel, values: Numbers, *, is_log: bool) -> None:
    if is_log:
        axes.set_yscale("log")
    elif panel.unit == "%":
        middle = (values.min(initial=1.0) + values.max(initial=0.0)) / 2
        span = np.clip([middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2], 0.0, 1.0)
        axes.update_datalim([(0.0, end) for end in span], updatex=False)
        axes.autoscale_view()
    else:
        axes.update_datalim([(0.0, 0.0)], updatex=False)  # from zero
        axes.autoscale_view()
        axes.set_ylim(bottom=min(0.0, float(values.min(initial=0.0))))
    _format(axes.yaxis, panel.unit, is_log=is_log)


def _set_along(axes: Axes, panel: Panel) -> None:
    ends = np.array([curve.points.x[-1] for curve in panel.curves if curve.points.x.size])
    if panel.against == "bytes":
        if _decades(ends) > 1.0:
            axes.set_xscale("log")
            if _decades(np.array(axes.get_xlim())) < _FEW_DECADES:
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)
    axes.set_xlabel("bytes moved, both directions" if panel.against == "bytes" else "iteration")


def _format(axis: Any, unit: Unit, *, is_log: bool) -> None:  # noqa: ANN401 - both axes of matplotlib, which has no public base
    formatters = {
        "bytes": EngFormatter(unit="B"),
        "%": FuncFormatter(lambda value, _: f"{100 * value:g}%"),
        "": FuncFormatter(lambda value, _: f"{value:g}"),
    }
    axis.set_major_formatter(formatters[unit])
    if is_log:
        axis.set_minor_formatter(NullFormatter())


def _look(run: int) -> tuple[str, Any, str]:
    return _COLOURS[run % len(_COLOURS)], _LINES[run % len(_LINES)], _MARKERS[run % len(_MARKERS)]


def _decades(values: Numbers) -> float:
    positive = values[values > 0]
    return float(np.log10(positive.max() / positive.min())) if positive.size else 0.0


def _drawable(values: Numbers, *, is_log: bool) -> Numbers:
    return np.where(values > 0, values, np.nan) if is_log else values


def _times(figure: Times) -> Figure:
    columns = min(3, len(figure.runs))
    rows = -(-len(figure.runs) // columns)
    heights = [2.5 * rows, 0.9 + 0.32 * len(figure.runs)]
    drawing = _empty(sum(heights))
    above, below = drawing.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    grid = above.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(figure.runs) :]:
        axes.set_visible(False)
    for axes, run in zip(grid.flat, figure.runs, strict=False):
        _stack(axes, run)
        axes.set_ylim(0, _limit(figure.runs))
    totals = below.subplots()
    left = np.zeros(len(figure.runs))
    names = [run.name for run in figure.runs]
    for phase, (colour, hatch) in _PHASE_LOOKS.items():
        seconds = np.array([run.total[phase] for run in figure.runs])
        totals.barh(names, seconds, left=left, color=colour, hatch=hatch, label=phase, height=0.7, linewidth=0)
        left += seconds
    totals.invert_yaxis()
    totals.set_title("in all, seconds of a worker (mean over workers)")
    totals.grid(visible=False, axis="y")
    handles, labels = totals.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower left", ncols=len(labels))
    return drawing


def _stack(axes: Axes, run: RunTime) -> None:
    layers = axes.stackplot(
        run.iteration, *(1000 * run.seconds[phase] for phase in PHASES),
        colors=[_PHASE_LOOKS[phase][0] for phase in PHASES],
    )  # fmt: skip
    for layer, phase in zip(layers, PHASES, strict=True):
        layer.set_hatch(_PHASE_LOOKS[phase][1])
        layer.set_linewidth(0)
    axes.set_title(f"{run.name}: milliseconds an iteration")
    axes.set_xlabel("iteration")


def _limit(runs: Sequence[RunTime]) -> float:
    """Return where the milliseconds of an iteration end: a single slow one, as the first is, would hide the rest."""
    wholes = [np.asarray(sum(run.seconds.values())) for run in runs]
    return 1300 * max(float(np.quantile(whole, _LIMIT_QUANTILE)) for whole in wholes) or 1.0


def _shards(figure: ShardBytes) -> Figure:
    drawing = _empty(1.0 + 0.3 * len(figure.bars))
    labels = [f"{bar.name}, shard {bar.shard}" for bar in figure.bars]
    up, down = drawing.subplots(1, 2, sharey=True)
    for axes, title, volumes in (
        (up, "up: pushed to the shard", [bar.up for bar in figure.bars]),
        (down, "down: pulled from it", [bar.down for bar in figure.bars]),
    ):
        drawn = axes.barh(labels, volumes, color=[_look(bar.run)[0] for bar in figure.bars], height=0.72)
        axes.bar_label(drawn, [bytes_text(volume) for volume in volumes], padding=4)
        axes.margins(x=0.16)
        axes.set_title(title)
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.grid(visible=False, axis="y")
    up.invert_yaxis()
    return drawing


def _layers(figure: LayerDensity) -> Figure:
    shown = [min(_MOST_LAYERS, len(run.layers)) for run in figure.runs]
    drawing = _empty(0.9 * len(shown) + 0.19 * sum(shown))
    grid = drawing.subplots(len(shown), 1, squeeze=False, height_ratios=shown)[:, 0]
    densities = np.concatenate([run.density.ravel() for run in figure.runs])
    positive = densities[densities > 0]
    norm = LogNorm(float(positive.min(initial=1.0)), 1.0) if _decades(densities) > 0 else LogNorm(0.1, 1.0)
    image = None
    for axes, run, count in zip(grid, figure.runs, shown, strict=True):
        density = np.where(run.density[:count] > 0, run.density[:count], np.nan)
        edges = (float(run.iteration[0]), float(run.iteration[-1]))
        image = axes.imshow(
            density, aspect="auto", norm=norm, cmap="cividis", interpolation="nearest",
            extent=(0.0, max(edges), count - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(range(count), run.layers[:count])
        axes.grid(visible=False)
        axes.set_title(run.name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel("iteration")
    if image is not None:
        percent = FuncFormatter(lambda value, _: f"{100 * value:g}%")
        scale = drawing.colorbar(image, ax=list(grid), format=percent, pad=0.01)
        if scale.solids is not None:
            scale.solids.set_rasterized(True)  # else 256 paths
    return drawing
