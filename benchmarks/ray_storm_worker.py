"""What `benchmarks/ray_storm.py` trains: digits, 300 steps of four workers, alike under thresher launch and Ray Train.

thresher launch --shards 4 --workers 4 benchmarks/ray_storm_worker.py
python benchmarks/ray_storm_worker.py NAME --workers 4
"""

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.worker import connect


def data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    samples = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return TensorDataset(*samples[order[360:]]), TensorDataset(*samples[order[:360]])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(model: nn.Module) -> float:
    images, labels = data()[1].tensors
    return (model(images).argmax(1) == labels).float().mean().item()


def train(config: dict[str, Any]) -> None:
    model, loader = network(), DataLoader(data()[0], batch_size=30, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 20], gamma=0.3)
    session = connect(config["address"]).wrap(model, optimizer)
    session.keep(schedule=schedule)
    for _ in session.passes(config["passes"]):
        for images, labels in session.batches(loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            time.sleep(config["pause"])
        schedule.step()
    session.close()


def fit(options: argparse.Namespace) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    least, most = min(options.workers), max(options.workers)
    trainer = TorchTrainer(
        train,
        train_loop_config={"address": f"ray://{options.name}", "pause": options.pause, "passes": options.passes},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            resources_per_worker={"CPU": 1, "seat": 1},
            placement_strategy="SPREAD",
            elastic_resize_monitor_interval_s=2.0,
        ),
        run_config=RunConfig(storage_path=options.storage, failure_config=FailureConfig(max_failures=-1)),
    )
    trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of a run on a Ray cluster")
    parser.add_argument("--workers", type=int, nargs="+", default=[4], help="how many; the least and the most")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of each step, so that there is time to kill")
    parser.add_argument("--passes", type=int, default=25, help="over the data; of 12 steps for four workers")
    parser.add_argument("--storage", help="where Ray Train keeps its own")
    options = parser.parse_args()
    if options.name:
        fit(options)
    else:
        train({"address": None, "pause": options.pause, "passes": options.passes})
