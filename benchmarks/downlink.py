"""Updates beside the shadow: what comes down, and what is learned, for three optimizers.

    python benchmarks/downlink.py

Four workers, error feedback and a hard threshold on the way up, and one shard, all in this process; the network and the
data of examples/digits.py. A message down is a frame of the codec, without what the transport puts around it: of the
mean that workers would replay, or of the shadow's assignments. Within a seed all runs start from the same weights and
see the same batches. Prints a table of means over the seeds, or with --json every single run.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from thresher.compression import ErrorFeedback, HardThreshold
from thresher.protos.codec import decode, encode
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.mean import mean_of
from thresher.protos.optimizers import spec_of
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.shadow import Shadow

WORKERS = 4
BATCH = 32
SHADOWS = (None, 0.0, 0.0003, 0.001, 0.003, 0.01)
"""Thresholds of the shadow, in units of the parameters; None: updates."""

Builder = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Builder] = {
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "SGD, momentum 0.9, weight decay 5e-4": lambda parameters: torch.optim.SGD(
        parameters, lr=0.05, momentum=0.9, weight_decay=5e-4
    ),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


@dataclass(frozen=True)
class Run:
    """One training run; densities and bytes are means per step, of one worker's push and of the message down."""

    optimizer: str
    shadow: float | None
    seed: int
    density_up: float
    bytes_up: float
    density_down: float
    bytes_down: float
    accuracy: float  # of the parameters x at the shard
    accuracy_seen: float  # of what the workers hold


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", Path(__file__).parent.parent / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Workers:
    """All of them hold the same parameters, so that one model serves; residual and data are each one's own."""

    def __init__(self, digits: ModuleType, build: Builder, threshold: float, seed: int) -> None:
        torch.manual_seed(seed)
        train, self._test = digits.data()
        self._images, self._labels = train.tensors
        self._digits = digits
        self._model: nn.Module = digits.network()
        self._spec = spec_of(build(self._model.parameters()))
        self.parameters = list(self._model.parameters())
        numel = sum(parameter.numel() for parameter in self.parameters)
        self._generators = [torch.Generator().manual_seed(seed * WORKERS + rank) for rank in range(WORKERS)]
        self._feedbacks = [ErrorFeedback(HardThreshold(threshold), numel) for _ in range(WORKERS)]

    def replica(self) -> Replica:
        """One of the whole model, that begins with the weights as they are."""
        layout = Layout(tuple(TensorSpec(n, tuple(p.shape), "float32") for n, p in self._model.named_parameters()))
        weights = nn.utils.parameters_to_vector(self.parameters).detach()
        return Replica(layout.shard_slice(0, 1), self._spec, {PARAMETERS: weights})

    def pushes(self, seen: Tensor) -> list[SparseGradient]:
        """What each sends of its gradient at ``seen``, [numel]."""
        nn.utils.vector_to_parameters(seen, self.parameters)
        sent = []
        for generator, feedback in zip(self._generators, self._feedbacks, strict=True):
            chosen = torch.randint(len(self._labels), (BATCH,), generator=generator)
            loss = nn.functional.cross_entropy(self._model(self._images[chosen]), self._labels[chosen])
            gradients = torch.autograd.grad(loss, self.parameters)
            sent.append(feedback.compress(torch.cat([gradient.flatten() for gradient in gradients])))
        return sent

    def accuracy(self, seen: Tensor) -> float:
        """On the test set."""
        nn.utils.vector_to_parameters(seen, self.parameters)
        accuracy: float = self._digits.evaluate(self._model, self._test)["accuracy"]
        return accuracy


class Updates:
    """The mean comes down, and each worker's own replica replays it: equal to the shard's, bit for bit."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.seen = replica.parameters

    def tell(self, update: Update, _: Tensor) -> bytes:
        """The frame of a step; ``seen`` is then what the workers hold."""
        assert update.mean is not None
        frame = encode(update.mean)
        read = decode(frame, numel=self.seen.numel())
        self._replica.apply(replace(update, mean=read))
        return frame


class Assignments:
    """The shadow's assignments come down, and each worker copies the values."""

    def __init__(self, parameters: Tensor, threshold: float) -> None:
        self._shadow = Shadow(parameters, threshold)
        self.seen = parameters.clone()

    def tell(self, update: Update, parameters: Tensor) -> bytes:
        """The frame of a step; ``seen`` is then what the workers hold."""
        frame = encode(self._shadow.advance(parameters, update.version))
        self._shadow.cut(update.version)
        read = decode(frame, numel=self.seen.numel())
        self.seen.index_copy_(0, read.indices, read.values)
        return frame


def train(digits: ModuleType, optimizer: str, shadow: float | None, seed: int, options: argparse.Namespace) -> Run:
    workers = Workers(digits, OPTIMIZERS[optimizer], options.threshold, seed)
    shard = workers.replica()
    presence = (True,) * len(workers.parameters)
    downlink = Updates(workers.replica()) if shadow is None else Assignments(shard.parameters, shadow)
    up: list[SparseGradient] = []
    down: list[bytes] = []
    for version in range(1, options.steps + 1):
        pushes = workers.pushes(downlink.seen)
        update = Update(version, WORKERS, tuple(range(WORKERS)), mean_of(pushes, WORKERS), presence)
        shard.apply(update)
        down.append(downlink.tell(update, shard.parameters))
        up += pushes
    numel = shard.parameters.numel()
    return Run(
        optimizer=optimizer,
        shadow=shadow,
        seed=seed,
        density_up=fmean(push.density for push in up),
        bytes_up=fmean(len(encode(push)) for push in up),
        density_down=fmean(decode(frame, numel=numel).density for frame in down),
        bytes_down=fmean(len(frame) for frame in down),
        accuracy=workers.accuracy(shard.parameters),
        accuracy_seen=workers.accuracy(downlink.seen),
    )


def table_of(runs: Sequence[Run], title: str) -> Table:
    table = Table(title=title)
    for column in ("optimizer", "downlink"):
        table.add_column(column)
    for column in ("up", "kB up", "down", "kB down", "accuracy", "of the workers' view"):
        table.add_column(column, justify="right")
    for optimizer, shadow in product(OPTIMIZERS, SHADOWS):
        same = [run for run in runs if (run.optimizer, run.shadow) == (optimizer, shadow)]
        table.add_row(
            optimizer,
            "updates" if shadow is None else f"shadow, {shadow:g}",
            f"{fmean(run.density_up for run in same):.2%}",
            f"{fmean(run.bytes_up for run in same) / 1e3:.2f}",
            f"{fmean(run.density_down for run in same):.2%}",
            f"{fmean(run.bytes_down for run in same) / 1e3:.2f}",
            f"{fmean(run.accuracy for run in same):.2%}",
            f"{fmean(run.accuracy_seen for run in same):.2%}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threshold", type=float, default=0.025, help="on the way up, in units of the gradient")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print every run instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = example()
    runs = [
        train(digits, optimizer, shadow, seed, options)
        for optimizer, shadow, seed in product(OPTIMIZERS, SHADOWS, range(options.seeds))
    ]
    if options.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return
    title = f"digits, {WORKERS} workers, λ {options.threshold:g}, {options.steps} steps, mean of {options.seeds} seeds"
    Console(width=140).print(table_of(runs, title))


if __name__ == "__main__":
    main()
