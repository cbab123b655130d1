"""Hosts behind shaped links: what the network interface counts against what workers and shards count."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LAB = Path(os.environ.get("THRESHER_LAB", Path(__file__).parents[3] / "shared" / "lab")) / "netlab.sh"
SHARDS = "10.77.0.1:5001,10.77.0.2:5001"

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(
        not LAB.exists() or os.geteuid() != 0,
        reason="needs netlab.sh (THRESHER_LAB names its folder) and root, for network namespaces",
    ),
]

SCRIPT = """
import json
import torch
from thresher.worker import connect

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(300, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with connect().wrap(model, optimizer) as session:
    generator = torch.Generator().manual_seed(session.rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(16, 300, generator=generator)).square().mean().backward()
        optimizer.step()
    now = session.statistics()
print(json.dumps({"push": sum(now.push_bytes), "pull": sum(now.pull_bytes), "setup": now.setup_bytes}))
"""


def lab(*arguments: str) -> str:
    """Run one command of the lab."""
    return subprocess.run([str(LAB), *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[None]:
    """Four hosts at 1 Gbit/s: shards on h0 and h1, workers on h2 and h3."""
    try:
        lab("up", "4", "1gbit")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    yield
    lab("down")


def traffic(host: int) -> tuple[int, int]:
    """Return the bytes that host has sent and received."""
    sent, received = lab("bytes", str(host)).split()
    return int(sent), int(received)


def spawn(host: int, arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Run Python on a host."""
    command = [str(LAB), "exec", str(host), sys.executable, *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("threshold", "hidden", "steps", "most_overhead"), [("0", 1000, 20, 1.08), ("0.01", 20, 300, 2.5)]
)
def test_the_interface_counts_what_we_count(
    hosts: None,
    tmp_path: Path,
    threshold: str,
    hidden: int,
    steps: int,
    most_overhead: float,
) -> None:
    """Bytes through each worker's interface are the messages it counts, plus framing: HTTP/2, TCP, IP, Ethernet.

    Framing is a few per cent for bulk and more for small messages; docs/accounting.md has the measured figures.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("STEPS", str(steps)).replace("HIDDEN", str(hidden)), encoding="utf-8")
    serve = ["-m", "thresher.deploy", "serve", "--shards", "2", "--workers", "2", "--insecure", "--until-stdin-closes"]
    shards = [
        subprocess.Popen(
            [str(LAB), "exec", str(i), sys.executable, *serve, "--shard", str(i), "--listen", SHARDS.split(",")[i]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(2)
    ]
    workers = [
        spawn(
            2 + rank,
            [str(script)],
            THRESHER_SHARDS=SHARDS,
            THRESHER_RANK=str(rank),
            THRESHER_WORKERS="2",
            THRESHER_THRESHOLD=threshold,
            THRESHER_INSECURE="1",
        )
        for rank in range(2)
    ]
    try:
        counted = [json.loads(worker.communicate(timeout=180)[0].splitlines()[-1]) for worker in workers]
        time.sleep(0.2)  # the last acknowledgements
        for rank, mine in enumerate(counted):
            sent, received = traffic(2 + rank)
            seeded = mine["setup"] / 2 if rank == 0 else 0  # rank 0 has sent a seed and read a snapshot of equal size
            up = sent / (mine["push"] + seeded)
            down = received / (mine["pull"] + mine["setup"] - seeded)
            logging.getLogger(__name__).info("interface over counted: %.4f up, %.4f down; counted: %s", up, down, mine)
            assert 1.0 < up < most_overhead
            assert 1.0 < down < most_overhead
    finally:
        for process in (*workers, *shards):
            process.kill()
            process.communicate()
