"""One of two processes that train the same networks: ``distributed_worker.py RANK PROJECT FOLDER``."""

import os
from pathlib import Path
from typing import Any

import torch
from support import Project, batch, make
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from two_processes import run_rank

from nnunetv2_e2enet.dsff import GradientGrowth
from nnunetv2_e2enet.network import MaskableLayer, maskable_layers
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training.variants import variant


class RecordedGrowth:
    """By gradient; the scores are kept."""

    needs_dense_gradients = True

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        self.scores.append(GradientGrowth().score(layer, generator))
        return self.scores[-1]


TRAINERS = {
    "connections": nnUNetTrainerE2ENet_smoke,
    "active": variant(nnUNetTrainerE2ENet_smoke, "active", block_size=8, compute_active_only=True),
    "gradient": variant(nnUNetTrainerE2ENet_smoke, "gradient", growth=RecordedGrowth()),
}
COMPILED = ("connections",)  # which takes most of the time


def main(rank: int, project: Path, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= Project(project).environment
    os.environ["nnUNet_results"] = str(rendezvous / f"results{rank}")
    made = {}
    for name, cls in TRAINERS.items():
        trainer = make(cls, Project(project), Project(project).tiny_plans())
        trainer.topology_seed = rank  # other random numbers on each rank
        made[name] = trainer
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous / 'store'}", rank=rank, world_size=2)
    for name, trainer in made.items():
        torch.manual_seed(rank)  # and other weights, until DistributedDataParallel sends rank 0's
        trainer.initialize()
        torch.save(train(trainer, rank, name in COMPILED), rendezvous / f"{name}{rank}.pt")
    distributed.destroy_process_group()


def train(trainer: Any, rank: int, compiled: bool) -> dict[str, Any]:
    """Two epochs of one step, with a topology update between."""
    # nnU-Net compiles the network, then wraps it; as a large network, it is split between several buckets of gradients
    distributed._DEFAULT_FIRST_BUCKET_BYTES = 2**15
    network = torch.compile(trainer.network, backend="eager") if compiled else trainer.network
    trainer.network = DistributedDataParallel(network, bucket_cap_mb=2**-4)
    trainer.is_ddp, trainer.local_rank = True, rank
    sent = {buffer.dtype for buffer in trainer.network.modules_buffers}
    assert not sent & {torch.bool, torch.int64}, "masks or the indices that follow from them are sent with each step"
    trainer.dataloader_train = iter(lambda: batch((8, 16, 16), heads=2), None)  # for the observation before an update
    for _ in range(2):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(batch((8, 16, 16), heads=2))])
        trainer.current_epoch += 1
    layers = {name: (layer.mask, layer.explored) for name, layer in maskable_layers(trainer.unwrapped_network)}
    weights = dict(trainer.unwrapped_network.named_parameters())
    scores = getattr(trainer.growth, "scores", [])
    return {"layers": layers, "weights": weights, "state": trainer.unwrapped_network.state_dict(), "scores": scores}


if __name__ == "__main__":
    run_rank(main)
