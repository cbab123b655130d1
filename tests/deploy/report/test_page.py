"""The page, in a real browser."""

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.deploy.report.browser import CHROMIUM, NONE, Page, browsing
from tests.deploy.report.written import write_run

from thresher.deploy.report.page import Report, make_report, run_table, write_figures, write_page
from thresher.deploy.report.runs import read_runs
from thresher.protos.errors import ConfigurationError

EVERY_FIGURE = [
    *("loss", "accuracy", "bytes", "density", "threshold"),
    *("residual", "total-error", "time", "shards", "layers"),
]
_SEEN = """
    [...document.querySelectorAll('figure')].map(figure => {
        const drawing = figure.querySelector('svg'), box = drawing.getBoundingClientRect();
        const title = document.getElementById(drawing.getAttribute('aria-labelledby'));
        const caption = figure.querySelector('figcaption');
        return [figure.id, box.width, box.height, drawing.getAttribute('role'), title.textContent, caption.textContent];
    })
"""
HOSTILE = "_a <script>alert(1) & $x$"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("runs")
    dense = write_run(folder / "dense-run", iterations=700, mean_density=1.0, push_bytes=100_000, pull_bytes=200_000)
    return make_report(read_runs([write_run(folder / "sparse"), dense, write_run(folder / HOSTILE)]))


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(report, path)
    return path


@pytest.fixture(scope="module")
def page(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip(NONE)
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(written)
        yield browser


def test_every_figure_is_there(report: Report) -> None:
    """A finished run has the numbers of all."""
    assert [figure.name for figure in report.figures] == EVERY_FIGURE
    assert not report.left_out


def test_the_browser_asks_for_nothing_but_the_page(page: Page, written: Path) -> None:
    """No script, style, font or image from elsewhere; pictures are inside, as ``data:``."""
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert written.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [written.as_uri()]


def test_the_browser_has_nothing_to_complain_of(page: Page) -> None:
    """No entry in the console, no exception."""
    said = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in page.events if event["method"] in said] == []


def test_every_figure_has_a_size_and_a_title(page: Page) -> None:
    """Each is seen, and read out: role, title, and a caption with numbers."""
    seen = page.value(_SEEN)
    assert [one[0] for one in seen] == EVERY_FIGURE
    for name, width, height, role, title, caption in seen:
        assert width > 500, name
        assert height > 100, name
        assert role == "img"
        assert len(title) > 5
        assert re.search(r"\d", caption), name


def test_ids_are_unique(page: Page) -> None:
    """Else the clip of one drawing would cut another."""
    ids = page.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_the_name_of_a_run_is_text(page: Page) -> None:
    """Whatever is in it: in the table, in captions and in legends."""
    assert page.value("document.querySelectorAll('script').length") == 0
    assert HOSTILE in page.value("document.querySelector('tbody').textContent")
    assert HOSTILE in page.value("document.querySelector('#loss svg').textContent")


@pytest.mark.parametrize(
    ("scheme", "media", "is_light"), [("light", "", True), ("dark", "", False), ("dark", "print", True)]
)
def test_ink_and_paper_follow_the_reader(page: Page, scheme: str, media: str, *, is_light: bool) -> None:
    """Dark on light or light on dark, as the system says; always dark on light on paper. Figures, too."""
    page.ask("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
    paper, ink, drawn = (
        [
            int(number)
            for number in re.findall(r"\d+", page.value(f"getComputedStyle(document.querySelector('{where}')).{what}"))[
                :3
            ]
        ]
        for where, what in (("body", "backgroundColor"), ("body", "color"), ("#loss svg text", "fill"))
    )
    assert (sum(paper) > sum(ink)) == is_light
    assert drawn == ink


@pytest.mark.parametrize(("media", "width"), [("", 1100), ("", 800), ("", 360), ("print", 718)])
def test_nothing_leaves_the_page_at_the_side(page: Page, media: str, width: int) -> None:
    """On a screen what is too wide scrolls in its own box; an A4 sheet with margins (718 px) cannot scroll."""
    page.ask("Emulation.setEmulatedMedia", media=media)
    page.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    assert page.value("innerWidth") == width
    assert page.value("document.documentElement.scrollWidth") <= width
    hidden = page.value("[...document.querySelectorAll('.wide')].map(box => box.scrollWidth - box.clientWidth)")
    assert len(hidden) == 1 + len(EVERY_FIGURE)
    if media == "print" or width == 1100:
        assert max(hidden) <= 0


def test_the_table_compares_with_the_dense_run(report: Report) -> None:
    """Bytes of each over those of the dense one."""
    columns, rows = run_table(report.runs)
    column = columns.index("bytes over dense-run")
    assert [row[column] for row in rows] == ["0.01", "1", "0.01"]
    assert all(len(row) == len(columns) for row in rows)


def test_figures_and_their_numbers_have_the_same_names(report: Report, tmp_path: Path) -> None:
    """A PNG and a CSV of each; the CSV has a header, and as many cells in each row."""
    folder = tmp_path / "new" / "figures"
    write_figures(report, folder)
    assert {path.stem for path in folder.glob("*.png")} == set(EVERY_FIGURE)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert {path.stem for path in folder.glob("*.csv")} == {*EVERY_FIGURE, "runs"}
    for path in folder.glob("*.csv"):
        header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        assert header[0] == "run"
        assert rows
        assert {len(row) for row in rows} == {len(header)}


def test_where_nothing_can_be_written_is_said(report: Report, tmp_path: Path) -> None:
    """A folder in the way, no folder, a file where figures should go."""
    small = replace(report, figures=())
    with pytest.raises(ConfigurationError, match=r"cannot be written: .*; choose another --output"):
        write_page(small, tmp_path / "nowhere" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ConfigurationError, match="choose another --output"):
        write_page(small, tmp_path / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="choose other --figures"):
        write_figures(small, tmp_path / "file")


def test_what_is_left_out_and_what_must_be_known_is_on_the_page(tmp_path: Path) -> None:
    """A run that is going on has notices, and no figures of what it has not written."""
    run = write_run(tmp_path / "run")
    for name in ("result.json", "printed.jsonl", "worker-0.iterations.jsonl", "worker-1.iterations.jsonl"):
        (run / name).unlink()
    report = make_report(read_runs([run]))
    write_page(replace(report, figures=()), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "still going, or was stopped or killed" in text
    assert [one.title for one in report.left_out] == [
        "Loss against bytes and iterations",
        "Accuracy against bytes and iterations",
        "Where the time went",
        "Density by layer",
    ]
    assert all(f"{one.title}:" in text for one in report.left_out)
