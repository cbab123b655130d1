"""The engine over a journal: nobody is told what is not kept, and a disk that is full pauses the run."""

import asyncio
import logging
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tests.server.on_an_engine import LAYOUT, ME, OTHER, Listener, joined_by_another, push, run
from tests.server.small_disk import fill, mounted

from thresher.protos.errors import RoundFailedError
from thresher.protos.faults import plan
from thresher.protos.replica import PARAMETERS
from thresher.protos.update import Membership
from thresher.server import events
from thresher.server.config import ShardConfig
from thresher.server.effects import Effect
from thresher.server.engine import Engine
from thresher.server.facts import Closed, record_from_bytes
from thresher.server.journal import Journal, read_history
from thresher.server.recovery import Recovery

PUSHES = 100


def opened(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.recover()
    return journal


def closed_in(folder: Path) -> list[int]:
    """The versions of all rounds that are in a journal."""
    records = (record_from_bytes(data, LAYOUT.shard_slice(0, 1)) for _, data in read_history(folder).records())
    return [record.sealed.update.version for record in records if isinstance(record, Closed)]


def submitted(engine: Engine) -> list[asyncio.Future[list[Effect]]]:
    """More pushes than a full disk has room for in the last page of the log."""
    return [asyncio.ensure_future(engine.submit(push(step))) for step in range(PUSHES)]


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until the engine's thread has said so."""
    while text not in caplog.text:  # noqa: ASYNC110 - a log wakes nobody
        await asyncio.sleep(0.01)


def test_every_round_is_in_the_journal_before_anybody_is_told(tmp_path: Path) -> None:
    """Whoever hears of a version finds it on the disk, and so does the row of the round."""
    rows: list[tuple[int, list[int]]] = []

    async def scenario(engine: Engine, listener: Listener) -> None:
        for step in range(5):
            await engine.submit(push(step))
            assert closed_in(tmp_path) == listener.heard == list(range(1, step + 2))

    with closing(opened(tmp_path)) as journal:
        run(scenario, lambda row: rows.append((row.version, closed_in(tmp_path))), journal)
    assert rows == [(version, list(range(1, version + 1))) for version in range(1, 6)]


def test_places_are_reached_in_the_order_of_the_promise(tmp_path: Path) -> None:
    """A push has come, is applied in memory, is on the disk; and only what was appended was told by then."""
    seen: list[tuple[str, int]] = []
    listeners: list[Listener] = []

    async def scenario(engine: Engine, listener: Listener) -> None:
        listeners.append(listener)
        for step in range(2):
            await engine.submit(push(step))

    def strike(who: str, phase: str) -> None:
        assert who == "shard 0"
        if listeners:
            seen.append((phase, len(closed_in(tmp_path))))
            assert len(listeners[0].heard) <= len(closed_in(tmp_path))

    with closing(opened(tmp_path)) as journal, plan(strike):
        run(scenario, journal=journal)
    once = [("round open", 0), ("apply", 0), ("tell", 1)]
    assert seen == [*once, *((phase, count + 1) for phase, count in once), ("checkpoint", 2)]


def test_a_full_disk_pauses_the_run_until_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is told of the round that cannot be kept; the log says so; with room it goes on where it was."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        fill(tmp_path / "ballast")
        pushes = submitted(engine)
        await logged(caplog, "shard 0 is paused")
        assert "No space left on device" in caplog.text
        assert listener.heard == closed_in(tmp_path)
        (tmp_path / "ballast").unlink()
        await asyncio.wait_for(asyncio.gather(*pushes), 30)
        assert listener.heard == closed_in(tmp_path) == list(range(1, PUSHES + 1))
        assert "shard 0 goes on after" in caplog.text

    with mounted(tmp_path, "size=256k"), closing(opened(tmp_path)) as journal, caplog.at_level(logging.WARNING):
        run(scenario, journal=journal)


def test_a_disk_that_stays_full_fails_the_run_after_the_patience(tmp_path: Path) -> None:
    """The reason names the disk; the round was never told, and a recovery knows nothing of it."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        fill(tmp_path / "ballast")
        answers = await asyncio.gather(*submitted(engine), return_exceptions=True)
        reason = await asyncio.wait_for(listener.failed, 30)
        assert "shard 0 gave up after 0 s" in reason
        assert "No space left on device" in reason
        assert [str(answer) for answer in answers if not isinstance(answer, list)] == [reason] * (
            PUSHES - len(listener.heard)
        )
        assert listener.heard == closed_in(tmp_path)
        assert engine.statistics().state == "failed"
        (tmp_path / "ballast").unlink()

    with mounted(tmp_path, "size=256k"):
        with closing(opened(tmp_path)) as journal:
            run(scenario, journal=journal, patience=0.0)
        told = closed_in(tmp_path)
        with closing(Journal(tmp_path)) as journal:
            state = Recovery(journal, ShardConfig(0, 1, 1)).state
        assert state is not None
        assert told == list(range(1, state.version + 1))


def test_a_paused_engine_can_be_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who ends the shard does not wait for room on the disk; the round that waited was told to nobody."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        fill(tmp_path / "ballast")
        pushes = submitted(engine)
        await logged(caplog, "is paused")
        await asyncio.to_thread(engine.stop)
        answers = await asyncio.gather(*pushes, return_exceptions=True)
        assert sum(isinstance(answer, list) for answer in answers) == len(listener.heard) == len(closed_in(tmp_path))
        assert {type(answer) for answer in answers} == {list, RoundFailedError}

    with mounted(tmp_path, "size=256k"), closing(opened(tmp_path)) as journal, caplog.at_level(logging.WARNING):
        run(scenario, journal=journal, patience=1e9)


def test_a_checkpoint_that_fails_is_told_and_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is written behind: the rounds go on, and the log has them."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        (tmp_path / "unfinished").write_text("in the way of its folder")
        await engine.submit(push(0))
        await logged(caplog, "checkpoint 2 could not be written")
        await engine.submit(push(1))
        assert listener.heard == closed_in(tmp_path) == [1, 2]
        (tmp_path / "unfinished").unlink()

    with closing(opened(tmp_path)) as journal, caplog.at_level(logging.WARNING):
        run(scenario, journal=journal, checkpoint_every=1)


def test_who_stops_finds_everything_in_one_checkpoint(tmp_path: Path) -> None:
    """A shard that ends in peace has nothing to replay; one that failed keeps its log and no state half done."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        for step in range(3):
            await engine.submit(push(step))

    async def failing(engine: Engine, listener: Listener) -> None:
        await scenario(engine, listener)
        await engine.submit(events.Abort(ME, "diverged"))

    for name, ends, behind in (("peace", scenario, 0), ("failed", failing, 3)):
        with closing(opened(tmp_path / name)) as journal:
            run(ends, journal=journal)
        newest = read_history(tmp_path / name).generations[-1]
        assert len(list(read_history(tmp_path / name).records(newest))) == behind
        with closing(Journal(tmp_path / name)) as journal:
            state = Recovery(journal, ShardConfig(0, 1, 1)).state
        assert state is not None
        assert (state.version, state.snapshot().tensors[PARAMETERS].tolist()) == (3, [-3.0, -3.0])


def test_who_must_come_back_is_told_once_the_new_state_is_kept(tmp_path: Path) -> None:
    """After a refill the others' streams end, and an agreement is told when it is on the disk."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        for event in joined_by_another():
            await engine.submit(event)
        await engine.submit(events.Agree(ME, 0, {"loss": 1.0}))
        there = events.History(7, 5, b"digest")
        membership = Membership(1, (0, 1))
        state = {PARAMETERS: torch.ones(2)}
        await engine.submit(events.Refill(ME, there, state, {}, (), None, membership))
        assert (listener.agreed, listener.restarted) == ([0], [(1,)])
        assert read_history(tmp_path).generations == (1, 2)

    with closing(opened(tmp_path)) as journal:
        run(scenario, journal=journal)


def test_a_bug_between_memory_and_journal_fails_the_run_and_loses_nothing(tmp_path: Path) -> None:
    """Nothing may be applied on top of a round that is not kept: the folder ends with the last one that was told."""

    def strike(_who: str, phase: str) -> None:
        if phase == "apply" and closed_in(tmp_path) == [1, 2]:
            raise RuntimeError("a bug")

    async def scenario(engine: Engine, listener: Listener) -> None:
        for step in range(2):
            await engine.submit(push(step))
        for step in (2, 3):
            with pytest.raises(RoundFailedError, match="RuntimeError: a bug"):
                await engine.submit(push(step))
        assert "shard 0 could not handle Push: RuntimeError: a bug" in await asyncio.wait_for(listener.failed, 30)
        assert engine.statistics().state == "failed"
        assert listener.heard == closed_in(tmp_path) == [1, 2]

    with closing(opened(tmp_path)) as journal, plan(strike):
        run(scenario, journal=journal)
    with closing(Journal(tmp_path)) as journal:
        state = Recovery(journal, ShardConfig(0, 1, 1)).state
    assert state is not None
    assert (state.version, state.snapshot().tensors[PARAMETERS].tolist()) == (2, [-2.0, -2.0])


def test_a_bug_as_time_passes_fails_the_run_too(tmp_path: Path) -> None:
    """A round that closes because a lease ends is no worker's event: all hear why the run is over, once."""

    def strike(_who: str, phase: str) -> None:
        if phase == "apply":
            raise RuntimeError("a bug")

    async def scenario(engine: Engine, listener: Listener) -> None:
        for event in joined_by_another():
            await engine.submit(event)
        await engine.submit(push(0))  # lets the other in
        with plan(strike):
            await engine.submit(push(1))
            await engine.submit(events.Disconnect(OTHER))
            assert "shard 0 could not handle Tick: RuntimeError: a bug" in await asyncio.wait_for(listener.failed, 30)
        assert listener.heard == closed_in(tmp_path) == [1]

    with closing(opened(tmp_path)) as journal:
        run(scenario, journal=journal, lease=0.0)
