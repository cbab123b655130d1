"""Where a loop is: passes, batches and agreements, before and after a kill."""

import pytest
import torch
from tests.worker.training import Scale, sgd

from thresher.protos.bookmark import Bookmark
from thresher.protos.errors import ConfigurationError, ProtocolError
from thresher.server import state as server_state
from thresher.worker.progress import AGREEMENTS, Progress, Schedule


def test_a_resumed_loop_goes_on_in_its_pass() -> None:
    """Passes that are over are not yielded, data passes that are over are empty, the one it was in goes on."""
    first = Progress()
    numbers = first.passes(4)
    for number in (0, 1):
        assert next(numbers) == number
        assert first.begin_pass()
        first.end_pass()
        assert first.begin_pass()
        first.begin_batch()
        if number == 0:
            first.end_step()
            first.end_pass()
    second = Progress()
    second.load(first.state())
    again = second.passes(4)
    assert next(again) == 1
    assert not second.begin_pass()
    assert second.begin_pass()
    second.end_pass()
    assert second.begin_pass()
    assert list(again) == [2, 3]


def in_step(progress: Progress, batches: int = 1) -> Bookmark | None:
    """A step over so many batches, and what is told of it."""
    for _ in range(batches):
        progress.begin_batch()
    told = progress.bookmark
    progress.end_step()
    return told


def test_a_bookmark_tells_where_the_loop_is_behind_the_step() -> None:
    """Its numbered pass, which pass over data in it, from which step, and the batches of all those dealt for."""
    progress = Progress(3)
    assert progress.bookmark is None, "a loop that does not take its batches here"
    next(progress.passes(2))
    assert progress.begin_pass()
    assert in_step(progress) == Bookmark(1, 1, 1, 0, ((3, 1),))
    progress.agreed({"loss": 0.5})
    assert in_step(progress, 2) == Bookmark(2, 1, 1, 0, ((3, 3),), 1)
    progress.end_pass()
    assert progress.begin_pass()
    assert in_step(progress) == Bookmark(3, 1, 2, 2, ((3, 1),), 1)


def test_who_joins_goes_on_at_a_bookmark() -> None:
    """In its pass, behind passes over data that are over, and with its agreements."""
    progress = Progress(2)
    progress.join(Bookmark(7, 2, 2, 5, ((3, 2), (2, 0)), 4, 7), None, "")
    assert progress.on_its_way
    assert progress.next_agreement() == 0, "what is asked in front of it, others have asked"
    progress.agreed({"in front": 1.0})
    again = progress.passes(3)
    assert next(again) == 1
    assert not progress.begin_pass()
    assert progress.begin_pass()
    assert (progress.next_agreement(), progress.on_its_way) == (4, False)
    assert (progress.step, progress.pass_step, progress.fetched, progress.resumed) == (7, 5, 2, True)
    assert in_step(progress) == Bookmark(8, 2, 2, 5, ((3, 2), (2, 1)), 4, 7)
    kept = progress.state()
    progress.end_pass()
    assert list(again) == [2]
    second = Progress(2)
    second.load(kept)
    assert second.repeated() == {"in front": 1.0}
    assert next(second.passes(3)) == 1
    assert not second.begin_pass()
    assert second.begin_pass()
    assert second.place == Bookmark(8, 2, 2, 5, ((3, 2), (2, 1)), 4, 7)


def test_the_rest_of_a_pass_is_dealt_anew() -> None:
    """Behind the step in which that is heard; what is kept then says how the pass was dealt."""
    first = Progress(4)
    assert first.begin_pass()
    in_step(first)
    in_step(first)
    place = Bookmark(2, 0, 1, 0, ((2, 2), (4, 0)), 0, 2)
    first.go_to(place)
    assert (first.place, first.inside, first.moves, first.resumed) == (place, True, 1, False)
    in_step(first)
    first.begin_batch()
    second = Progress(4)
    second.load(first.state())
    assert second.place == Bookmark(3, 0, 1, 0, ((2, 2), (4, 1)), 0, 2)
    first.end_pass()
    assert first.begin_pass()
    assert (first.dealt_for, first.taken, first.earlier) == (4, 0, ())


def test_the_place_is_in_another_numbered_pass() -> None:
    """This one ends, with what is behind its data; that one goes on behind those of its data that are over."""
    progress = Progress(2)
    numbers = progress.passes(5)
    for _ in range(2):
        assert next(numbers) in (0, 1)
        assert progress.begin_pass()
        in_step(progress)
        if progress.step < 2:
            progress.end_pass()
            progress.agreed({"behind": 0.0})
    progress.go_to(Bookmark(9, 4, 2, 8, ((2, 1),), 7))
    assert not progress.inside
    progress.end_pass()
    assert not progress.begin_pass(), "others of this numbered pass"
    assert progress.next_agreement() == 1
    progress.agreed({"behind": 1.0})
    assert next(numbers) == 3
    assert not progress.begin_pass()
    assert progress.begin_pass()
    assert (progress.place, progress.next_agreement()) == (Bookmark(9, 4, 2, 8, ((2, 1),), 7), 7)
    progress.end_pass()
    assert list(numbers) == [4]


def test_the_place_is_in_another_pass_that_is_not_numbered() -> None:
    """Those between are skipped."""
    progress = Progress(2)
    assert progress.begin_pass()
    in_step(progress)
    progress.go_to(Bookmark(9, 0, 3, 8, ((2, 1),)))
    progress.end_pass()
    assert [progress.begin_pass() for _ in range(2)] == [False, True]
    assert progress.place == Bookmark(9, 0, 3, 8, ((2, 1),))


