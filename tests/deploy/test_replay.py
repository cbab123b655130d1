"""Journals read again: any kept version is what the workers saw, and what was changed on disk is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from thresher.deploy.cli import app
from thresher.deploy.in_process import in_process
from thresher.deploy.replay import Replay, ShardReplay
from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError, DataLossError
from thresher.server.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from thresher.server.state import RunState
from thresher.worker import Method, Session

STEPS = 12
SHADOW = Consistency("async", downlink="shadow", shadow_threshold=0.05)

Seen = list[dict[str, torch.Tensor]]


def training(seen: Seen) -> Callable[[Session], None]:
    """Return a worker's work; rank 0 adds the model it has at each version."""

    def work(session: Session) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        session.wrap(model, optimizer)
        generator = torch.Generator().manual_seed(session.rank)
        for step in range(STEPS + 1):
            if session.rank == 0:
                seen.append({name: value.clone() for name, value in model.named_parameters()})
            if step < STEPS:
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
        session.close()

    return work


def run_of(folder: Path, consistency: Consistency | None = None, workers: int = 2, every: int = 5) -> Seen:
    """Make a run of two shards with checkpoints at versions 0, 5 and 10, and at its end."""
    seen: Seen = []
    kept = folder / "state"
    method = Method(threshold=0.5)
    with in_process(
        shards=2, workers=workers, method=method, consistency=consistency, state_dir=kept, checkpoint_every=every
    ) as cluster:
        cluster.run(training(seen))
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A run, and the model that rank 0 had at each version."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_of(folder)


@pytest.fixture
def changeable(finished: tuple[Path, Seen], tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("downlink", ["updates", "shadow"])
def test_every_kept_version_is_what_the_workers_had(downlink: str, finished: tuple[Path, Seen], tmp_path: Path) -> None:
    """Law: version v of the replay is the model after v updates, bit for bit; of a run with a shadow, the shadow."""
    folder, seen = finished if downlink == "updates" else (tmp_path, run_of(tmp_path, SHADOW, workers=1))
    replay = Replay(folder)
    ((first, last),) = replay.spans
    assert last == STEPS
    assert first <= 10
    for version in range(first, last + 1):
        model = replay.model(version)
        assert {name: value for name, value in model.items() if name in seen[version]}.keys() == seen[version].keys()
        assert all(torch.equal(model[name], value) for name, value in seen[version].items())
    assert replay.model(STEPS)["1.running_mean"].shape == (4,)


def test_verify_compares_with_all_checkpoints_there_are(finished: tuple[Path, Seen]) -> None:
    """Every kept checkpoint but the first is come to by replay; that is said version by version."""
    for shard, found in enumerate(Replay(finished[0]).verify()):
        assert (found.shard, found.last) == (shard, STEPS)
        assert (*found.begun, *found.checkpoints) == (5, 10, STEPS)
        assert found.first == 5
        assert found.records > STEPS - 5


def test_the_first_checkpoint_is_the_seed_while_nothing_was_cut(tmp_path: Path) -> None:
    """A run with few checkpoints reaches back to the values it began with."""
    seen = run_of(tmp_path, every=0)
    replay = Replay(tmp_path)
    assert replay.spans == [(0, STEPS)]
    assert all(torch.equal(replay.model(0)[name], value) for name, value in seen[0].items())
    assert replay.verify()[0].begun == (0,)


def test_verify_finds_what_no_checksum_tells(changeable: Path) -> None:
    """One bit of one parameter of a checkpoint, changed with its checksum: tensor, version and shard are named."""
    path = max((changeable / "state" / "shard-1").glob("checkpoint-*"))
    generation = int(path.stem.split("-")[1])
    checkpoint = read_checkpoint(path, generation)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32 and tensor.numel() > 1)
    tensors[name].view(torch.int32)[1] ^= 1
    write_checkpoint(path, Checkpoint(generation, checkpoint.table, tensors))
    with pytest.raises(DataLossError, match=rf"shard 1 .*version {STEPS}: 1 of \d+ elements of {name}"):
        Replay(changeable).verify()


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_verify_finds_any_flipped_bit(finished: tuple[Path, Seen], where: float, bit: int, data: st.DataObject) -> None:
    """A bit flipped anywhere in a log or a checkpoint: DataLossError, or nothing that was compared has changed."""
    folder = finished[0] / "state" / "shard-0"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    path = data.draw(st.sampled_from([path for path in files if path.stat().st_size]))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[int(where * len(whole))] ^= 1 << bit
    before = ShardReplay(0, folder).verify()
    path.write_bytes(flipped)
    try:
        found = ShardReplay(0, folder).verify()
    except DataLossError:
        return
    finally:
        path.write_bytes(whole)
    # The tail of the newest log may be torn: that is no damage, there are fewer records then.
    assert path == files[-1]
    assert found.records < before.records


