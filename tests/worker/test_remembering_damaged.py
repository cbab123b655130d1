"""A worker whose memory is damaged, old, or cannot be written: the same bits, or an error that says what is lost."""

import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.server.small_disk import fill, mounted
from tests.worker.training import Cluster, Killed, Scale, cluster, set_gradients, sgd
from torch import Tensor

from thresher.protos import faults
from thresher.protos.errors import DataLossError, ThresherError
from thresher.worker import Method, Session
from thresher.worker import memory as module
from thresher.worker.memory import MemoryFileError

STEPS = 6
SPARSE = Method(threshold=1.0)


def train(session: Session) -> Tensor:
    """Make steps whose gradients depend on the parameters, so that a step made on other ones is another step."""
    model = Scale(8)
    optimizer = sgd(model, lr=0.5, momentum=0.5)
    session.wrap(model, optimizer)
    while session.step < STEPS:
        optimizer.zero_grad()
        inputs = torch.linspace(-2.0, 2.0, 8) * (session.step + session.rank + 1)
        model(inputs).square().mean().backward()
        optimizer.step()
    session.close()
    return torch.cat([model.weight.detach(), model.bias.detach()])


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    with cluster(2, 2, method=SPARSE) as served:
        return served.run(train)[0]


def damage_newest(path: Path) -> None:
    """Flip a bit in the middle of the half that the worker would go on from."""
    content = bytearray(path.read_bytes())
    slots = [module._Slot.unpack(bytes(content[at : at + module._SECTOR])) for at in module._SLOTS_AT]
    newest = max((slot for slot in slots if slot is not None), key=lambda slot: slot.sequence)
    content[(newest.offset + newest.end) // 2] ^= 16
    path.write_bytes(content)


class Plan:
    """Kills worker 0 when it comes to a place for the n-th time, and harms its file; worker 1 makes its steps later.

    Worker 1 begins step ``held`` when worker 0, in its second life, has pushed once more; or at once, where it is None.
    """

    def __init__(self, phase: str, count: int, harm: Callable[[], None], held: int | None) -> None:
        self._phase, self._count, self._harm, self._held = phase, count, harm, held
        self.seen = self._gradients = 0
        self._again = threading.Event()

    def __call__(self, who: str, where: str) -> None:
        if (who, where) == ("worker 1", "gradient"):
            self._gradients += 1
            if self._gradients - 1 == self._held:
                assert self._again.wait(30)
        if (who, where) != ("worker 0", self._phase):
            return
        self.seen += 1
        if self.seen > self._count:
            self._again.set()
        if self.seen == self._count:
            time.sleep(0.2)  # what was pushed arrives
            self._harm()
            raise Killed


def file_of(folder: Path) -> Path:
    return folder / "workers" / "worker-0.state"


@pytest.mark.parametrize("pushes", [7, 8], ids=["one shard has its push", "both shards have it"])
def test_from_the_half_before_a_round_that_is_open_is_made_again(
    pushes: int, undisturbed: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is made once more, from the same state on the same parameters: the same push, which counts once."""
    plan = Plan("in flight", pushes, lambda: damage_newest(file_of(tmp_path)), held=3)
    with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True) as served, faults.plan(plan):
        results = served.run(train)
        steps = [[member.steps for member in served.statistics(shard).members] for shard in range(2)]
        duplicates = [served.statistics(shard).verdicts["duplicate"] for shard in range(2)]
    assert "one half is damaged" in caplog.text
    assert steps == [[STEPS, STEPS]] * 2
    assert duplicates == [1, int(pushes == 8)]
    assert all(torch.equal(one, undisturbed) for one in results)


def raised(served: Cluster) -> list[ThresherError]:
    """What each worker ends with."""

    def work(rank: int) -> None:
        try:
            served.work(train, rank)
        except ThresherError as error:
            found[rank] = error

    found: dict[int, ThresherError] = {}
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in (0, 1)]


@pytest.mark.parametrize("age", ["the half before", "an old copy"])
def test_an_older_state_is_never_gone_on_with(age: str, tmp_path: Path) -> None:
    """The round after it is closed, so its step cannot be made again: an error names worker, file, shard and step."""
    copy = tmp_path / "copy"

    def keep_a_copy(who: str, where: str) -> None:
        if (who, where) == ("worker 0", "gradient") and plan.seen == 1:
            shutil.copy(file_of(tmp_path), copy)
        plan(who, where)

    def harm() -> None:
        if age == "an old copy":
            shutil.copy(copy, file_of(tmp_path))
        else:
            damage_newest(file_of(tmp_path))

    plan = Plan("gradient", 5, harm, held=None)
    with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True) as served, faults.plan(keep_a_copy):
        first, second = raised(served)
    assert isinstance(first, DataLossError)
    assert f"worker 0 finds push {2 if age == 'the half before' else 0} in {file_of(tmp_path)}" in str(first)
    assert re.search("shard 0 at .* has taken its push 3: the file is older", str(first))
    assert str(first) in str(second)


def test_a_read_only_folder(tmp_path: Path) -> None:
    """It is told before anything is sent."""
    (tmp_path / "workers").mkdir()
    with mounted(tmp_path / "workers", "ro"), cluster(1, 1, tmp_path, worker_memory=True) as served:
        with pytest.raises(MemoryFileError, match=r"workers/worker-0.state: Read-only file system.*its permissions"):
            served.work(train, 0)
        assert served.statistics().model_numel == 0


def test_a_disk_that_was_full(undisturbed: Tensor, tmp_path: Path) -> None:
    """The run ends with an error that names the file; with room, everything started again goes on: same bits."""
    folder = tmp_path / "workers"
    folder.mkdir()
    seen = 0

    def strike(who: str, where: str) -> None:
        nonlocal seen
        seen += (who, where) == ("worker 0", "compress")
        if (who, where, seen) == ("worker 0", "compress", 2):  # the second half is yet to be made
            fill(folder / "ballast")

    with mounted(folder, "size=64k"):
        with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True) as served, faults.plan(strike):
            told = raised(served)
        assert any(isinstance(error, MemoryFileError) for error in told)
        assert "No space left on device; what was flipped before is whole" in str(told)
        (folder / "ballast").unlink()
        with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True) as served:
            results = served.run(train)
    assert all(torch.equal(one, undisturbed) for one in results)


def test_a_script_that_raised_goes_on(undisturbed: Tensor, tmp_path: Path) -> None:
    """Its exception ends the run; everything started again in the same folders, it makes that step once more."""
    seen = 0

    def strike(who: str, where: str) -> None:
        nonlocal seen
        seen += (who, where) == ("worker 1", "gradient")
        if (who, where, seen) == ("worker 1", "gradient", 4):
            raise DataLossError("of the script's own")

    with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True) as served, faults.plan(strike):
        assert "of the script's own" in str(raised(served)[0])
    with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True) as served:
        results = served.run(train)
        steps = [[member.steps for member in served.statistics(shard).members] for shard in range(2)]
    assert steps == [[STEPS, STEPS]] * 2
    assert all(torch.equal(one, undisturbed) for one in results)


def test_a_loop_that_takes_its_batches_elsewhere_begins_anew(tmp_path: Path) -> None:
    """What was pushed counts once; the script's own loop starts at its first batch, and makes all its steps again."""
    seen = 0

    def strike(who: str, where: str) -> None:
        nonlocal seen
        seen += (who, where) == ("worker 0", "gradient")
        if (where, seen) == ("gradient", 3):
            raise Killed

    def work(session: Session) -> tuple[int, float]:
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        for value in (1.0, 2.0, 4.0):
            set_gradients(model, value)
            optimizer.step()
        return session.step, model.bias.tolist()[0]

    with cluster(1, 1, tmp_path, worker_memory=True) as served, faults.plan(strike):
        # Its second step is finished by the first step() of its second life; two more follow.
        assert served.run(work) == [(4, -(1.0 + 2.0) - (2.0 + 4.0))]
