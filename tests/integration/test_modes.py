"""Modes in which nobody waits for the slowest: what only a slow worker knows is learned all the same."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from thresher.deploy.in_process import in_process
from thresher.protos.consistency import Consistency
from thresher.worker import Method, Session

CLASSES = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))
"""Of each rank, and of nobody else."""

SLOW = 2
SLOW_STEPS = 150
BATCH = 32


class Pace:
    """Lets one worker begin a step when the others have made two, and keeps these from running away from it.

    Nobody sleeps, so that a busy machine changes nothing. Whoever has pushed is never waited for here.

    Args:
        lead: How many steps ahead the mode lets the others be.
    """

    def __init__(self, lead: float) -> None:
        self._lead = lead
        self._changed = threading.Condition()
        self._fast = self._slow = 0
        self._computes = True
        self.over = False

    def begin_fast_step(self, step: int) -> None:
        """Wait while the slow worker has yet to finish a gradient that takes it as long as two of these."""
        with self._changed:
            self._changed.wait_for(lambda: self.over or not self._computes or step < 2 * self._slow + 2)
            self._fast = max(self._fast, step)
            self._changed.notify_all()

    @contextmanager
    def slow_step(self) -> Iterator[None]:
        """Wait until a fast worker has made two steps for each of the slow one's, or all it may, and then take one."""
        with self._changed:
            self._changed.wait_for(lambda: self._fast >= min(2 * self._slow, self._slow + self._lead))
            self._computes = False
            self._changed.notify_all()
        yield
        with self._changed:
            self._slow += 1
            self._computes, self.over = True, self._slow == SLOW_STEPS
            self._changed.notify_all()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, for training and for the test."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def batches(images: Tensor, labels: Tensor, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, of one rank's classes only."""
    own = torch.isin(labels, torch.tensor(CLASSES[rank])).nonzero().view(-1)
    generator = torch.Generator().manual_seed(rank)
    while True:
        chosen = own[torch.randint(len(own), (BATCH,), generator=generator)]
        yield images[chosen], labels[chosen]


@pytest.mark.parametrize(
    "consistency",
    [
        Consistency(quorum=2),
        Consistency("ssp", staleness=4),
        Consistency("async"),
        Consistency("async", downlink="shadow", shadow_threshold=1e-3),
    ],
    ids=Consistency.describe,
)
def test_what_only_a_slow_worker_knows_is_learned(consistency: Consistency) -> None:
    """At half the others' speed each of its steps counts: none is returned, and its classes are learned."""
    train_images, train_labels, images, labels = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [network() for _ in CLASSES]
    pace = Pace(consistency.staleness if consistency.mode == "ssp" else math.inf)

    def work(session: Session) -> None:
        model = models[session.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        session.wrap(model, optimizer)
        for step, (inputs, classes) in enumerate(batches(train_images, train_labels, session.rank)):
            if session.rank != SLOW:
                pace.begin_fast_step(step)
            if pace.over:
                break
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs), classes))
            if session.rank != SLOW:
                optimizer.step()
                continue
            with pace.slow_step():
                optimizer.step()

    method = Method("TopK(0.1)")
    with in_process(shards=1, workers=len(CLASSES), method=method, consistency=consistency) as cluster:
        cluster.run(work)
        (shard,) = cluster.statistics()
    steps = [member.steps for member in shard.members]
    assert shard.verdicts["returned"] == 0
    assert steps[SLOW] == SLOW_STEPS
    assert 0.4 * max(steps) <= SLOW_STEPS, steps
    if consistency.mode == "ssp":
        # Who waits when the slow one has made its last step is let go by that, and by its leave once more.
        assert max(steps) <= SLOW_STEPS + consistency.staleness + 2, steps
    else:
        assert max(steps) >= SLOW_STEPS / 0.6, steps
    with torch.no_grad():
        right = models[0](images).argmax(1) == labels
    assert right[torch.isin(labels, torch.tensor(CLASSES[SLOW]))].float().mean() > 0.8
    assert right.float().mean() > 0.8


@pytest.mark.parametrize("downlink", ["updates", "shadow"])
@pytest.mark.parametrize("per_push", [False, True])
def test_a_gradient_moves_the_model_as_far_with_momentum_per_push(per_push: bool, downlink: Any) -> None:
    """In the end by lr·g/(N·(1 - β)), as in sync; that it takes N times as many pushes is told to all who replay it."""
    gradients = torch.tensor([[3.0, -2.0], [5.0, 4.0]])
    models = [nn.Linear(2, 1, bias=False) for _ in gradients]

    def work(session: Session) -> None:
        model = models[session.rank]
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.64)
        session.wrap(model, optimizer)
        for step in range(50):
            model.weight.grad = gradients[session.rank].view(1, 2) * (step == 0)
            optimizer.step()
        session.mean({"done": 1.0})
        optimizer.step()

    consistency = Consistency("async", downlink=downlink, momentum_per_push=per_push)
    with in_process(shards=1, workers=2, consistency=consistency) as cluster:
        cluster.run(work)
        row = cluster.statistics()[0].last_row
    expected = -0.5 * gradients.sum(0) / (2 * (1 - 0.64))
    assert all(torch.allclose(model.weight.detach()[0], expected, rtol=1e-5) for model in models)
    assert row is not None
    assert row.learning_rate == pytest.approx(0.5 * (1 - 0.8) / (1 - 0.64) if per_push else 0.5)