def test_a_damaged_checkpoint_is_gone_round(changeable: Path, finished: tuple[Path, Seen]) -> None:
    """Without --verify the records before a damaged checkpoint lead to the versions behind it."""
    for path in sorted((changeable / "state" / "shard-0").glob("checkpoint-*"))[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    replay = Replay(changeable)
    assert replay.spans == [(5, STEPS)]
    assert all(torch.equal(replay.model(STEPS)[name], value) for name, value in finished[1][STEPS].items())
    with pytest.raises(DataLossError, match="checkpoint"):
        replay.verify()


def refilled(folder: Path) -> Seen:
    """Make a run in which shard 1 is brought back from a copy of version 4 of its folder, and a worker refills it."""
    seen: Seen = []
    steps, kept, copy = 0, folder / "state" / "shard-1", folder / "copy"
    with in_process(
        shards=2, workers=1, method=Method(threshold=0.5), state_dir=folder / "state", checkpoint_every=0
    ) as cluster:

        def strike(who: str, phase: str) -> None:
            nonlocal steps
            if (who, phase) != ("worker 0", "compress"):
                return
            if steps == 4:
                shutil.copytree(kept, copy)
            elif steps == 8:
                cluster.kill(1)
                shutil.rmtree(kept)
                copy.rename(kept)
                cluster.start(1)
            steps += 1

        with faults.plan(strike):
            cluster.run(training(seen))
    return seen


def test_a_shard_that_was_refilled_begins_anew(tmp_path: Path) -> None:
    """Both stretches are verified and can be written, what lies between is not kept, and that is said."""
    seen = refilled(tmp_path)
    replay = Replay(tmp_path)
    assert replay.spans == [(0, 4), (8, STEPS)]
    one, other = replay.verify()
    assert (one.begun, other.begun, other.first, other.last) == ((0,), (0, 8), 0, STEPS)
    for version in (0, 4, 8, STEPS):
        model = replay.model(version)
        assert all(torch.equal(model[name], value) for name, value in seen[version].items())
    with pytest.raises(ConfigurationError, match=r"version 6 of .* kept are versions 0 … 4, 8 … 12"):
        replay.model(6)


def test_a_gap_that_no_refill_explains_is_found(changeable: Path) -> None:
    """A checkpoint of a version that the log does not lead to: lost records are no refill."""
    newest = max((changeable / "state" / "shard-1").glob("checkpoint-*"))
    generation = int(newest.stem.split("-")[1])
    checkpoint = read_checkpoint(newest, generation)
    state = RunState.restored(checkpoint.table, checkpoint.tensors)
    assert state.replica is not None
    state.replica.version = STEPS + 5
    write_checkpoint(newest, Checkpoint(generation, state.table(), checkpoint.tensors))
    with pytest.raises(DataLossError, match=f"version {STEPS + 5}: the log leads to version {STEPS} "):
        Replay(changeable).verify()


def test_the_folder_of_the_state_alone_is_as_good(finished: tuple[Path, Seen]) -> None:
    """Shards that nobody launched here have a folder of their choice."""
    assert Replay(finished[0] / "state").spans == Replay(finished[0]).spans


def test_a_folder_without_state_is_refused(tmp_path: Path, changeable: Path) -> None:
    """No journal, or not those of all shards: said so, with the folder."""
    with pytest.raises(ConfigurationError, match="holds no state of shards"):
        Replay(tmp_path)
    shutil.rmtree(changeable / "state" / "shard-1")
    with pytest.raises(ConfigurationError, match="1 shards, which are not all"):
        Replay(changeable).model(STEPS)


def test_the_command_writes_says_and_verifies(changeable: Path, finished: tuple[Path, Seen]) -> None:
    """`thresher replay`: the model as safetensors, JSON when asked for, and what is kept when a version is not."""
    run = CliRunner().invoke
    told = run(app, ["replay", str(changeable), "--version", "7", "--verify", "--json"])
    assert told.exit_code == 0, told.output
    said = json.loads(told.output)
    assert said["kept"] == [[5, STEPS]]
    assert [one["checkpoints"] for one in said["verified"]] == [[10, STEPS]] * 2
    assert said["model"] == str(changeable / "model-7.safetensors")
    model = load_file(said["model"])
    assert all(torch.equal(model[name], value) for name, value in finished[1][7].items())

    told = run(app, ["replay", str(changeable), "--verify", "--version", "8", "--output", str(changeable / "m")])
    assert "equal to the checkpoints of versions 10, 12, bit for bit" in told.output
    assert (changeable / "m").exists()
    told = run(app, ["replay", str(changeable), "--version", "3"])
    assert (told.exit_code, "kept are versions 5 … 12" in " ".join(told.output.split())) == (2, True)
    told = run(app, ["replay", str(changeable), "--version", "8", "--output", str(changeable / "no" / "m")])
    assert (told.exit_code, "cannot be written" in told.output) == (2, True)
    assert "kept are versions 5 … 12" in run(app, ["replay", str(changeable)]).output
