"""Fashion-MNIST (28 x 28 pixels, 60,000 training images): a convolutional network of a million parameters.

    thresher launch --shards 2 --workers 4 --density 0.01 examples/fashion_mnist.py --data FOLDER

FOLDER holds fashion_mnist.npz with the arrays train_x, train_y, test_x, test_y. The three marked lines are Thresher's;
what is printed as JSON is data, as in digits.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.worker import connect  # (1)

MEAN, DEVIATION = 72.94, 90.02  # of the training pixels


def data(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    with np.load(folder / "fashion_mnist.npz") as arrays:
        sets = [
            TensorDataset(
                ((torch.from_numpy(arrays[f"{part}_x"]).float() - MEAN) / DEVIATION).unsqueeze(1),
                torch.from_numpy(arrays[f"{part}_y"]).long(),
            )
            for part in ("train", "test")
        ]
    return sets[0], sets[1]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 640), nn.ReLU(), nn.Linear(640, 10),
    )  # fmt: skip


def evaluate(model: nn.Module, test: TensorDataset) -> dict[str, float]:
    with torch.no_grad():
        scores = torch.cat([model(images) for images in test.tensors[0].split(1000)])
    labels = test.tensors[1]
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": nn.functional.cross_entropy(scores, labels).item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion_mnist.npz")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, test = data(options.data)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    session = connect().wrap(model, optimizer)  # (2)

    for epoch in range(options.epochs):
        for images, labels in session.batches(loader):  # (3)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            print(json.dumps({"epoch": epoch, "epochs": options.epochs, "loss": loss.item()}))
        schedule.step()
    print(json.dumps(evaluate(model, test)))


if __name__ == "__main__":
    main()
