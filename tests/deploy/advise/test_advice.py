"""Advice in words, tables and JSON: it says plainly when compressing does not pay."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from tests.deploy.advise.known import SPARSE, costs, link

from thresher.deploy.advise.advice import Advice, document, sentence, show
from thresher.deploy.advise.model import model_of
from thresher.deploy.advise.past import PastRun
from thresher.deploy.advise.samples import exactly

PAST = PastRun("digits", 10, 2, 1, 0.01, 0.015, 100.0, 150.0, None, 0.5)
FAST = Advice(
    model_of(1000),
    [costs(push=[1000], pull=[1000], seconds=0.1), costs(SPARSE, push=[10], pull=[10], seconds=0.2)],
    workers=1, here=1, shards=1, link=link(up=1e7, down=1e7), compute=exactly(1.0), past=None,
)  # fmt: skip
SLOW = replace(FAST, link=link(up=100.0, down=100.0))


def told(advice: Advice) -> str:
    return sentence(advice, advice.predictions())


def test_it_says_when_compressing_does_not_pay() -> None:
    assert "does not pay here: send everything (--threshold 0)" in told(FAST)
    assert "--density 0.01 is the faster where links carry less than 52.8 kbit/s" in told(FAST)  # 1980 B in 0.3 s


def test_it_says_when_compressing_pays() -> None:
    text = told(SLOW)
    assert "Compressing pays: --density 0.01 takes 1.8 s" in text
    assert "instead of 21.3 s" in text
    assert "overlap" not in text


def test_it_says_when_that_is_not_sure() -> None:
    """The predictions overlap where the measurements did."""
    unsure = replace(FAST.costs[0], compress=np.array([0.1, 1.0, 2.0]))
    both = replace(FAST, costs=[unsure, replace(FAST.costs[1], compress=exactly(0.0))])
    assert "The two overlap" in told(both)


@pytest.mark.parametrize(
    ("seconds", "push", "text"),
    [(0.0, 10, "no bandwidth is too large for it"), (0.2, 1000, "pays at no bandwidth")],
)
def test_it_says_when_there_is_no_break_even(seconds: float, push: int, text: str) -> None:
    other = costs(SPARSE, push=[push], pull=[1000], seconds=seconds)
    assert text in told(replace(FAST, costs=[FAST.costs[0], other]))


def test_without_a_link_it_says_what_would_pay() -> None:
    nowhere = replace(FAST, link=None)
    assert "Nothing is known of the link" in told(nowhere)
    assert "less than 52.8 kbit/s" in told(nowhere)


def test_json_has_all_of_it() -> None:
    found = json.loads(json.dumps(document(replace(SLOW, past=PAST))))
    assert [one["name"] for one in found["link"]] == ["a", "all shards"]
    assert found["model"]["numel"] == 1000
    assert found["run"]["update_density"] == 0.015
    assert found["break_even_setting"] == "--density 0.01"
    assert found["break_even_bandwidth"] == pytest.approx(1980 / 0.3)
    assert found["advice"] == told(SLOW)
    first = found["predictions"][0]
    assert first["setting"] == "--threshold 0"
    assert (first["density"], first["up_bytes"], first["down_bytes"]) == (1.0, 1000, 1000)
    assert first["low"] <= first["seconds"] <= first["high"]
    assert sum(first["parts"].values()) == pytest.approx(first["seconds"])
    assert len(found["machine"]["settings"]) == 2


def test_json_of_what_is_not_known_is_null() -> None:
    found = document(replace(FAST, link=None, compute=None))
    assert (found["link"], found["predictions"]) == ([], [])
    assert (found["run"], found["model"]["compute_seconds"]) == (None, None)


@pytest.mark.parametrize("advice", [SLOW, replace(FAST, link=None, compute=None)], ids=["link", "no link"])
@pytest.mark.parametrize("width", [80, 200])
def test_tables_show_every_setting(advice: Advice, width: int) -> None:
    """Also on a narrow screen, without a cell that is cut."""
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    with console.file:
        show(advice, console)
        text = console.export_text()
    assert re.search(r"everything.*\n.*density 0\.01", text)
    assert "…" not in text.split("Compressing")[0]
    assert ("Computing is not known" in text) == (advice.compute is None)


def test_the_bytes_of_both_directions_are_told() -> None:
    advice = replace(FAST, costs=[costs(push=[7], pull=[9], seconds=0.1), FAST.costs[1]])
    assert [(one["up_bytes"], one["down_bytes"]) for one in document(advice)["predictions"]] == [(7, 9), (10, 10)]
