"""The report: a table of the runs, what a reader has to know, and the figures, on one page."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from thresher.deploy.report.breakdown import layer_figure, shard_figure, time_figure
from thresher.deploy.report.figures import AnyFigure, png, svg
from thresher.deploy.report.runs import Run
from thresher.deploy.report.series import LeftOut, curve_figures
from thresher.deploy.results import bytes_text
from thresher.deploy.whole_files import write_whole
from thresher.protos.errors import ConfigurationError

_DENSE: Final = 0.99  # mean density from which a run is what the others are compared with
_SAID: Final = ("threshold", "density", "budget", "precision")


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What a report has to show.

    Attributes:
        runs: In order.
        figures: Those that can be drawn.
        left_out: Those that cannot.
    """

    runs: tuple[Run, ...]
    figures: tuple[AnyFigure, ...]
    left_out: tuple[LeftOut, ...]


def make_report(runs: Sequence[Run]) -> Report:
    """Choose the figures that these runs have the numbers of."""
    several = [*curve_figures(runs), time_figure(runs), shard_figure(runs), layer_figure(runs)]
    drawn = tuple(one for one in several if not isinstance(one, LeftOut))
    return Report(tuple(runs), drawn, tuple(one for one in several if isinstance(one, LeftOut)))


def write_page(report: Report, path: Path) -> None:
    """Write the page: one HTML file that loads nothing.

    Raises:
        ConfigurationError: when it cannot be written there.
    """
    template = files("thresher.deploy.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    columns, rows = run_table(report.runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.from_string(template).render(
        title="Thresher: " + ", ".join(run.name for run in report.runs),
        version=version("thresher"),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        columns=columns,
        rows=rows,
        notices=[(run.name, notice) for run in report.runs for notice in run.notices],
        figures=[(figure, Markup(svg(figure))) for figure in report.figures],  # noqa: S704 - our own drawing, names in it escaped
        left_out=report.left_out,
    )
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}; choose another --output") from None


def write_figures(report: Report, folder: Path) -> None:
    """Write each figure as ``NAME.png``, and its numbers as ``NAME.csv``; the table of the runs as ``runs.csv``.

    Raises:
        ConfigurationError: when they cannot be written there.
    """
    columns, rows = run_table(report.runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "runs.csv", _csv([columns, *rows]))
        for figure in report.figures:
            (folder / f"{figure.name}.png").write_bytes(png(figure))
            write_whole(folder / f"{figure.name}.csv", _csv(figure.table()))
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written to: {error.strerror}; choose other --figures") from None


def _csv(rows: Any) -> str:  # noqa: ANN401 - whatever cells a figure has
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def run_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a row of texts for each run."""
    columns = ["run", "sends", "mode", "workers", "shards", "accuracy", "loss", "iterations", "up", "down", "density",
               "ratio", "seconds"]  # fmt: skip
    rows = [_row(run) for run in runs]
    dense = next((run for run in runs if (run.number("mean_density") or 0.0) > _DENSE), None)
    if dense is not None and len(runs) > 1:
        columns.insert(-1, f"bytes over {dense.name}")
        for run, row in zip(runs, rows, strict=True):
            row.insert(-1, f"{_moved(run) / _moved(dense):.3g}")
    return columns, rows


def _row(run: Run) -> list[str]:
    consistency = run.settings.get("consistency")
    mode = consistency.get("mode", "-") if isinstance(consistency, Mapping) else "-"
    return [
        run.name, _sends(run.settings.get("method")), str(mode),
        str(run.settings.get("workers", "-")), str(run.settings.get("shards", "-")),
        *(_text(run.number(name), form) for name, form in (("accuracy", ".2%"), ("loss", ".4f"), ("steps", ".0f"))),
        *("-" if (count := run.number(name)) is None else bytes_text(count) for name in ("push_bytes", "pull_bytes")),
        _text(run.number("mean_density"), ".2%"), _text(run.number("compression_ratio"), ".1f"),
        _text(run.number("seconds"), ".1f"),
    ]  # fmt: skip


def _sends(method: object) -> str:
    """Say what a run sends, whatever version of Thresher wrote it down."""
    if not isinstance(method, Mapping):
        return "-"
    given = [f"{name} {method[name]}" for name in _SAID if method.get(name) is not None]
    if given == ["threshold 0.0"]:
        return "everything"
    return ", ".join([str(method.get("compressor", "-")), *given])


def _moved(run: Run) -> float:
    return (run.number("push_bytes") or 0.0) + (run.number("pull_bytes") or 0.0)


def _text(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
