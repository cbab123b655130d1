"""One worker of the storm: trains digits, or pushes integer gradients whose sum is known outside.

Each step waits until the storm allows it, by a number in a file, so that every kill strikes between rounds that close.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.worker import Session, connect

NUMEL = 1000


def integer_gradient(rank: int, step: int) -> torch.Tensor:
    """Return whole numbers between -4 and 4, [NUMEL] float32: a function of rank and step alone."""
    drawn = np.random.default_rng((rank, step)).integers(-4, 5, NUMEL)
    return torch.from_numpy(drawn.astype(np.float32))


def main() -> None:
    """Take part until the steps are made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("digits", "integers"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    said = parser.parse_args()
    with connect() as session:
        if said.work == "digits":
            _train_digits(session, said.steps, said.folder / "allowed")
        else:
            _push_integers(session, said.steps, said.folder)


def _train_digits(session: Session, steps: int, allowed: Path) -> None:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - the other kind of worker is back sooner without it

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    session.wrap(model, optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    session.keep(schedule=schedule)
    for _ in session.passes(steps):
        for inputs, targets in session.batches(DataLoader(data, batch_size=32, shuffle=True)):
            if session.step >= steps:
                return
            _wait(session.step, allowed)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()


def _push_integers(session: Session, steps: int, folder: Path) -> None:
    """Plain SGD with a learning rate of 1, from zero: the parameters are minus the sum of the means."""
    parameter = nn.Parameter(torch.zeros(NUMEL))
    model = nn.ParameterList([parameter])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    while session.step < steps:
        _wait(session.step, folder / "allowed")
        parameter.grad = integer_gradient(session.rank, session.step)
        optimizer.step()
    np.save(folder / f"residual-{session.rank}.npy", session.residual.numpy())
    session.mean({"done": 1.0})  # nobody leaves before all are done: the divisor stays what it was


def _wait(step: int, allowed: Path) -> None:
    """Wait until the storm has come so far."""
    while step >= int(allowed.read_text(encoding="utf-8") or 0):
        time.sleep(0.005)


if __name__ == "__main__":
    main()
