"""Forks beside open channels: what a DataLoader does whose worker processes are forked."""

import os
import subprocess
import sys

from thresher.protos.transport import FORK_VARIABLE

# In a process of its own, where nothing has imported gRPC before Thresher. With gRPC's fork handlers a few of so many
# children are aborted; fewer forks might meet none.
FORKS = """
import os, threading
import torch
from thresher.deploy.in_process import in_process

FORKS = 300

def work(session):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.wrap(model, optimizer)
    finished = threading.Event()

    def steps():
        while not finished.is_set():
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()

    exchanging = threading.Thread(target=steps)
    exchanging.start()
    aborted = 0
    for _ in range(FORKS):
        child = os.fork()
        if child == 0:
            os._exit(0)
        aborted += os.waitpid(child, 0)[1] != 0
    finished.set()
    exchanging.join()
    print(f"{aborted} aborted, exchanging {session.step > 0}")

with in_process(shards=2, workers=1) as cluster:
    cluster.run(work)
"""


def test_forked_children_live_while_grpc_is_exchanging() -> None:
    """No child is aborted by the fork handlers of gRPC, whose threads are inside calls all the time: they are off."""
    environment = {name: value for name, value in os.environ.items() if name != FORK_VARIABLE}
    ran = subprocess.run(
        [sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.stdout == "0 aborted, exchanging True\n", ran.stderr
