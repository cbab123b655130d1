"""From a question to an answer: what is asked is the last word, what is not asked comes from the run."""

from pathlib import Path

import pytest
from tests.deploy.advise.test_past import NUMEL, WORKERS, shard_row, worker_row, write

from thresher.deploy.advise.question import Question
from thresher.deploy.advise.samples import middle
from thresher.deploy.advise.study import study
from thresher.deploy.watching_places import Place
from thresher.protos.errors import ConfigurationError


@pytest.fixture
def past(tmp_path: Path) -> Path:
    write(tmp_path / "shard-0.iterations.jsonl", [shard_row(version) for version in range(1, 9)])
    write(tmp_path / "worker-0.iterations.jsonl", [worker_row(0, step) for step in range(1, 9)])
    return tmp_path


def test_a_run_answers_what_is_not_asked(past: Path) -> None:
    """Size, workers, shards, seconds, and the density it had, with its union."""
    found = study(Question(run=past, densities=(0.5,)), None)
    assert (found.model.numel, found.workers, found.shards, found.link) == (NUMEL, WORKERS, 1, None)
    assert found.compute is not None
    assert middle(found.compute) == pytest.approx(0.1)
    by_name = {one.setting.name: one for one in found.costs}
    assert by_name["density 0.02"].update_density == pytest.approx(0.05, rel=1e-3)
    assert by_name["everything"].update_density == 1.0
    assert found.past is not None
    assert "density 0.5" in by_name


def test_what_is_asked_is_the_last_word(past: Path) -> None:
    question = Question(
        parameters=500, run=past, compute=7.0, workers=1, here=4, shards=3, bandwidth=1000.0, round_trip=0.5
    )
    found = study(question, None)
    assert (found.model.numel, found.workers, found.here, found.shards) == (500, 1, 1, 3)
    assert found.compute is not None
    assert middle(found.compute) == 7.0
    assert found.link is not None
    assert len(found.link.alone) == 3
    assert middle(found.link.together.round_trip) == 0.5


def test_without_a_run_workers_choose_for_themselves() -> None:
    """Two of them, at random: the union is nearly twice the density."""
    found = study(Question(parameters=400, densities=(0.1,)), None)
    assert [round(one.update_density, 4) for one in found.costs] == [1.0, 1.0, 0.19, 0.19, 0.19]
    assert found.compute is None


def test_a_run_that_has_ended_has_no_link() -> None:
    ended = Place("runs/digits", (lambda: "127.0.0.1:1",), outcome=lambda: "sparse: 360 iterations")
    with pytest.raises(ConfigurationError, match="runs/digits has ended"):
        study(Question(parameters=400), ended)
