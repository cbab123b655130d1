"""Draws what the dashboard's panels showed while compose_proof.py watched a run; takes `thresher[report]`.

    python benchmarks/compose_panels.py [runs/compose/panels.json] [docs/images/dashboard.png]

The panels lie where Grafana lays them; the numbers are Prometheus' own. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart; each line has a style of its own, too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, PercentFormatter

ROOT = Path(__file__).parents[1]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "\\\\")
COLUMNS = 24  # of Grafana's grid
ROW_HEIGHT = 0.3  # inches
MARGIN = 5.0  # seconds, before the first round
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8dce0",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def formatter(unit: str) -> Formatter:
    formatters = {
        "decbytes": EngFormatter(unit="B"),
        "percentunit": PercentFormatter(1.0),
        "s": EngFormatter(unit="s", places=None),
    }
    return formatters.get(unit, FuncFormatter(lambda value, _: f"{value:g}"))


def draw_number(axes: Axes, panel: dict[str, Any]) -> None:
    """Draw what the panel of a single number showed last."""
    axes.axis("off")
    axes.set_title(panel["title"])
    points = [point for line in panel["lines"] for point in line["points"]]
    if not points:
        return
    _, last = points[-1]
    text = {
        "decbytes": EngFormatter(unit="B", places=1)(last),
        "percentunit": f"{last:.2%}",
        "s": EngFormatter(unit="s", places=0)(last),
    }.get(panel["unit"], f"{last:.3g}")
    axes.text(0.0, 0.35, text, fontsize=20, color=COLOURS[0], va="center", transform=axes.transAxes)


def draw_lines(axes: Axes, panel: dict[str, Any], killed: dict[str, float]) -> None:
    for at in killed.values():
        axes.axvline(at, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)))
    lines = [line for line in panel["lines"] if line["points"]]
    if lines and "stacking" in panel["look"]:
        stack(axes, lines)
    else:
        for number, line in enumerate(lines):
            seconds, values = zip(*line["points"], strict=True)
            colour, style = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
            axes.plot(seconds, values, label=line["name"], color=colour, linestyle=style)
    if panel["look"].get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(formatter(panel["unit"]))
    axes.set_title(panel["title"])
    if any(line["name"] for line in lines):
        axes.legend(loc="best", ncols=2)


def stack(axes: Axes, lines: list[dict[str, Any]]) -> None:
    """Draw lines on top of each other, at the instants that all of them have."""
    values = [dict(line["points"]) for line in lines]
    instants = sorted(set(values[0]).intersection(*values[1:]))
    heights = [[value[at] for at in instants] for value in values]
    layers = axes.stackplot(instants, *heights, labels=[line["name"] for line in lines], colors=COLOURS, alpha=0.75)
    for layer, hatch in zip(layers, HATCHES, strict=False):
        layer.set_hatch(hatch)


def drawn(panels: list[dict[str, Any]], killed: dict[str, float]) -> Figure:
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(12, ROW_HEIGHT * rows), layout="constrained")
    grid = figure.add_gridspec(rows, COLUMNS)
    instants = [at for panel in panels for line in panel["lines"] for at, _ in line["points"]]
    rounds = [at for panel in panels if panel["title"] == "Iterations" for line in panel["lines"]
              for at, value in line["points"] if value > 0]  # fmt: skip
    began = max(0.0, min(rounds, default=0.0) - MARGIN)
    for panel in panels:
        place = panel["gridPos"]
        down, across = slice(place["y"], place["y"] + place["h"]), slice(place["x"], place["x"] + place["w"])
        axes = figure.add_subplot(grid[down, across])
        if panel["type"] == "stat":
            draw_number(axes, panel)
        else:
            draw_lines(axes, panel, killed)
            axes.set_xlim(began, max(instants))
    names = " and ".join(f"{name} after {at:.0f} s" for name, at in sorted(killed.items(), key=lambda one: one[1]))
    figure.supxlabel(f"seconds since `docker compose up`; dotted: killed, {names}", fontsize=9.5, x=0.01, ha="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("panels", type=Path, nargs="?", default=ROOT / "runs" / "compose" / "panels.json")
    parser.add_argument("picture", type=Path, nargs="?", default=ROOT / "docs" / "images" / "dashboard.png")
    options = parser.parse_args()
    found = json.loads(options.panels.read_text(encoding="utf-8"))
    with mpl.rc_context(LOOK):
        drawn(found["panels"], found["killed"]).savefig(options.picture, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
