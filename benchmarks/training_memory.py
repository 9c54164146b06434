"""Memory of a training step: E2ENet beside stock nnU-Net.

Counts, patch by patch, the bytes that autograd keeps for the backward pass, the bytes of all tensors that are alive at once in
a forward and backward pass at most, its multiply-accumulates, and the bytes of weights, gradients and momentum; nothing is
computed for that, the networks run on the meta device. E2ENet is that of sparsity 0.8, whose weights are switched off one by
one, and as ``nnUNetTrainerE2ENet_B16active`` trains it, in blocks, of which active ones alone are stored and computed. With
``--measure`` it also trains one step of each network in PyTorch, in a process of its own, says how much memory that took at
its highest, and times steps of all networks in turn. Float32 (mixed precision on CUDA), deep supervision, five classes.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --measure AMOS --scale 2 --batch 1 --device cpu
"""

from __future__ import annotations

import argparse
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import recording
import torch
from contestants import spread
from plans import PLANS, TINY, Plan
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop

from nnunetv2_e2enet.engine import ENGINE_VARIABLE
from nnunetv2_e2enet.evaluation.memory import peak_bytes
from nnunetv2_e2enet.network import E2ENet, accounts, maskable_layers, store_active_only
from nnunetv2_e2enet.network.recomputation import RECOMPUTE

aten = torch.ops.aten
CLASSES = 5
STOCK = "nnU-Net"
ACTIVE = "B16active"


@dataclass(frozen=True)
class Candidate:
    """A network that ``peak_bytes`` can build in another process; ``kind`` is STOCK, ACTIVE or what E2ENet recomputes."""

    kind: str
    plan: str
    patch: tuple[int, ...]
    outputs: int = CLASSES
    has_regions: bool = False

    @property
    def resolutions(self) -> int:
        """Of nnU-Net's loss."""
        return len(self._plan.strides) - 1

    @property
    def _plan(self) -> Plan:
        return replace((PLANS | TINY)[self.plan], classes=self.outputs)

    def build(self, deep_supervision: bool = True) -> nn.Module:
        if self.kind == STOCK:
            return self._plan.stock(deep_supervision)
        if self.kind == ACTIVE:
            with torch.device("cpu"):  # what is stored depends on the topology's values
                return in_active_blocks(self._plan.e2enet(deep_supervision=deep_supervision))
        network = self._plan.e2enet(deep_supervision=deep_supervision)
        network.recompute = self.kind
        return network

    def input_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size, 1, *self.patch)

    def kept(self, batch_size: int) -> int:
        with torch.device("meta"):
            network = self.build()
        return accounts.saved_bytes(network, self.input_shape(batch_size))

    def multiply_accumulates(self) -> float:
        """Of the forward and backward pass of one patch."""
        with FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: backward_flops}) as counter:
            forward_backward(*self.on_meta(1))
        return counter.get_total_flops() / 2

    def peak(self, batch_size: int) -> int:
        """Bytes of all tensors alive at once in a forward and backward pass, without parameters; no library's workspace."""
        network, x = self.on_meta(batch_size)
        with LiveBytes() as live:
            forward_backward(network, x)
        return live.peak

    def state(self) -> int:
        """Bytes of weights, gradients and the momentum of nnU-Net's optimizer."""
        network, _ = self.on_meta(1)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tensors = [t for p in network.parameters() for t in (p, p.grad, optimizer.state[p]["momentum_buffer"])]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def on_meta(self, batch_size: int) -> tuple[nn.Module, torch.Tensor]:
        with torch.device("meta"):
            return self.build().to("meta"), torch.empty(self.input_shape(batch_size))


def backward_flops(*args: Any, out_shape: Any) -> int:
    """As torch counts them, but for grouped convolutions: it takes the gradient of their weights for that of a dense one."""
    *convolution, groups, (of_input, of_weight, _) = args
    masks = ([of_input, False, False], [False, of_weight, False])
    counts = [conv_backward_flop(*convolution, groups, mask, out_val=out_shape) for mask in masks]
    return int(counts[0]) + int(counts[1]) // int(groups)


