"""Peak memory of a training step and of a prediction, each measured in a fresh process."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nnunetv2_e2enet.evaluation.networks import Design
from nnunetv2_e2enet.machine import bytes_in, is_out_of_memory

BYTES_PER_PARAMETER = 16
"""In training, float32: weight, gradient, momentum, and one more while they are updated."""
STATUS = Path("/proc/self/status")
"""Where Linux tells the resident set of a process; macOS has no such file."""
SPARE = 0.9
"""Share of the free memory that a measurement may be expected to take."""


def peak_bytes(design: Design, training: bool, batch_size: int, device: str, threads: int) -> float:
    """Peak memory of one step of training or prediction, above that of the process before it built the network.

    On the CPU, the peak is the largest growth of the resident set; on CUDA, the most that PyTorch has allocated.

    Args:
        design: the network and its plans.
        training: forward and backward with nnU-Net's loss and an optimiser's step; otherwise a forward pass.
        batch_size: patches in the batch.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch.

    Returns:
        Bytes; NaN if the process ran out of memory or was ended from outside, or as ``peak_above_now`` says.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_measure, design, training, batch_size, device, threads).result()
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, BrokenProcessPool) or is_out_of_memory(error):
                return math.nan
            raise


def why_no_peak(device: str) -> str:
    """Why ``peak_bytes`` is NaN, in words that follow upon what was measured."""
    ended = "ran out of memory, or was ended from outside"
    return ended if device == "cuda" or STATUS.is_file() else f"{ended}, or took less than the process before it"


def _measure(design: Design, training: bool, batch_size: int, device: str, threads: int) -> float:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: F401 (its memory is none of the network's)

    torch.set_num_threads(threads)
    step = _training_step if training else _prediction
    if device == "cpu":
        nn.Conv3d(1, 1, 3)(torch.zeros(1, 1, 8, 8, 8)).sum().backward()
        return peak_above_now(step(design, batch_size, device))
    torch.zeros(1, device=device)
    torch.cuda.reset_peak_memory_stats()
    step(design, batch_size, device)()
    return float(torch.cuda.max_memory_allocated())


def _prediction(design: Design, batch_size: int, device: str) -> Callable[[], None]:
    network = design.build().to(device).eval()
    x = torch.randn(design.input_shape(batch_size), device=device)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(device, enabled=device == "cuda"):
            network(x)

    return step


def _training_step(design: Design, batch_size: int, device: str) -> Callable[[], None]:
    network = design.build(deep_supervision=True).to(device)
    x = torch.randn(design.input_shape(batch_size), device=device)
    channels, values = (design.outputs, 2) if design.has_regions else (1, design.outputs)
    loss = nnunet_loss(design)
    optimiser = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)

    def step() -> None:
        with torch.autocast(device, enabled=device == "cuda"):
            outputs = network(x)
            heads = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            targets = [torch.randint(values, (batch_size, channels, *h.shape[2:]), device=device).float() for h in heads]
            total = loss(heads, targets)
        total.backward()
        optimiser.step()

    return step


def nnunet_loss(design: Design) -> nn.Module:
    """As nnU-Net's trainer builds it for labels without an ignored one; the lowest resolution has no weight."""
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": design.has_regions, "ddp": False}
    if design.has_regions:
        loss = DC_and_BCE_loss({}, dice, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    weights = 0.5 ** np.arange(design.resolutions)
    if len(weights) > 1:
        weights[-1] = 0
    wrapped: nn.Module = DeepSupervisionWrapper(loss, weights / weights.sum())
    return wrapped


def can_measure(device: str) -> bool:
    """Whether this system reports the peak memory of a process."""
    return device == "cuda" or STATUS.is_file() or sys.platform == "darwin"


def peak_above_now(run: Callable[[], None]) -> float:
    """Bytes by which ``run`` raises this process's resident set at its highest.

    NaN if an earlier peak was higher, where the system does not forget it (macOS).
    """
    _reset_peak()
    before, earlier_peak = _resident(), _peak()
    run()
    peak = _peak()
    hidden = earlier_peak > before and peak == earlier_peak
    return math.nan if hidden else peak - before


def _resident() -> float:
    """Bytes of the resident set now."""
    if STATUS.is_file():
        return bytes_in(STATUS, "VmRSS")
    kibibytes = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], check=True, capture_output=True, text=True).stdout
    return float(kibibytes) * 1024


def _peak() -> float:
    """Bytes of the resident set at its highest: since ``_reset_peak`` on Linux, in the life of the process on macOS."""
    if STATUS.is_file():
        return bytes_in(STATUS, "VmHWM")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def _reset_peak() -> None:
    """Reset the peak of the resident set, where Linux permits it."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists() and os.access(switch, os.W_OK):
        switch.write_text("5", encoding="utf-8")
