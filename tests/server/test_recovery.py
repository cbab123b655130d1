"""What a shard knew: folding the journal gives it back bit by bit, and what cannot be folded is told."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.server.on_an_engine import ME, OTHER, joined_by_another, push, run
from tests.server.on_an_engine import Listener as Heard

from thresher.protos.errors import DataLossError
from thresher.protos.faults import plan
from thresher.server import events
from thresher.server.config import ShardConfig
from thresher.server.engine import Engine
from thresher.server.events import IterationRow
from thresher.server.facts import Agreed, Returned, record_to_bytes
from thresher.server.journal import Journal, read_history
from thresher.server.recovery import Recovery
from thresher.server.state import RunState

CONFIG = ShardConfig(0, 1, 1, run=99)
NO_CHECKPOINTS = 0


def ran(folder: Path, checkpoint_every: int) -> tuple[bytes, dict[str, bytes], list[IterationRow]]:
    """Have an engine fill a folder; return what the shard knew at its end, and its rows.

    The run fails in the end, so that no last checkpoint stands for the log.
    """
    rows: list[IterationRow] = []
    ended: list[RunState] = []

    async def scenario(engine: Engine, _: Heard) -> None:
        for event in joined_by_another():
            await engine.submit(event)
        await engine.submit(push(0))
        for step in range(1, 5):
            await asyncio.gather(engine.submit(push(step)), *(engine.submit(one) for one in pushes_of_another(step)))
        for worker in (ME, OTHER):
            await engine.submit(events.Agree(worker, 0, {"loss": 1.0}))
        await engine.submit(events.Leave(OTHER, abandoned_squared=2.0))
        await engine.submit(push(5))
        await engine.submit(events.Abort(ME, "enough"))
        ended.append(engine._shard._state)

    with closing(Journal(folder, keep=100)) as journal:
        journal.recover()
        run(scenario, rows.append, journal, checkpoint_every=checkpoint_every)
    return ended[0].table(), bits(ended[0]), rows


def pushes_of_another(step: int) -> list[events.Push]:
    mine = push(step)
    return [events.Push(OTHER, step, step, mine.gradient, mine.presence, content=step + 50, wire_bytes=30)]


def bits(state: RunState) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in state.tensors().items()}


def recovered(folder: Path, config: ShardConfig = CONFIG) -> Recovery:
    with closing(Journal(folder, keep=100)) as journal:
        return Recovery(journal, config)


@pytest.mark.parametrize("checkpoint_every", [NO_CHECKPOINTS, 1, 2, 5])
def test_the_journal_gives_back_what_the_shard_knew(tmp_path: Path, checkpoint_every: int) -> None:
    """Law: from any checkpoint on, table and tensors are those of the shard that was not ended, bit by bit."""
    table, tensors, _ = ran(tmp_path, checkpoint_every)
    while True:
        state = recovered(tmp_path).state
        assert state is not None
        assert (state.table(), bits(state)) == (table, tensors)
        *older, newest = read_history(tmp_path).generations
        if not older:
            return
        (tmp_path / f"checkpoint-{newest:06d}.safetensors").unlink()


def test_the_rows_since_the_checkpoint_come_back(tmp_path: Path) -> None:
    """The per-iteration file may lack the last of them; each is as it was first written, but for how long it waited."""
    rows = [replace(row, barrier_seconds=None) for row in ran(tmp_path, 2)[-1]]
    assert [row.version for row in rows] == [1, 2, 3, 4, 5, 6]
    versions: list[int] = []
    while generations := read_history(tmp_path).generations:
        checkpoint = read_history(tmp_path).checkpoint(generations[-1])
        versions.append(RunState.restored(checkpoint.table, checkpoint.tensors).version)
        assert recovered(tmp_path).rows == rows[versions[-1] :]
        (tmp_path / f"checkpoint-{checkpoint.generation:06d}.safetensors").unlink()
    assert versions[-1] == 0


def test_an_empty_folder_knows_nothing(tmp_path: Path) -> None:
    """The shard begins a run of its own."""
    assert (recovered(tmp_path).state, recovered(tmp_path).rows) == (None, [])


def test_a_recovery_that_is_killed_is_made_again(tmp_path: Path) -> None:
    """Nothing that it does cannot be done twice."""
    table, tensors, _ = ran(tmp_path, 2)

    def strike(who: str, phase: str) -> None:
        assert (who, phase) == ("shard 0", "recovery")
        raise KeyboardInterrupt

    for _ in range(2):
        with plan(strike), pytest.raises(KeyboardInterrupt):
            recovered(tmp_path)
    state = recovered(tmp_path).state
    assert state is not None
    assert (state.table(), bits(state)) == (table, tensors)


def test_a_torn_tail_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the journal mended is in the log of the shard."""
    ran(tmp_path, NO_CHECKPOINTS)
    last = max(tmp_path.glob("log-*.bin"))
    last.write_bytes(last.read_bytes()[:-1])
    assert recovered(tmp_path).state is not None
    assert "this torn tail was cut off" in caplog.text


