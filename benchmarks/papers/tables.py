"""The tables of docs/papers.md, from the rows of the recipes: what is printed there is what came out."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.papers.adaptive import FIXED
from benchmarks.papers.convex import split
from benchmarks.papers.detached import ends, largest_stable_rate
from benchmarks.papers.recipe import Oracle, Row
from benchmarks.papers.seeds import Spread, over_seeds
from benchmarks.papers.seeds import final as ends_of
from benchmarks.papers.thresholds import rule

PAGE: Final = Path(__file__).parents[2] / "docs" / "papers.md"

Table = list[list[str]]
"""Lines of cells, the heads of the columns first."""

SETTLED: Final = 0.1  # of a convex run: the last part, over which the noise of single samples is averaged


def percent(value: float) -> str:
    """A fraction in %, to three digits."""
    return f"{100 * value:.3g} %"


def within(spread: Spread) -> str:
    """Mean ± standard deviation; the mean alone where there is but one run."""
    return f"{spread.mean:.2f} ± {spread.deviation:.2f}" if spread.number > 1 else f"{spread.mean:.2f}"


def compared(rows: Sequence[Row], *, sent: bool = False) -> Table:
    """Quality and density of each task, method and wanted density; with ``sent``, the bytes of a round as well."""
    by = ("task", "target", "method")
    kinds = sorted(over_seeds(rows, "quality", by=by).items(), key=lambda item: (str(item[0][0]), -float(item[0][1])))
    densities = over_seeds(rows, "density", by=by)
    head = ["task", "wanted", "method", "density", "quality", "runs"]
    table = [head + ["bytes up", "bytes down"] * sent]
    for key, quality in kinds:
        task, target, method = key
        line = [str(task), percent(float(target)), str(method), percent(densities[key].mean), within(quality)]
        table.append([*line, str(quality.number)])
        if sent:
            for way in ("up_bytes_per_round", "down_bytes_per_round"):
                table[-1].append(f"{over_seeds(rows, way, by=by)[key].mean:,.0f}")
    return table


def beyond(rows: Sequence[Row]) -> Table:
    """The same with the bytes of one worker in a round."""
    return compared(rows, sent=True)


def rates(rows: Sequence[Row]) -> Table:
    """Quality of each task at each rate."""
    return [["task", "rate", "quality"]] + [
        [str(row["task"]), f"{row['rate']:g}", f"{float(row['quality']):.2f}"] for row in rows
    ]


def scales(rows: Sequence[Row]) -> Table:
    """Every try of every method."""
    return [["task", "budget", "method", "scale", "bytes of Top-k's"]] + [
        [str(row["task"]), percent(float(row["target"])), str(row["method"]), f"{row['scale']:g}", f"{row['used']:.3f}"]
        for row in rows
    ]


def thresholds(rows: Sequence[Row]) -> Table:
    """The ladder of each task, and what the paper's rule would have been for the density that came out."""
    return [["task", "λ", "density", "quality", "1/(2√k) for that density"]] + [
        [
            str(row["task"]),
            f"{row['threshold']:g}",
            percent(float(row["density"])),
            f"{float(row['quality']):.2f}",
            f"{rule(float(row['density']), int(row['numel'])):.2g}",
        ]
        for row in rows
    ]


def growth(rows: Sequence[Row]) -> Table:
    """The end of the runs: what was sent, quality, and total error in squared units of the gradient."""
    last, by = ends_of(rows), ("task", "method")
    densities, totals = over_seeds(last, "density", by=by), over_seeds(last, "total_error", by=by)
    return [["task", "method", "density", "quality", "total error", "runs"]] + [
        [*map(str, key), percent(densities[key].mean), within(quality), f"{totals[key].mean:.3g}", str(quality.number)]
        for key, quality in over_seeds(last, "quality", by=by).items()
    ]


def detached(rows: Sequence[Row]) -> Table:
    """Each method at its best rate at either point, and up to which rate it is stable."""
    table = [["method", "best at x", "at rate", "best at x − ē", "at rate", "stable up to"]]
    at_x, at_virtual = ends(rows)
    for method, along in at_x.items():
        line = [method]
        for points in (along, at_virtual[method]):
            best = max(points, key=lambda point: -1.0 if np.isnan(point.quality) else point.quality)
            line += [f"{best.quality:.1f} ± {best.deviation:.1f} %", f"{best.x:.3g}"]
        table.append([*line, f"{largest_stable_rate(along):.3g}"])
    return table


def adaptive(rows: Sequence[Row]) -> Table:
    """Accuracy at either point, and the λ* of the first and the last round, means over the seeds."""
    table = [["λ", "accuracy at x", "at x − ē", "λ* at first", "λ* at last", "runs"]]
    last = [row for row in ends_of(rows) if "quality" in row]
    first = [row for row in rows if row["round"] == 1]
    for (method,), at_x in over_seeds(last, "quality", by=("method",)).items():
        virtual = over_seeds(last, "virtual_quality", by=("method",))[method,]
        best = [f"{over_seeds(some, 'best', by=('method',))[method,].mean:.2f}" for some in (first, last)]
        name = f"fixed {FIXED}" if method == "DEF" else "λ* of the round before"
        table.append([name, within(at_x), within(virtual), *best, str(at_x.number)])
    return table


