"""DSFF under DistributedDataParallel, as nnU-Net wraps it, with two processes on the CPU."""

from pathlib import Path

import torch
from support import Project
from two_processes import run_both

WORKER = Path(__file__).with_name("distributed_worker.py")


def test_all_ranks_have_the_same_topology(project: Project, tmp_path: Path) -> None:
    """Even though each rank starts with weights, data and random numbers of its own."""
    run_both(WORKER, project.folder, tmp_path)
    for trainer in ("connections", "active", "gradient"):
        first, second = (torch.load(tmp_path / f"{trainer}{rank}.pt", weights_only=False) for rank in range(2))
        for name, (mask, explored) in first["layers"].items():
            assert torch.equal(mask, second["layers"][name][0])
            assert torch.equal(explored, second["layers"][name][1])
            size = first["state"][f"{name}.weight"][0, 0].numel()
            stored, active = first["weights"][f"{name}.weight"].numel(), int(mask.sum())
            if trainer == "active":
                assert stored == active * size < 0.3 * mask.numel() * size
            else:
                assert active == round(0.2 * mask.numel())
            assert (explored & ~mask).any(), "no connection has been replaced"
        for name, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][name])
        assert len(first["scores"]) == (len(first["layers"]) if trainer == "gradient" else 0)
        for ours, theirs in zip(first["scores"], second["scores"], strict=True):  # of the mean gradient of both batches
            assert ours.any()
            assert torch.equal(ours, theirs)
