"""Runs `thresher launch` as a user does, and sees to it that nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "TEST_MARK_OF_THRESHER"  # the launcher hands no THRESHER_ variable on

# A tiny training script; `EXTRA` is filled in by the tests that want something to go wrong.
SCRIPT = """
import json, os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from thresher.worker import connect

generator = torch.Generator().manual_seed(1)
images = torch.randn(256, 20, generator=generator)
labels = (images[:, :4].sum(1) > 0).long()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
session = connect().wrap(model, optimizer)
for epoch in range(EPOCHS):
    for x, y in session.batches(DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        EXTRA
        optimizer.step()
        print(json.dumps({"epoch": epoch, "epochs": EPOCHS, "loss": loss.item()}))
accuracy = (model(images).argmax(1) == labels).float().mean().item()
print(json.dumps({"accuracy": accuracy, "loss": loss.item()}))
"""


def write_script(folder: Path, *, extra: str = "pass", epochs: int = 5) -> Path:
    """Write the script with one more statement in its loop."""
    path = folder / "script.py"
    path.write_text(SCRIPT.replace("EXTRA", extra).replace("EPOCHS", str(epochs)), encoding="utf-8")
    return path


@dataclass
class Launched:
    """A launcher that runs, in a folder of its own."""

    process: "subprocess.Popen[str]"
    mark: str
    folder: Path

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.folder / "runs" / "latest"

    def finish(self, timeout: float = 90.0) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def wait_step(self, step: int, timeout: float = 60.0) -> None:
        """Wait until the per-iteration file of shard 0 shows a round."""
        path = self.run / "shard-0.iterations.jsonl"
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if path.exists() and path.read_text(encoding="utf-8").count("\n") >= step:
                return
            assert self.process.poll() is None, self.finish()
            time.sleep(0.02)
        raise AssertionError(f"no round {step} within {timeout} s")

    def left_over(self) -> list[int]:
        """Return the processes of this run that are still there; those that are ending are given a moment."""
        deadline = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return pids

    def pids(self, word: str = "") -> list[int]:
        """Return the processes of this run, those with ``word`` in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or self.mark.encode() not in (entry / "environ").read_bytes():
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has ended since, or is not ours to read
            if command and word in command and int(entry.name) != self.process.pid:
                found.append(int(entry.name))
        return found


def start(folder: Path, *options: str, script: Sequence[str], **environment: str) -> Launched:
    """Start `thresher launch OPTIONS script…` in ``folder``."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "thresher.deploy", "launch", *options, "--runs", str(folder / "runs"), *script],
        cwd=folder,
        env={**os.environ, MARK: mark, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Launched(process, mark, folder)


def result(launched: Launched) -> dict[str, Any]:
    """Read result.json."""
    return dict(json.loads((launched.run / "result.json").read_text(encoding="utf-8")))


def kill(launched: Launched) -> None:
    """Whatever a failed test has left."""
    for pid in [launched.process.pid, *launched.pids()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
