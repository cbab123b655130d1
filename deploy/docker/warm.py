"""Trains for a moment by the usual methods, so that NUMBA_CACHE_DIR has their kernels, compiled for this CPU.

What a rarer method calls beside them is compiled at its first call.
"""

import torch
from torch import nn

from thresher.deploy.in_process import in_process
from thresher.protos.consistency import Consistency
from thresher.worker import Method, Session

STEPS = 3
METHODS = (
    Method(density=0.01),
    Method("TopK(0.01)"),
    Method("RandomK(0.01)"),
    Method("ScaledSign"),
    Method("Quantized(TopK(0.01), QSGD)"),
    Method("Quantized(TopK(0.01), BFloat16)"),
    Method("Quantized(HardThreshold, Blockwise8Bit)", density=0.01),
    Method("Identity"),
)


def work(session: Session) -> None:
    generator = torch.Generator().manual_seed(session.rank)
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.wrap(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 300, generator=generator)).square().sum().backward()
        optimizer.step()


def main() -> None:
    for method in METHODS:
        with in_process(shards=2, workers=2, method=method) as cluster:
            cluster.run(work)
    shadow = Consistency(downlink="shadow", shadow_threshold=0.001)
    with in_process(shards=1, workers=2, method=METHODS[0], consistency=shadow) as cluster:
        cluster.run(work)


if __name__ == "__main__":
    main()
