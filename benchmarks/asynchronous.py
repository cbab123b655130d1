"""Options of the asynchronous mode, beside lockstep: what is learned on digits, and what goes up and down.

    python benchmarks/asynchronous.py

Four workers and one shard in this process, a hard threshold on the way up. Prints means over the seeds: the accuracy of
what the workers see in the end, and the bytes of exchange messages per push of a worker.
"""

import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from thresher.deploy.in_process import in_process
from thresher.protos.consistency import Consistency
from thresher.worker import Method, Session
from thresher.worker.calls import ShardCalls

WORKERS = 4
UPDATES = Consistency("async", downlink="updates")
CASES = (
    Consistency(),
    UPDATES,
    Consistency("async", downlink="updates", momentum_per_push=True),
    Consistency("async", downlink="updates", staleness_aware=True),
    *(Consistency("async", downlink="shadow", shadow_threshold=threshold) for threshold in (0.0, 0.0003, 0.001, 0.003)),
)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", Path(__file__).parent.parent / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(digits: ModuleType, consistency: Consistency, seed: int, options: argparse.Namespace) -> tuple[float, ...]:
    """Return accuracy, and bytes up and down per push."""
    data, test = digits.data()
    torch.manual_seed(seed)
    models = [digits.network() for _ in range(WORKERS)]

    def work(session: Session) -> None:
        model = models[session.rank]
        build = torch.optim.AdamW if options.optimizer == "AdamW" else partial(torch.optim.SGD, momentum=0.9)
        optimizer = build(model.parameters(), lr=options.rate)
        session.wrap(model, optimizer)
        loader = DataLoader(data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(seed))
        for _ in range(options.passes):
            for images, labels in session.batches(loader):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
                if session.rank == WORKERS - 1:
                    time.sleep(options.straggle)
                optimizer.step()

    method = Method(threshold=0.025)
    with in_process(shards=1, workers=WORKERS, method=method, consistency=consistency) as cluster:
        cluster.run(work)
        seen = ShardCalls(0, cluster.addresses[0], "a benchmark").snapshot(wait_seconds=5.0).visible
        members = cluster.statistics()[0].members
    nn.utils.vector_to_parameters(seen, models[0].parameters())
    pushes = sum(member.steps for member in members)
    traffic = (sum(member.push_bytes for member in members), sum(member.pull_bytes for member in members))
    return digits.evaluate(models[0], test)["accuracy"], *(count / pushes for count in traffic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("SGD", "AdamW"), default="SGD", help="SGD has a momentum of 0.9")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--straggle", type=float, default=0.0, help="seconds by which the last worker's step is longer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"digits, {WORKERS} workers, {options.optimizer} at {options.rate:g}, {options.passes} passes")
    for column in ("mode", "accuracy", "of the seeds", "kB up", "kB down"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for consistency in CASES:
        runs = [train(example(), consistency, seed, options) for seed in range(options.seeds)]
        accuracy, up, down = (fmean(values) for values in zip(*runs, strict=True))
        spread = f"{min(run[0] for run in runs):.2%} … {max(run[0] for run in runs):.2%}"
        table.add_row(consistency.describe(), f"{accuracy:.2%}", spread, f"{up / 1e3:.2f}", f"{down / 1e3:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
