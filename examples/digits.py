"""Handwritten digits (scikit-learn's, 8 x 8 pixels): a small convolutional network.

    thresher launch --shards 2 --workers 4 --density 0.01 examples/digits.py

An ordinary training loop; the lines marked (1), (2), (3) are all that is Thresher's. A line that the script prints as a
JSON object is data: the live display shows `loss`, and from `epoch` and `epochs` how long the run will take; the last
`accuracy` and `loss` of rank 0 are the result.
"""

import argparse
import json

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.worker import connect  # (1)


def data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def evaluate(model: nn.Module, test: TensorDataset) -> dict[str, float]:
    images, labels = test.tensors
    with torch.no_grad():
        scores = model(images)
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": nn.functional.cross_entropy(scores, labels).item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, test = data()
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 26], gamma=0.2)
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
