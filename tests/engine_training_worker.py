"""One of two processes that compute gradients of the same network: ``engine_training_worker.py RANK FOLDER``."""

import os
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import run_rank

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet


def main(rank: int, folder: Path) -> None:
    os.environ[engine.ENGINE_VARIABLE] = "on"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    network = E2ENet(1, 3, 3, [6, 12, 20], nn.Conv3d, strides, deep_supervision=True).train()
    x = torch.randn(2, 1, 8, 16, 16)[rank : rank + 1]
    alone = gradients(network, network, x)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    averaged = gradients(network, DistributedDataParallel(network, bucket_cap_mb=2**-6), x)
    torch.save({name: (alone[name], averaged[name]) for name in alone}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def gradients(network: E2ENet, wrapped: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    sum(level.square().sum() for level in wrapped(x)).backward()
    assert engine.why_pytorch(network) is None
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


if __name__ == "__main__":
    run_rank(main)
