"""Costs of networks on this machine, counted and measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan, prod
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.evaluation import memory
from nnunetv2_e2enet.evaluation.costs import Costs, breakdown, count_costs
from nnunetv2_e2enet.evaluation.networks import Design, of_others
from nnunetv2_e2enet.machine import free_bytes, is_out_of_memory
from nnunetv2_e2enet.network import E2ENet, accounts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ProfileSettings:
    """Settings of a measurement.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: a name in ``DTYPES``, of weights and image when time is measured.
        threads: of PyTorch on the CPU.
        rounds: how often each network is timed.
        batch_size: patches in a training step; that of the plans unless given.
        with_memory, with_time, with_breakdown: what to do.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 7
    batch_size: int | None = None
    with_memory: bool = True
    with_time: bool = True
    with_breakdown: bool = False


@dataclass
class Profile:
    """Of one network.

    Attributes:
        name, origin, architecture: what it is and where it comes from.
        patch_size: voxels of the patch.
        batch_size: patches in the training step whose memory is given.
        costs: counted, for one patch.
        kept_bytes: what autograd keeps for backward in a training step, counted in float32.
        why_pytorch_predicts, why_pytorch_trains: reasons why the CPU engine does not; None where it does.
        training_bytes, prediction_bytes: measured peaks; NaN where not measured.
        seconds: each timed forward pass of one patch.
        shares: costs by level and flow, as ``breakdown``; empty unless asked for.
        note: why a measurement is missing; empty where none is.
    """

    name: str
    origin: str
    architecture: str
    patch_size: tuple[int, ...]
    batch_size: int
    costs: Costs
    kept_bytes: int
    why_pytorch_predicts: str | None = None
    why_pytorch_trains: str | None = None
    training_bytes: float = nan
    prediction_bytes: float = nan
    seconds: list[float] = field(default_factory=list)
    shares: pd.DataFrame = field(default_factory=pd.DataFrame)
    note: str = ""

    @property
    def latency(self) -> tuple[float, float, float]:
        """Seconds of a patch: lower quartile, median, upper quartile; NaN where nothing was timed."""
        low, median, high = map(float, np.quantile(self.seconds or [nan], (0.25, 0.5, 0.75)))
        return low, median, high

    @property
    def voxels_per_second(self) -> float:
        """Of a patch, by the median time."""
        return prod(self.patch_size) / self.latency[1]

    def add_note(self, words: str) -> None:
        """A further reason why a measurement is missing."""
        self.note = "; ".join(filter(None, (self.note, words)))

    def as_json(self) -> dict[str, Any]:
        """All fields, with latency (s) and throughput; what was not measured is NaN."""
        low, median, high = self.latency
        summary = {"latency_seconds": {"q1": low, "median": median, "q3": high}, "voxels_per_second": self.voxels_per_second}
        return {**asdict(self), "shares": self.shares.to_dict("records"), **summary}


def profile(designs: Sequence[Design], settings: ProfileSettings, progress: Progress = lambda _: None) -> list[Profile]:
    """Count, measure memory, then time all networks in turns.

    Args:
        designs: the networks.
        settings: what is measured, where, and how often.
        progress: told what is done next.
    """
    torch.set_num_threads(settings.threads)
    profiles = []
    networks: dict[str, nn.Module] = {}
    for design in designs:
        progress(f"Counting {design.name}")
        with of_others(f"{design.name} cannot be built and counted"):
            network = design.build()
            profiles.append(_count(design, network, settings))
        if settings.with_time:
            networks[design.name] = network.eval()
    if settings.with_memory:
        for design, counted in zip(designs, profiles, strict=True):
            _measure_memory(design, counted, settings, progress)
    if settings.with_time:
        shapes = {design.name: design.input_shape() for design in designs}
        seconds = time_in_turns(networks, shapes, settings, progress)
        for counted in profiles:
            counted.seconds = seconds.get(counted.name, [])
            if not counted.seconds:
                counted.add_note("a timed pass ran out of memory")
    return profiles


