"""One of two processes that train the same network: ``distributed_worker.py RANK FOLDER``."""

import os
import sys
from pathlib import Path

import torch
from support import Project, batch, make
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_e2enet.network import maskable_layers
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke


def main(rank: int, project: Path, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= Project(project).environment
    os.environ["nnUNet_results"] = str(rendezvous / f"results{rank}")
    torch.manual_seed(rank)  # other weights on each rank, until DistributedDataParallel sends rank 0's
    trainer = make(nnUNetTrainerE2ENet_smoke, Project(project))
    trainer.topology_seed = rank  # and other random numbers
    trainer.initialize()
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous / 'store'}", rank=rank, world_size=2)
    # nnU-Net compiles the network, then wraps it; as a large network, it is split between several buckets of gradients
    distributed._DEFAULT_FIRST_BUCKET_BYTES = 2**15
    compiled = torch.compile(trainer.network, backend="eager")
    trainer.network = DistributedDataParallel(compiled, bucket_cap_mb=2**-4)
    trainer.is_ddp, trainer.local_rank = True, rank
    for _ in range(2):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(batch())])
        trainer.current_epoch += 1
    layers = {name: (layer.mask, layer.explored) for name, layer in maskable_layers(trainer.unwrapped_network)}
    weights = dict(trainer.unwrapped_network.named_parameters())
    torch.save({"layers": layers, "weights": weights}, rendezvous / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
