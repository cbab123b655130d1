"""Local steps: accuracy and bytes on digits where a round is due only every H-th step.

    python benchmarks/local_steps.py

Four workers and two shards in this process, momentum SGD at the workers (update-placed), ten passes. Prints a table;
the accuracy is that of the parameters which the shards hold in the end, on the test set.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from thresher.deploy.in_process import in_process
from thresher.worker import Method, Session

WORKERS = 4
PERIODS = (1, 4, 16)
METHODS = (
    "Identity",
    "ErrorFeedback(TopK(0.05))",
    "DetachedErrorFeedback(TopK(0.05))",
    "DetachedErrorFeedback(LayerWise(RandomBlock(0.05)))",
)
OUTERS = ("", "SGD(lr=0.7, momentum=0.9, nesterov=True)")


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", Path(__file__).parent.parent / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(digits: ModuleType, method: Method, seed: int, passes: int) -> tuple[float, int]:
    """Return the test accuracy, and the bytes of all workers in both directions."""
    data, test = digits.data()

    def work(session: Session) -> float:
        torch.manual_seed(seed)
        model = digits.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        session.wrap(model, optimizer)
        for _ in range(passes):
            for images, labels in session.batches(DataLoader(data, batch_size=32, shuffle=True)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        with session.evaluating():
            accuracy: float = digits.evaluate(model, test)["accuracy"]
            return accuracy

    with in_process(shards=2, workers=WORKERS, method=method) as cluster:
        accuracy = cluster.run(work)[0]
        members = [member for shard in cluster.statistics() for member in shard.members]
        return accuracy, sum(member.push_bytes + member.pull_bytes for member in members)


def cases() -> Iterator[tuple[str, int, str]]:
    for compressor, period in product(METHODS, PERIODS):
        yield compressor, period, ""
    for compressor, period in product(METHODS[:2], PERIODS[1:]):
        yield compressor, period, OUTERS[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = example()
    table = Table(title=f"digits, {WORKERS} workers, {options.passes} passes, mean of {options.seeds} seeds")
    for column in ("method", "H", "outer", "test accuracy", "MB"):
        table.add_column(column, justify="left" if column in ("method", "outer") else "right")
    for compressor, period, outer in cases():
        method = Method(compressor, placement="update", period=period, outer=outer)
        runs = [train(digits, method, seed, options.passes) for seed in range(options.seeds)]
        accuracy = sum(run[0] for run in runs) / len(runs)
        megabytes = sum(run[1] for run in runs) / len(runs) / 1e6
        table.add_row(compressor, str(period), outer or "-", f"{accuracy:.2%}", f"{megabytes:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
