"""Image classification: a ResNet of eight layers on Fashion-MNIST."""

from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.papers.data import fashion_mnist
from benchmarks.papers.recipe import Form
from benchmarks.papers.task import WORKERS, Flat, Plan, Task

BATCH: Final = 32  # images of one worker in a round
EVALUATED: Final = 100  # images at a time, few enough to stay in a core's cache
WIDTH: Final = 16


@final
class Images(Task):
    """Accuracy in % on the 10,000 images of the test set.

    The first convolution has stride 2 and a pooling follows, so that a core does 3,000 images a second. Batch
    statistics are each worker's own; the running ones, which the evaluation uses, go over the batches of all.
    """

    quality_name = "accuracy in %"
    higher_is_better = True

    def __init__(self, seed: int) -> None:
        images = fashion_mnist()
        self._x, self._test_x = (_normalised(torch.from_numpy(x)) for x in (images.train_x, images.test_x))
        self._y, self._test_y = (torch.from_numpy(y).long() for y in (images.train_y, images.test_y))
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self._x), generator=self._generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = Flat(_resnet())

    def plan(self, form: Form) -> Plan:
        """Paper 1, Table 1, but for the length and the rate, which fits a batch of 256."""
        return Plan(rounds=120 if form == "short" else 240, rate=0.2, momentum=0.9, weight_decay=1e-4)

    def gradient(self, worker: int, point: Tensor, step: int) -> Tensor:
        """Of the worker's next images; each image is seen once in a pass over all of them."""
        begin = (step * WORKERS + worker) * BATCH % (len(self._order) - BATCH)
        chosen = self._order[begin : begin + BATCH]
        x, y = self._x[chosen], self._y[chosen]
        return self.network.gradient(point, lambda network: cross_entropy(network(x), y))

    def quality(self, point: Tensor) -> float:
        """Accuracy in %."""
        network = self.network.at(point)
        right = 0
        with torch.no_grad():
            for begin in range(0, len(self._test_y), EVALUATED):
                some = slice(begin, begin + EVALUATED)
                right += int((network(self._test_x[some]).argmax(1) == self._test_y[some]).sum())
        return 100.0 * right / len(self._test_y)


def _normalised(images: Tensor) -> Tensor:
    """[number, 1, 28, 28] float32 with the mean and the deviation of the training pixels taken out."""
    return images.unsqueeze(1).float().sub_(72.94).div_(90.02)


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → [batch, out, height / stride, width / stride]."""
        return torch.relu(self.convolutions(x) + self.shortcut(x))


def _resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _Block(WIDTH, WIDTH, 1),
        _Block(WIDTH, 2 * WIDTH, 1),
        _Block(2 * WIDTH, 4 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, 10),
    )
