"""Handwritten digits under Ray Train: a stock TorchTrainer, and shards that `thresher ray up` has started.

    thresher ray up digits --shards 2 --density 0.01 --state-dir /shared/digits --insecure
    python examples/ray_train.py digits --workers 2
    thresher ray down digits

The lines marked (1), (2), (3), the import of `connect` and the goodbye are all that is Thresher's. They stand where
`prepare_model` and `prepare_data_loader` would; neither is needed, and no checkpoint either: what a worker needs to go
on after a failure is in its memory and at the shards.
"""

import argparse

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.worker import connect


def data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    samples = TensorDataset(images, torch.tensor(digits.target))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return TensorDataset(*samples[order[360:]]), TensorDataset(*samples[order[:360]])


def evaluate(model: nn.Module, test: TensorDataset, device: torch.device) -> dict[str, float]:
    images, labels = (tensor.to(device) for tensor in test.tensors)
    with torch.no_grad():
        scores = model(images)
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    return {"loss": nn.functional.cross_entropy(scores, labels).item(), "accuracy": accuracy}


def train_func(config: dict) -> None:
    torch.manual_seed(0)
    train, test = data()
    loader = DataLoader(train, batch_size=config["batch"], shuffle=True)
    device = ray.train.torch.get_device()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session = connect(f"ray://{config['name']}").wrap(model, optimizer)  # (1)

    for epoch in session.passes(config["epochs"]):  # (2)
        for images, labels in session.batches(loader):  # (3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        ray.train.report({"epoch": epoch, **evaluate(model, test, device)})
    session.close()  # the process lives on: Ray Train ends it when all workers are done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the run, as given to `thresher ray up`")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="a number, or the least and the most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32, help="samples in a worker's batch")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    options = parser.parse_args()
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"name": options.name, "epochs": options.epochs, "batch": options.batch},
        scaling_config=ScalingConfig(
            num_workers=options.workers[0] if len(options.workers) == 1 else tuple(options.workers),
            use_gpu=options.gpu,
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=20)),
    )
    trainer.fit()
