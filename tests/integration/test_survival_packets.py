"""Packets that arrive in another order than they left in: TCP puts them in order, and no bit changes."""

import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import final

import pytest
import torch

from thresher.deploy.in_process import in_process
from thresher.worker import Session, connect

TUN, NO_INFO, SET_NAME = 0x0001, 0x1000, 0x400454CA  # of linux/if_tun.h
STEPS, SIZE = 6, 40_000  # a frame is more than a hundred packets

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(
        not os.access("/dev/net/tun", os.W_OK) or os.geteuid() != 0,
        reason="needs root and /dev/net/tun, for hosts whose packets pass through this process",
    ),
]


@final
class Wire:
    """Two hosts, network namespaces, with a wire between them that hands every third packet on behind the next two."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        """Lay it; the stack takes it away."""
        self.hosts = [f"{name}{end}" for end in "ab"]
        self.overtaken = 0
        self._ends: list[int] = []
        for number, host in enumerate(self.hosts, start=1):
            ip("netns", "add", host)
            stack.callback(ip, "netns", "del", host)
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            stack.callback(os.close, end)
            fcntl.ioctl(end, SET_NAME, struct.pack("16sH", host.encode(), TUN | NO_INFO))
            ip("link", "set", host, "netns", host)
            ip("-n", host, "addr", "add", f"10.79.0.{number}/24", "dev", host)
            ip("-n", host, "link", "set", host, "up")
            self._ends.append(end)
        self._over = threading.Event()
        carrying = threading.Thread(target=self._carry)
        carrying.start()
        stack.callback(carrying.join)
        stack.callback(self._over.set)

    def _carry(self) -> None:
        held: dict[int, list[bytes]] = {end: [] for end in self._ends}  # the first of them is the one to be overtaken
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        count = 0
        while not self._over.is_set():
            ready, _, _ = select.select(self._ends, [], [], 0.002)
            for end in self._ends:
                if end in ready:
                    count += 1
                    packet = os.read(end, 1 << 16)
                    if held[end] or count % 3 == 0:
                        held[end].append(packet)
                    else:
                        os.write(other[end], packet)
                if held[end] and (len(held[end]) == 3 or end not in ready):
                    late, *earlier = held[end]
                    self.overtaken += len(earlier)
                    for packet in (*earlier, late):
                        os.write(other[end], packet)
                    held[end] = []


def ip(*arguments: str) -> None:
    """Run one command of iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    with ExitStack() as stack:
        try:
            laid = Wire(f"th{os.getpid() % 10**6}", stack)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield laid


def train(session: Session) -> list[float]:
    """Make dense steps with a gradient that depends on the parameters; return some of these."""
    parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, SIZE))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    with session.wrap(torch.nn.ParameterList([parameter]), optimizer):
        for step in range(STEPS):
            parameter.grad = (parameter.detach() * (step + 1)).sin()
            optimizer.step()
    numbers: list[float] = parameter[:: SIZE // 50].tolist()
    return numbers


def over_the_wire() -> None:
    """What the test's worker runs in a process of its own."""
    sys.stdout.write(json.dumps(train(connect())))


@contextmanager
def on(host: str, *arguments: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Run Python on a host until the block ends."""
    command = ["ip", "netns", "exec", host, sys.executable, *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, env=variables, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_packets_that_overtake_each_other_change_no_bit(wire: Wire) -> None:
    """A shard and a worker on two hosts: hundreds of packets out of order, and the parameters of a run without."""
    address = "10.79.0.1:5001"
    serve = ["-m", "thresher.deploy", "serve", "--workers", "1", "--listen", address, "--insecure"]
    call = f"from {__name__} import {over_the_wire.__name__} as work; work()"
    told = {"THRESHER_SHARDS": address, "THRESHER_RANK": "0", "THRESHER_WORKERS": "1", "THRESHER_INSECURE": "1"}
    told["PYTHONPATH"] = str(Path(__file__).parents[2])  # away from the repository the tests are no installed package
    with on(wire.hosts[0], *serve), on(wire.hosts[1], "-c", call, **told) as worker:
        out, err = worker.communicate(timeout=100)
        assert worker.returncode == 0, err
    with in_process(shards=1, workers=1) as cluster:
        assert json.loads(out) == cluster.run(train)[0]
    assert wire.overtaken > 100
