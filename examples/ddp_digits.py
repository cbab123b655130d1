"""Handwritten digits under torch's DistributedDataParallel: no parameter server, the same compressors.

    torchrun --nproc-per-node 2 examples/ddp_digits.py

An ordinary DDP script; the lines marked (1) and (2) are all that is Thresher's.
"""

import argparse

import torch
import torch.distributed as dist
from digits import data, evaluate, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from thresher.ddp import CompressionState, compress  # (1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="HardThreshold(0.025)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    train, test = data()
    sampler = DistributedSampler(train, seed=options.seed)
    loader = DataLoader(train, batch_size=32, sampler=sampler)
    model = DistributedDataParallel(network())
    state = CompressionState(model, options.method)  # (2)
    model.register_comm_hook(state, compress)  # (2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    if dist.get_rank() == 0:
        sent = state.statistics()
        dense = 4 * sent.numel * sent.steps
        print(f"accuracy {evaluate(model, test)['accuracy']:.2%} after {sent.steps} steps")
        print(
            f"density {sent.sent_elements / (sent.numel * sent.steps):.2%}, {dense / sent.sent_bytes:.1f} times fewer"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
