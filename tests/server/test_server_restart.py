"""A whole shard killed and started again from its folder: it goes on as if it had not been, and says what it cannot."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.server.conversing import (
    Conversation,
    Served,
    agree,
    frame_of,
    hello,
    leave,
    make_rounds,
    push,
    reached_at,
    serving,
    told,
)

from thresher.protos.errors import DataLossError, FencedError, JournalError
from thresher.protos.faults import plan
from thresher.server.journal import read_history
from thresher.server.records import HEADER_BYTES
from thresher.v1 import aggregation_pb2 as pb

STEPS = 7  # so that the last is no checkpoint


@contextmanager
def restarted(folder: Path, **config: float) -> Iterator[Served]:
    """A shard that keeps everything in a folder, which can be copied at any time: nothing is removed from it."""
    kept = {"state_dir": folder / "state", "iterations": folder / "rows.jsonl", "checkpoints": 100}
    with serving(kept, checkpoint_every=2, **config) as served:
        yield served


def killed(folder: Path, to: Path) -> Path:
    """What a folder would be, were its process killed at this moment: all that has been written, and no more."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("unfinished", "lock"))
    return to


def versions_in_rows(folder: Path) -> list[int]:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [int(line.split('"version": ')[1].split(",")[0]) for line in lines]


@dataclass(frozen=True)
class End:
    """All by which two runs are compared."""

    snapshot: bytes
    history: pb.History
    workers: list[tuple[int, int, int, str]]
    rows: list[int]


def end_of(served: Served, talks: list[Conversation], folder: Path) -> End:
    for talk in talks:
        talk.say(leave())
        assert talk.hear().HasField("left")
    parts = served.parts()
    workers = [(one.steps, one.push_bytes, one.pushed_elements, one.state) for one in served.statistics().workers]
    return End(b"".join(part.chunk for part in parts), parts[0].history, workers, versions_in_rows(folder))


def test_a_shard_killed_at_any_place_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Law: killed anywhere, its model, history, counters and rows at the end are those of the undisturbed run.

    The workers greet with the last they were told, and push again what was not answered.
    """
    images: list[tuple[Path, pb.History]] = []
    heard = pb.History()

    def strike(_who: str, phase: str) -> None:
        known = heard
        if known.version in (1, 3, 4) or phase == "checkpoint":
            images.append((killed(tmp_path / "undisturbed", tmp_path / f"{len(images)} {phase}"), known))

    with restarted(tmp_path / "undisturbed") as served:
        with plan(strike):
            talks = served.join()
            run = served.parts()[0].history.run
            for step in range(STEPS):
                update = make_rounds(talks, range(step, step + 1))
                heard = pb.History(run=run, version=step + 1, digest=update.digest)
        undisturbed = end_of(served, talks, tmp_path / "undisturbed")
    assert {image.name.split(maxsplit=1)[1] for image, _ in images} == {
        "round open", "apply", "append", "tell", "checkpoint"
    }  # fmt: skip
    for image, history in images:
        step = history.version
        with restarted(image) as served:
            again = [served.register(rank) for rank in (0, 1)]
            if not again[0].seeded:  # killed while the first checkpoint was written: nobody was told of a seed
                continue
            talks = [served.talk(hello(rank, history=history)) for rank in (0, 1)]
            for rank, talk in enumerate(talks):
                if again[rank].settled_steps == step:  # it has no verdict
                    talk.say(*push(step, frame_of(1.0 + step + rank)))
            assert {talk.hear_update().version for talk in talks} == {step + 1}
            if step + 1 < STEPS:
                make_rounds(talks, range(step + 1, STEPS))
            assert end_of(served, talks, image) == undisturbed, image.name


SERVE = """
import asyncio, sys
from pathlib import Path
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer

async def main():
    folder = Path(sys.argv[1])
    config = ShardConfig(0, 1, 2, checkpoint_every=2)
    server = ShardServer(ServerConfig(config, state_dir=folder / "state", iterations=folder / "rows.jsonl"))
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def started(folder: Path, *, armed: str) -> Iterator[tuple[Served, "subprocess.Popen[str]"]]:
    """A shard in a process of its own, which kills itself at the place that is armed."""
    faults = folder / "faults"
    faults.mkdir(exist_ok=True)
    environment = {**os.environ, "THRESHER_FAULTS": str(faults)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, folder], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            with reached_at(process.stdout.readline().strip()) as served:
                (faults / "shard-0").write_text(armed, encoding="utf-8")
                yield served, process
        finally:
            process.kill()


def test_a_record_that_a_kill_cut_in_half_is_made_once_more(tmp_path: Path) -> None:
    """With a real SIGKILL in the middle of it: nobody was told of the round, and the workers say their pushes again."""
    with started(tmp_path, armed="never") as (served, process):
        talks = served.join()
        history = told(served, make_rounds(talks, range(2)))
        (tmp_path / "faults" / "shard-0").write_text("append", encoding="utf-8")
        for talk in talks:
            talk.say(*push(2, frame_of(1.0)))
        assert process.wait(60) == -signal.SIGKILL
    with restarted(tmp_path) as served:
        assert served.snapshot()[0] == 2
        make_rounds(served.come_back(history, history), range(2, 5))