def convex_sgd(rows: Sequence[Row]) -> Table:
    """What a run sent, its largest error, and f − f* at its end: geometric means of the last tenth and of the seeds."""
    return _convex(rows, ("data", "workers", "method"))


def convex_diana(rows: Sequence[Row]) -> Table:
    """The same, by algorithm."""
    return _convex(rows, ("data", "algorithm", "method"))


def _convex(rows: Sequence[Row], by: tuple[str, str, str]) -> Table:
    table = [[*by, "bits a worker", "largest mean ‖e‖²", "f − f*", "runs"]]
    for key, part in split(rows, *by).items():
        runs = list(split(part, "seed").values())
        bits, error = (float(np.mean([float(run[-1][name]) for run in runs])) for name in ("bits", "most_error"))
        settled = [float(row["excess"]) for run in runs for row in run[-max(1, int(SETTLED * len(run))) :]]
        excess = np.exp(np.mean(np.log(settled)))
        table.append([*map(str, key), f"{bits:,.0f}", f"{error:.2e}", f"{excess:.2e}", str(len(runs))])
    return table


def convex_star(rows: Sequence[Row]) -> Table:
    """The last round of each run."""
    table = [["data", "workers", "method", "steps", "bits a worker", "mean ‖e‖²", "f − f*"]]
    for key, part in split(rows, "data", "workers", "method").items():
        last = part[-1]
        numbers = [f"{last['step']:,}", f"{float(last['bits']):,.0f}"]
        table.append([*map(str, key), *numbers, f"{float(last['error']):.2e}", f"{float(last['excess']):.2e}"])
    return table


def stability(rows: Sequence[Row]) -> Table:
    """The limits of the step, and how far the simulator's is from the formula's."""
    table = [["λ", "formula", "simulator", "difference"]]
    limits = [row for row in rows if row["check"] == "limit"]
    for (coefficient,), measured in over_seeds(limits, "measured", by=("coefficient",)).items():
        formula = over_seeds(limits, "formula", by=("coefficient",))[coefficient,].mean
        table.append(
            [f"{coefficient:g}", f"{formula:.5f}", f"{measured.mean:.5f}", f"{measured.mean / formula - 1:+.2%}"]
        )
    return table


def theory(rows: Sequence[Row]) -> Table:
    """For each bound, how many points were measured, how many lie above it, and how near the nearest came."""
    table = [["bound", "on", "points", "above the bound", "nearest to it", "farthest"]]
    for (theorem, quantity), part in split(rows, "theorem", "quantity").items():
        ratios = [float(row["measured"]) / float(row["bound"]) for row in part]
        broken = sum(ratio > 1 for ratio in ratios)
        line = [str(theorem), str(quantity), str(len(part)), str(broken)]
        table.append([*line, f"{max(ratios):.2g}", f"{min(ratios):.2g}"])
    return table


def through_shards(rows: Sequence[Row]) -> Table:
    """The largest difference of any parameter in any round, elements and quality of both."""
    table = [["method", "rounds", "largest difference", "elements, simulator", "elements, shards", "accuracy of both"]]
    for (method,), part in split(rows, "method").items():
        runs = list(split(part, "seed").values())
        counts = [sum(int(row[name]) for row in part) for name in ("elements_simulated", "elements_sent")]
        both = [[float(run[-1][name]) for run in runs] for name in ("quality_simulated", "quality")]
        quality = ", ".join(f"{one:.2f} and {other:.2f} %" for one, other in zip(*both, strict=True))
        difference = max(float(row["difference"]) for row in part)
        table.append([str(method), str(len(part)), f"{difference:g}", *(f"{count:,}" for count in counts), quality])
    return table


TABLES: Final[Mapping[str, Callable[[Sequence[Row]], Table]]] = {
    "convex_star": convex_star,
    "convex_sgd": convex_sgd,
    "convex_diana": convex_diana,
    "stability": stability,
    "theory": theory,
    "through_shards": through_shards,
    "rates": rates,
    "thresholds": thresholds,
    "density": compared,
    "growth": growth,
    "layerwise": compared,
    "without_feedback": compared,
    "momentum": compared,
    "accordion": compared,
    "detached": detached,
    "adaptive": adaptive,
    "scales": scales,
    "beyond": beyond,
}
"""What is printed of each recipe."""


def of_oracles(oracles: Sequence[Oracle]) -> Table:
    """All numbers that were known beforehand."""
    return [["oracle", "expected", "tolerance", "measured", "ok"]] + [
        [
            one["name"],
            *(f"{one[name]:.10g}" for name in ("expected", "tolerance", "measured")),
            "yes" if one["ok"] else "**no**",
        ]
        for one in oracles
    ]


def markdown(table: Table) -> str:
    """The table as Markdown."""
    head, *lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def put(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"docs/papers.md has no place for {name}: put '{begin.strip()}' and '{end.strip()}' into it")
    return pattern.sub(lambda found: f"{found[1]}{text}{found[2]}", page)


def block(name: str, about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """All that the page has of the recipe ``name``: table, how it came about, figure; ``about`` is its JSON."""
    below = f"*{about['form'].capitalize()} form, {about['core_seconds']:,.0f} core seconds: `results/{name}.csv`.*"
    return f"{markdown(TABLES[name](rows))}\n\n{below}\n\n![{about['shows']}](images/papers-{name}.png)"