def test_what_cannot_be_given_back_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """And the hyper-parameters in force are put in place, again when the first batch is there."""
    optimizer = sgd(Scale(), lr=0.5)
    progress = Progress()
    progress.schedule = Schedule(optimizer)
    progress.join(Bookmark(7, 0, 1, 0, ((1, 7),)), [{"lr": 0.125}], "%s is lost")
    assert optimizer.param_groups[0]["lr"] == 0.5, "what a scheduler takes for the rate to begin with"
    progress.keep({"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)})
    assert "scheduler is lost" in caplog.text
    assert optimizer.param_groups[0]["lr"] == 0.125
    optimizer.param_groups[0]["lr"] = 0.5
    assert progress.begin_pass()
    progress.begin_batch()
    assert optimizer.param_groups[0]["lr"] == 0.125
    progress.join(Bookmark(9, 0, 1, 0, ((1, 9),)), [{"lr": 0.25}], "%s is another step's")
    assert "scheduler is another step's" in caplog.text
    progress.begin_batch()
    assert optimizer.param_groups[0]["lr"] == 0.125, "in the middle of a step"
    progress.end_step()
    progress.begin_batch()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_agreements_are_repeated_where_they_were_made() -> None:
    """Those before the first pass and those of this pass; of earlier passes only their number is kept."""
    first = Progress()
    first.agreed({"before": 1.0})
    numbers = first.passes(3)
    for number in (0, 1):
        assert next(numbers) == number
        first.agreed({"in": float(number)})
    second = Progress()
    second.load(first.state())
    assert second.repeated() == {"before": 1.0}
    assert next(second.passes(3)) == 1
    assert second.repeated() == {"in": 1.0}
    assert (second.repeated(), second.next_agreement()) == (None, 3)


def in_loop(progress: Progress, steps: int, count: int = 1) -> None:
    """One pass over data, with agreements behind each step."""
    assert progress.begin_pass()
    for _ in range(steps):
        progress.begin_batch()
        progress.end_step()
        for _ in range(count):
            progress.agreed({"number": float(progress.next_agreement())})
    progress.end_pass()


def test_agreements_of_a_loop_are_not_repeated_behind_it() -> None:
    """The loop of a pass that is over is left out by the next life; what is asked behind it gets its own answer."""
    first = Progress()
    in_loop(first, 3)
    first.agreed({"behind": 0.0})
    assert first.begin_pass()
    kept = first.state()
    for _ in range(2):
        first.begin_batch()
        kept = first.state()
        first.end_step()
        first.agreed({"in": 4.0})
    second = Progress()
    second.load(kept)
    assert not second.begin_pass()
    assert (second.repeated(), second.repeated()) == ({"behind": 0.0}, None)
    assert second.begin_pass()
    second.begin_batch()
    second.end_step()
    assert (second.repeated(), second.next_agreement()) == (None, 5), "the one behind the step that is made again"


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "a loop of its own"])
def test_what_is_kept_does_not_grow(batches: bool) -> None:
    """An agreement with each of a thousand steps, as early stopping makes them."""
    progress = Progress()
    progress.agreed({"before": 1.0})
    if batches:
        assert progress.begin_pass()
    for _ in range(1000):
        if batches:
            progress.begin_batch()
        assert len(progress.state()["results"]) == 1
        assert len(progress._results) <= 2
        progress.end_step()
        progress.agreed({"stop": 0.0})
    assert progress.next_agreement() == 1001


def test_more_agreements_than_the_shards_remember() -> None:
    """A worker that is killed asks again for all since its last push began: they must not be forgotten by then."""
    progress = Progress()
    in_loop(progress, 2, AGREEMENTS // 2)
    assert progress.begin_pass()
    progress.begin_batch()
    for _ in range(AGREEMENTS // 2):
        progress.agreed({"number": float(progress.next_agreement())})
    with pytest.raises(ProtocolError, match=r"64 agreements since .* step 1.*add up .* agree once"):
        progress.next_agreement()
    progress.end_step(pushed=False)
    with pytest.raises(ProtocolError, match="64 agreements"):
        progress.next_agreement()
    progress.begin_batch()
    progress.end_step()
    assert progress.next_agreement() == 3 * AGREEMENTS // 2
    assert AGREEMENTS == server_state._AGREEMENTS


def test_a_pass_inside_another() -> None:
    """One place cannot stand for two loops."""
    progress = Progress()
    assert progress.begin_pass()
    with pytest.raises(ProtocolError, match=r"another one is open: .*evaluate with the loader itself"):
        progress.begin_pass()
    progress.end_pass()
    assert progress.begin_pass()


def test_numbered_passes_once_more() -> None:
    """The numbers of a second loop could not be told from those of the first."""
    progress = Progress()
    assert list(progress.passes(2)) == [0, 1]
    with pytest.raises(ProtocolError, match=r"passes\(4\) .*one loop"):
        next(progress.passes(4))
    resumed = Progress()
    resumed.load(progress.state())
    assert list(resumed.passes(2)) == [1]
    with pytest.raises(ProtocolError, match="one loop"):
        next(resumed.passes(4))


def test_what_cannot_be_kept() -> None:
    """Something without a state, and a second thing of one name."""
    progress = Progress()
    with pytest.raises(ConfigurationError, match="count cannot be kept: int has no state_dict"):
        progress.keep({"count": 3})
    progress.keep({"model": Scale()})
    with pytest.raises(ConfigurationError, match="kept as model already"):
        progress.keep({"model": Scale()})


def test_hyper_parameters_come_back() -> None:
    """A scheduler moves them but does not keep them."""
    optimizer = sgd(Scale(), lr=0.5)
    schedule = Schedule(optimizer)
    state = schedule.state_dict()
    optimizer.param_groups[0]["lr"] = 0.25
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(optimizer.param_groups[0]["params"][0], torch.nn.Parameter)