def in_active_blocks(network: E2ENet) -> E2ENet:
    for _, layer in maskable_layers(network):
        layer.share_inputs(16, equal_blocks=True)
        layer.set_random_topology(layer.connections_at(1 - network.feature_sparsity))
        store_active_only(layer)
    return network


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def forward_backward(network: nn.Module, x: torch.Tensor) -> None:
    with torch.autocast("cuda", enabled=x.is_cuda):
        loss = sum(output.float().square().mean() for output in network(x))
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def count(plans: Sequence[str]) -> list[recording.Table]:
    """Batch 1, float32: nnU-Net, and E2ENet by what it computes again."""
    tables = []
    for name in plans:
        patch = PLANS[name].patch
        candidates = [Candidate(kind, name, patch) for kind in (STOCK, *RECOMPUTE, ACTIVE)]
        stock, where = candidates[0], f"{name}, {' x '.join(map(str, patch))}"
        counted: dict[str, tuple[str, Callable[[Candidate], float]]] = {
            "kept for the backward pass": ("GiB", lambda c: c.kept(1) / 2**30),
            "all tensors alive at once": ("GiB", lambda c: c.peak(1) / 2**30),
            "multiply-accumulates of a step": ("G", lambda c: c.multiply_accumulates() / 1e9),
            "weights, gradients and momentum": ("GiB", lambda c: c.state() / 2**30),
        }
        for what, (unit, of) in counted.items():
            values = {label(candidate): [of(candidate)] for candidate in candidates}
            tables.append(recording.Table(f"{where}: {what}", values, [STOCK], unit=unit))
        estimate = stock.build().compute_conv_feature_map_size(patch)
        tables[-1].notes.append(f"nnU-Net keeps {stock.kept(1) / estimate:.2f} bytes for each element of its own estimate")
    return tables


def label(candidate: Candidate) -> str:
    return f"E2ENet, recompute {candidate.kind}" if candidate.kind in RECOMPUTE else candidate.kind


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def over(count: float, base: float) -> str:
    return f"{count / base:.2f} x"


def measure(console: Console, plan: str, scale: int, batch_size: int, device: str, threads: int) -> None:
    divisors = [prod(axis) for axis in zip(*PLANS[plan].strides, strict=True)]
    patch = tuple(max(size // scale // d, 1) * d for size, d in zip(PLANS[plan].patch, divisors, strict=True))
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread(s)"
    table = Table(title=f"One training step, {plan}, {' x '.join(map(str, patch))}, batch {batch_size}, {where}")
    for name in ("network", "alive at once, float32", "peak", "over nnU-Net", "step, s, median (least to most)"):
        table.add_column(name, justify="left" if name == "network" else "right")
    candidates = [Candidate(kind, plan, patch) for kind in (STOCK, *RECOMPUTE, ACTIVE)]
    peaks = [peak_bytes(c, True, batch_size, device, threads) for c in candidates]  # type: ignore[arg-type]
    seconds = time_in_turn(candidates, batch_size, device, threads)
    for candidate, peak, times in zip(candidates, peaks, seconds, strict=True):
        table.add_row(label(candidate), gib(candidate.peak(batch_size)), gib(peak), over(peak, peaks[0]), spread(times, ".2f"))
    console.print(table)


def time_in_turn(candidates: list[Candidate], batch_size: int, device: str, threads: int) -> list[list[float]]:
    """Seconds of five forward and backward passes each, in turn."""
    torch.set_num_threads(threads)
    x = torch.randn(candidates[0].input_shape(batch_size), device=device)

    def step_of(network: nn.Module) -> Callable[[], None]:
        def step() -> None:
            forward_backward(network, x)
            if device == "cuda":
                torch.cuda.synchronize()

        step()
        return step

    steps = {label(candidate): step_of(candidate.build().to(device)) for candidate in candidates}
    return list(recording.seconds_in_turn(steps, 5).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=PLANS, help="train one step of each network on this plan's patch")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide the patch by this on each axis, as far as the strides let it"
    )
    parser.add_argument("--batch", type=int, default=2, help="patches in the batch that is measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="to count for (default: all)")
    parser.add_argument("--json", type=Path, help="where to write what was counted")
    arguments = parser.parse_args()
    without_use = [
        name for name in ("scale", "batch", "device", "threads") if getattr(arguments, name) != parser.get_default(name)
    ]
    if without_use and not arguments.measure:
        parser.error(f"--{without_use[0]} is of what --measure measures: add --measure PLAN")
    console = Console(highlight=False, width=140)
    os.environ[ENGINE_VARIABLE] = "off"  # also of other processes: recomputation is PyTorch's
    counted = count(arguments.plans)
    for table in counted:
        console.print("\n".join(table.lines()))
    if arguments.json:
        recording.write(arguments.json, counted, counted=True)
    if arguments.measure:
        measure(console, arguments.measure, arguments.scale, arguments.batch, arguments.device, arguments.threads)


if __name__ == "__main__":
    main()