def steps(designs: Sequence[Design], settings: ProfileSettings) -> int:
    """How often ``profile`` reports progress, where all networks fit into memory."""
    one = 1 + 2 * settings.with_memory + (settings.rounds + 1) * settings.with_time
    return len(designs) * one


def why_pytorch(network: nn.Module, input_shape: Sequence[int], settings: ProfileSettings) -> str | None:
    """Why PyTorch predicts, or in training mode trains, a network under these settings; None if the CPU engine does."""
    if not isinstance(network, E2ENet):
        return f"the network is {type(network).__name__}"
    if settings.device != "cpu" or (settings.dtype != "float32" and not network.training):
        return f"the engine computes in float32 on a CPU, not in {settings.dtype} on {settings.device}"
    return (engine.why_not_trained if network.training else engine.why_not_predicted)(network, input_shape)


def _count(design: Design, network: nn.Module, settings: ProfileSettings) -> Profile:
    batch_size = settings.batch_size or design.batch_size
    trained_by_pytorch = why_pytorch(network.train(), design.input_shape(batch_size), settings)
    predicted_by_pytorch = why_pytorch(network.eval(), design.input_shape(), settings)
    return Profile(
        design.name,
        design.origin,
        type(network).__name__,
        design.patch_size,
        batch_size,
        count_costs(network, design.input_shape(), by_engine=predicted_by_pytorch is None),
        accounts.saved_bytes(design.build(deep_supervision=True), design.input_shape(batch_size)),
        predicted_by_pytorch,
        trained_by_pytorch,
        shares=breakdown(network, design.input_shape()) if settings.with_breakdown else pd.DataFrame(),
    )


def _measure_memory(design: Design, counted: Profile, settings: ProfileSettings, progress: Progress) -> None:
    kept = counted.kept_bytes / (2 if settings.device == "cuda" else 1)  # there in half precision, under autocast
    needed = kept + memory.BYTES_PER_PARAMETER * counted.costs.parameters_stored
    free = free_bytes() if settings.device == "cpu" else float(torch.cuda.mem_get_info()[0])
    progress(f"Memory of a training step, {design.name}")
    if not memory.can_measure(settings.device):
        counted.add_note("this system does not tell the peak memory of a process")
    elif needed > memory.SPARE * free:
        counted.add_note(f"a training step needs {needed / 2**30:.1f} GiB or more, {free / 2**30:.1f} GiB are free: not run")
    else:
        counted.training_bytes = _peak(design, counted, settings, training=True)
    progress(f"Memory of a prediction, {design.name}")
    if memory.can_measure(settings.device):
        counted.prediction_bytes = _peak(design, counted, settings, training=False)


def _peak(design: Design, counted: Profile, settings: ProfileSettings, training: bool) -> float:
    """A peak in bytes; where it is NaN, a note says why."""
    batch_size = counted.batch_size if training else 1
    peak = memory.peak_bytes(design, training, batch_size, settings.device, settings.threads)
    if isnan(peak):
        counted.add_note(f"a {'training step' if training else 'prediction'} {memory.why_no_peak(settings.device)}")
    return peak


def time_in_turns(
    networks: Mapping[str, nn.Module],
    shapes: Mapping[str, Sequence[int]],
    settings: ProfileSettings,
    progress: Progress = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of forward passes in inference mode, A B C A B C …, after a pass of each that does not count.

    Other load on the machine, and its temperature, thus affect all networks equally. A network that runs out of memory is left
    out of the turns that follow, and of the result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    images: dict[str, torch.Tensor] = {}
    where = settings.device, DTYPES[settings.dtype]
    for turn in range(settings.rounds + 1):
        for name in list(seconds):
            progress(f"Timing {name}, " + (f"round {turn} of {settings.rounds}" if turn else "warm-up"))
            try:
                if not turn:
                    networks[name].to(*where)
                    images[name] = torch.randn(tuple(shapes[name])).to(*where)
                seconds[name].append(_timed_pass(networks[name], images[name], settings.device))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                images.pop(name, None)
                networks[name].cpu()
                del seconds[name]
    return {name: timed[1:] for name, timed in seconds.items()}


@torch.inference_mode()
def _timed_pass(network: nn.Module, image: torch.Tensor, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    network(image)
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