def test_a_process_that_kills_itself_comes_back_with_all_it_had_told(tmp_path: Path) -> None:
    """With a real SIGKILL between the journal and those who wait for the answer: the round is there, once."""
    history = pb.History()
    with started(tmp_path, armed="never") as (served, process):
        talks = served.join()
        history = told(served, make_rounds(talks, range(2)))
        (tmp_path / "faults" / "shard-0").write_text("tell", encoding="utf-8")
        for talk in talks:
            talk.say(*push(2, frame_of(1.0)))
        assert process.wait(60) == -signal.SIGKILL
    with restarted(tmp_path) as served:
        assert served.snapshot()[0] == 3
        talks = served.come_back(history, history)
        assert [talk.hear_update().version for talk in talks] == [3, 3]
        make_rounds(talks, range(3, 5))
    assert versions_in_rows(tmp_path) == [1, 2, 3, 4, 5]


def test_a_shard_that_ends_in_peace_has_nothing_to_replay(tmp_path: Path) -> None:
    """Its last checkpoint holds everything; the next life goes on from there, with the members that were."""
    with restarted(tmp_path) as served:
        history = told(served, make_rounds(served.join(), range(3)))
    newest = read_history(tmp_path / "state").generations[-1]
    assert list(read_history(tmp_path / "state").records(newest)) == []
    with restarted(tmp_path) as served:
        assert [worker.state for worker in served.statistics().workers] == ["lost", "lost"]
        assert make_rounds(served.come_back(history, history), range(3, 4)).version == 4
    assert versions_in_rows(tmp_path) == [1, 2, 3, 4]


def test_lives_leaves_and_agreements_are_remembered(tmp_path: Path) -> None:
    """After a restart an earlier life is still fenced, who left has left, and an agreement is told again."""
    with restarted(tmp_path) as served:
        first, second = served.join()
        for talk in (first, second):
            talk.say(agree(0, loss=2.0))
        assert first.hear().agreed.values["loss"] == second.hear().agreed.values["loss"] == 2.0
        second.say(leave())
        assert second.hear().HasField("left")
        served.register(0, incarnation=2)
        killed(tmp_path / "state", tmp_path / "image" / "state")
    with restarted(tmp_path / "image") as served:
        served.register(0, incarnation=2)
        assert isinstance(served.talk(hello(0)).hear_refusal()[1], FencedError)
        again = served.talk(hello(0, incarnation=2), agree(0, loss=9.0))
        assert again.hear().agreed.values["loss"] == 2.0
        assert served.register(1).membership.ranks == [0]
        left = served.talk(hello(1), leave())
        assert left.hear().HasField("left")
        again.say(*push(0, frame_of(1.0)))
        assert again.hear_update().members == 1


def test_a_shard_killed_before_its_seed_asks_for_it_again(tmp_path: Path) -> None:
    """What was registered is known; nobody was told of a seed."""
    with restarted(tmp_path) as served:
        run = served.register(0).run
    with restarted(tmp_path) as served:
        answer = served.register(0)
        assert (answer.run, answer.seeded) == (run, False)
        talks = served.join()
        assert make_rounds(talks, range(1)).version == 1


# --- what cannot go on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"shard": 1, "shards": 2}, "shard 0 of 1 for 2 workers, not of shard 1 of 2 for 2"),
        ({"workers": 3}, "not of shard 0 of 1 for 3"),
    ],
)
def test_the_folder_of_another_shard_is_refused(tmp_path: Path, config: dict[str, int], said: str) -> None:
    """Before anything is served, with both named; the folder is left for the right one."""
    with restarted(tmp_path) as served:
        make_rounds(served.join(), range(1))
    with pytest.raises(DataLossError, match=said), restarted(tmp_path, **config):
        pass
    with restarted(tmp_path) as served:
        assert served.snapshot()[0] == 1


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    """Two shards never share one."""
    with restarted(tmp_path), pytest.raises(JournalError, match="another process uses it"), restarted(tmp_path):
        pass


def test_damage_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    """A flipped bit in the log that is needed: the file and the place are named, and nothing is changed."""
    with restarted(tmp_path) as served:
        make_rounds(served.join(), range(STEPS))
        image = killed(tmp_path / "state", tmp_path / "image" / "state")
    for checkpoint in image.glob("*.safetensors"):
        checkpoint.write_bytes(b"damaged")
    log = next(image.glob("log-*.bin"))
    damaged = bytearray(log.read_bytes())
    damaged[HEADER_BYTES + 20] ^= 1
    log.write_bytes(damaged)
    before = {path.name: path.read_bytes() for path in image.iterdir() if path.name != "lock"}
    with (
        pytest.raises(DataLossError, match=r"log-.*bin, byte .*bring the file back from a copy"),
        restarted(tmp_path / "image"),
    ):
        pass
    assert {path.name: path.read_bytes() for path in image.iterdir() if path.name != "lock"} == before


def test_a_seed_that_is_damaged_is_data_loss(tmp_path: Path) -> None:
    """It is in no log: rounds that were closed on it cannot be replayed, although the log has them all."""
    with serving({"state_dir": tmp_path / "state"}, checkpoint_every=100) as served:
        make_rounds(served.join(), range(STEPS))
        image = killed(tmp_path / "state", tmp_path / "image")
    (seed,) = image.glob("checkpoint-*.safetensors")
    damaged = bytearray(seed.read_bytes())
    damaged[-1] ^= 1
    seed.write_bytes(damaged)
    with pytest.raises(DataLossError, match="closed before the shard was seeded"), serving({"state_dir": image}):
        pass
    assert [path.name for path in image.glob("*.damaged")] == [f"{seed.name}.damaged"]
