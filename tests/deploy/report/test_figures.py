"""The drawings."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from tests.deploy.report.written import write_run

from thresher.deploy.report.breakdown import layer_figure, shard_figure, time_figure
from thresher.deploy.report.figures import AnyFigure, png, svg
from thresher.deploy.report.runs import read_runs
from thresher.deploy.report.series import Curves, LeftOut, curve_figures

KINDS = ["loss", "time", "shards", "layers"]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AnyFigure]:
    folder = tmp_path_factory.mktemp("runs")
    runs = read_runs([write_run(folder / name, length) for name, length in (("_a$b$c & <d>", 5), ("b", 300))])
    several = [*curve_figures(runs), time_figure(runs), shard_figure(runs), layer_figure(runs)]
    return {figure.name: figure for figure in several if not isinstance(figure, LeftOut)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_takes_the_ink_of_the_page(figures: dict[str, AnyFigure], kind: str) -> None:
    """Well-formed, with text as text; it loads nothing, and nothing of black or white is in it."""
    drawn = svg(figures[kind])
    root = ET.fromstring(drawn)  # noqa: S314 - our own
    assert root.get("role") == "img"
    assert "currentColor" in drawn
    assert not re.search(r"#000000|#ffffff|#010203|#040506|fill: ?(black|white)", drawn)
    assert [link for link in re.findall(r'(?:href|src)="([^"]*)"', drawn) if not link.startswith(("#", "data:"))] == []
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("_a$b$c & <d>" in (text or "") for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_of_their_figure(figures: dict[str, AnyFigure], kind: str) -> None:
    """Every reference has its target in the same drawing, and ids begin with its name."""
    drawn = svg(figures[kind])
    ids = re.findall(r'\sid="([^"]*)"', drawn)
    assert len(ids) == len(set(ids))
    assert all(one.startswith(f"{kind}-") for one in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn)) <= set(ids)


def test_the_same_numbers_make_the_same_drawing(figures: dict[str, AnyFigure]) -> None:
    """No date, no chance."""
    assert svg(figures["loss"]) == svg(figures["loss"])
    assert png(figures["shards"]) == png(figures["shards"])


def test_numbers_on_axes_are_whole(figures: dict[str, AnyFigure]) -> None:
    """What shortens paths leaves the text alone."""
    root = ET.fromstring(svg(figures["loss"]))  # noqa: S314 - our own
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0.01", "0.1", "1"} <= set(texts)


def test_nearly_the_same_accuracy_looks_nearly_the_same(tmp_path: Path) -> None:
    """The axis spans five percent and ends at 100; few decades of bytes have numbers in between."""
    runs = read_runs([write_run(tmp_path / name, length) for name, length in (("short", 5), ("long", 100))])
    nearly = zip(runs, (0.981, 0.983), strict=True)
    runs = [replace(run, printed={}, result={"accuracy": accuracy}) for run, accuracy in nearly]
    accuracy = next(
        figure for figure in curve_figures(runs) if isinstance(figure, Curves) and figure.name == "accuracy"
    )
    texts = [element.text for element in ET.fromstring(svg(accuracy)).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - our own
    assert {"96%", "98%", "100%"} <= set(texts)
    assert "101%" not in texts
    assert {"5 kB", "10 kB", "20 kB"} <= set(texts)


def test_many_runs_look_different(tmp_path: Path) -> None:
    """Colour, line and marker together: ten runs, ten looks."""
    runs = read_runs([write_run(tmp_path / f"run-{number}", 3) for number in range(10)])
    loss = next(figure for figure in curve_figures(runs) if not isinstance(figure, LeftOut))
    drawn = svg(loss)
    looks = set(
        re.findall(
            r'style="(fill: none; (?:stroke-dasharray: [^;]*; stroke-dashoffset: [^;]*; )?stroke: #[0-9a-f]{6})', drawn
        )
    )
    assert len(looks) == 10