@pytest.mark.parametrize(
    ("shard", "shards", "workers", "said"),
    [
        (1, 2, 1, "that of shard 0 of 1 for 1 workers, not of shard 1 of 2 for 1; name the right folder"),
        (0, 2, 1, "not of shard 0 of 2 for 1"),
        (0, 1, 4, "not of shard 0 of 1 for 4"),
    ],
)
@pytest.mark.parametrize("checkpoint_every", [NO_CHECKPOINTS, 2])
def test_the_folder_of_another_shard_is_refused(
    tmp_path: Path, shard: int, shards: int, workers: int, said: str, checkpoint_every: int
) -> None:
    """Whether the run was opened in the log or is in a checkpoint."""
    ran(tmp_path, checkpoint_every)
    with pytest.raises(DataLossError, match=said):
        recovered(tmp_path, ShardConfig(shard, shards, workers))


@pytest.mark.parametrize("checkpoint_every", [NO_CHECKPOINTS, 2])
def test_a_shard_that_was_told_no_number_of_workers_takes_the_one_of_its_folder(
    tmp_path: Path, checkpoint_every: int
) -> None:
    """The first worker had said it."""
    ran(tmp_path, checkpoint_every)
    state = recovered(tmp_path, ShardConfig(0, 1, 0)).state
    assert state is not None
    assert state.members.membership.ranks == (0,)


def again(records: list[bytes]) -> bytes:
    """The newest round once more."""
    return next(record for record in reversed(records) if record[:1] == CLOSED)


CLOSED = b"\x1a"  # the tag of `Record.closed`


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (again, r"record \d+ since the checkpoint does not follow"),
        (lambda _: b"", "cannot be read: a record None is not known here"),
        (lambda _: b"\xff\xff", "cannot be read"),
        (lambda records: again(records)[:-3], "cannot be read"),
    ],
    ids=["a round twice", "empty", "noise", "cut"],
)
def test_a_record_that_makes_no_sense_is_data_loss(
    tmp_path: Path, record: Callable[[list[bytes]], bytes], said: str
) -> None:
    """Its checksum is right and it is none: of another version, or written by somebody else."""
    ran(tmp_path, NO_CHECKPOINTS)
    records = [data for _, data in read_history(tmp_path).records()]
    with closing(Journal(tmp_path)) as journal:
        journal.recover()
        journal.append(record(records))
    with pytest.raises(DataLossError, match=said):
        recovered(tmp_path)


@pytest.mark.parametrize("table", [b"", b"\xff\xff"], ids=["empty", "noise"])
def test_a_checkpoint_that_makes_no_sense_is_data_loss(tmp_path: Path, table: bytes) -> None:
    """Its checksum is right and it holds no shard."""
    with closing(Journal(tmp_path)) as journal:
        journal.recover()
        journal.checkpoint(table, {"parameters": torch.zeros(2)})
    with pytest.raises(DataLossError, match="a checkpoint cannot be read"):
        recovered(tmp_path)


def test_records_before_the_run_is_opened_are_data_loss(tmp_path: Path) -> None:
    """A log that begins in the middle of a run."""
    source, folder = tmp_path / "source", tmp_path / "other"
    ran(source, NO_CHECKPOINTS)
    closed = again([data for _, data in read_history(source).records()])
    with closing(Journal(folder)) as journal:
        journal.recover()
        for record in (Returned(0, 0, 1), Agreed(0, {"loss": 1.0})):
            journal.append(record_to_bytes(record))
        journal.append(closed)
    with pytest.raises(DataLossError, match="a record closed is not known here"):
        recovered(folder)
