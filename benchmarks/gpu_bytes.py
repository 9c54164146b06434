"""Bytes that a compiled training step moves on a GPU, counted without one: E2ENet beside stock nnU-Net.

The network is traced as ``torch.compile`` traces it, with mixed precision, and Inductor lowers forward and backward pass for
CUDA as far as its fused kernels, each of which says what it reads and writes. No code is generated and nothing is computed. A
kernel counts each tensor that it reads or writes once, whatever a cache may spare or a second loop may cost. Convolutions,
which libraries compute, are counted apart: of theirs, bytes are inputs and outputs. The gradient of the maps of sparse
convolutions also counts its float32 sums, which each block reads and writes.

    python benchmarks/gpu_bytes.py                                  # the plans of AMOS and Hippocampus, batch 2
    python benchmarks/gpu_bytes.py --plans Hippocampus --contestants nnU-Net "E2ENet, PyTorch's passes" --details
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the kernels' operators exist on the CPU too

import recording
import torch
from plans import PLANS as ALL_PLANS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _disable_current_modes
from training_memory import ACTIVE, STOCK, Candidate

from nnunetv2_e2enet import files
from nnunetv2_e2enet.network.acceleration import prepare_kernels
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST
from nnunetv2_e2enet.settings import override

CUDA = torch.device("cuda:0")
PLANS = ("AMOS", "Hippocampus")
GPU = SimpleNamespace(  # what Inductor asks of a device: an H100's figures
    name="H100", type="cuda", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=227 * 2**10, shared_memory_per_block=48 * 2**10,
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """What one kernel, or one call of a library, moves.

    Attributes:
        kind: "convolution", the name of one of our operators, or "fused" for what Inductor writes itself.
        bytes: read and written.
        launches: kernels.
        channels_last: of a convolution and of our operators, whether each map that is read lies channels last.
    """

    kind: str
    bytes: int
    launches: int = 1
    channels_last: tuple[bool, ...] = ()


OURS: dict[str, Callable[[int, Any], tuple[int, int]]] = {
    "statistics": lambda count, _: (count, 2),
    "norm_gradient": lambda count, _: (count * 5 // 3, 3),  # two passes over both maps, a sum between them
    "sparse_convolution": lambda count, _: (count, 1),
    "sparse_input_gradient": lambda count, node: (count + bytes_of_sums(node), 1 + 2 * (len(node.inputs) - 3)),
    "sparse_weight_gradient": lambda count, _: (count, 2),
    "pool": lambda count, _: (count, 1),
    "pool_gradient": lambda count, _: (count, 1),
    "join": lambda count, node: (count, len(node.inputs)),
    "separate": lambda count, node: (count, len(node.inputs)),
}
"""Of our operators: bytes and launches, from the bytes of inputs and outputs."""


def bytes_of_sums(node: Any) -> int:
    """What ``sparse_input_gradient`` moves beside its inputs and outputs, less its maps, of which the shapes alone are read.

    The float32 sums are filled with zeros, read and written at the input maps of each block, and read to be cast.
    """
    _grad, _weight, inputs, *maps = node.inputs
    batch, _, *space = (int(size) for size in maps[0].get_size())
    values_of_blocks = batch * prod(space) * prod(int(size) for size in inputs.get_size())
    sums = batch * sum(int(x.get_size()[1]) for x in maps) * prod(space)
    return 4 * (sums + 2 * values_of_blocks + sums) - maps[0].get_dtype().itemsize * sums


Step = dict[str, list[Moved]]
"""By "forward" and "backward"."""


def count_step(network: nn.Module, x: Tensor, training: bool = True) -> Step:
    """What one training step (or prediction) of a compiled network moves.

    Args:
        network: of meta tensors, or of any; not changed.
        x: its input, of which shape and memory format count.
        training: whether there is a backward pass.
    """
    torch._dynamo.reset()
    step: Step = {"forward": [], "backward": []}
    mode = FakeTensorMode()
    network = as_fake(deepcopy(network), mode).train(training)
    image = _fake(x, mode, torch.device("cpu"))

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        backward = bool(options.get("is_backward"))
        step["backward" if backward else "forward"] += moved(deepcopy(graph), inputs, backward)
        return compile_fx.make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        result: Callable[..., Any] = compile_fx.compile_fx(graph, inputs, inner_compile=count)
        return result

    with as_on_cuda(), mode, torch.autocast("cpu", torch.float16), torch.set_grad_enabled(training):
        outputs = torch.compile(network, backend=backend, fullgraph=True)(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        if training:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return step


def as_fake(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The network with tensors that have shapes alone, in the place of its own."""
    cpu = torch.device("cpu")
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_fake(parameter.detach(), mode, cpu))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(buffer, mode, cpu)
    return network


def _fake(x: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    return FakeTensor(mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), device)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """What Inductor asks of CUDA is answered as an H100 would; convolutions keep channels-last maps, as cuDNN's do."""

    def conv_format(x: Tensor, weight: Tensor, _backend: Any) -> torch.memory_format:
        form = CHANNELS_LAST[x.dim() - 2]
        return form if form in map(suggest_memory_format, (x, weight)) else torch.contiguous_format

    answers = [
        (CudaInterface, "get_device_properties", lambda *_: GPU),
        (CudaInterface, "get_compute_capability", lambda *_: 90),
        (torch.cuda, "get_device_properties", lambda *_: GPU),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch._inductor.codecache.CacheBase, "get_system", lambda *_: {}),
        (torch._inductor.scheduler, "has_triton", lambda *_: True),
        (
            Tensor,
            "copy_",
            lambda self, other, *_: torch.ops.aten.copy_.default(self, other),
        ),  # whose binding asks for a driver
        (torch._C, "_conv_determine_backend_memory_format", conv_format),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


def moved(graph: torch.fx.GraphModule, inputs: Sequence[Any], backward: bool) -> list[Moved]:
    """What a graph moves, scheduled by Inductor for CUDA as ``torch._inductor.compile_fx`` goes about it."""
    mode = FakeTensorMode()
    on_cuda = [_fake(x, mode, CUDA) if isinstance(x, Tensor) else x for x in inputs]

    def device(argument: Any) -> Any:
        return CUDA if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, device), map_aggregate(node.kwargs, device)
    graph.recompile()
    compile_fx.view_to_reshape(graph)
    with ExitStack() as stack:
        for context in (_disable_current_modes(), tracing(TracingContext(mode)), torch.no_grad(), V.set_fake_mode(mode)):
            stack.enter_context(context)
        stack.enter_context(V.set_debug_handler(DebugContext()))
        with mode:
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*on_cuda)
        stack.enter_context(mode)
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=on_cuda, is_backward=backward)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*on_cuda)
            lowering._update_scheduler()
            return [found for node in lowering.scheduler.nodes if (found := moved_by(node)) is not None]


def moved_by(node: BaseSchedulerNode) -> Moved | None:
    """What a kernel or a library's call moves; None for a name of something that another node computes."""
    count = node.get_read_write_buffers_sizes()
    if not isinstance(node, ExternKernelSchedulerNode):
        return None if isinstance(node, NopKernelSchedulerNode) else Moved("fused", count)
    operator = getattr(node.node, "op_overload", None)
    if operator is None:
        return None
    namespace, _, name = operator.name().partition("::")
    formats = tuple(formats_of(node))
    if namespace == "e2enet":
        kind = "convolution" if name.startswith("sparse") else name
        return Moved(kind, *OURS[name](count, node.node), formats)
    return Moved("convolution", count, 1, formats) if "convolution" in name else Moved(name, count)


def formats_of(node: BaseSchedulerNode) -> Iterator[bool]:
    """Of the maps of several channels that a library's call or an operator reads: whether their channels come last."""
    assert node.node is not None
    for value in node.node.inputs:
        size = [int(s) for s in value.get_size()]
        is_map = len(size) > 3 and size[1] > 1 and max(size[2:]) > 3  # and not weights
        if is_map:
            yield int(value.get_stride()[1]) == 1


def summary(step: Step) -> dict[str, dict[str, int]]:
    """By pass: bytes without convolutions, of convolutions, and launches without convolutions."""
    return {
        name: {
            "bytes": sum(m.bytes for m in moves if m.kind != "convolution"),
            "convolution_bytes": sum(m.bytes for m in moves if m.kind == "convolution"),
            "launches": sum(m.launches for m in moves if m.kind != "convolution"),
            "maps_read": sum(len(m.channels_last) for m in moves),
            "channels_last": sum(sum(m.channels_last) for m in moves),
        }
        for name, moves in step.items()
    }


@dataclass(frozen=True)
class Contestant:
    """A network as it is compiled: ``kind`` as in ``training_memory``, the setting of our kernels, the memory format."""

    kind: str
    kernels: str = "on"
    channels_last: bool = False

    def count(self, plan: str, batch_size: int) -> Step:
        with override(kernels=self.kernels):
            candidate = Candidate(self.kind, plan, ALL_PLANS[plan].patch)
            network, x = candidate.on_meta(batch_size)
            if self.channels_last:
                network.to(memory_format=CHANNELS_LAST[x.dim() - 2])  # type: ignore[call-overload]
            prepare_kernels(torch.device("cpu"))
            return count_step(network, x)


CONTESTANTS = {
    "nnU-Net": Contestant(STOCK),
    "E2ENet, PyTorch's passes": Contestant("blocks", "off"),
    "E2ENet": Contestant("blocks"),
    "nnU-Net, channels last": Contestant(STOCK, channels_last=True),
    "E2ENet, channels last": Contestant("blocks", channels_last=True),
    "E2ENet, blocks of 16": Contestant(ACTIVE),
}


def report(plan: str, counted: dict[str, Step], batch_size: int, details: bool, console: Console) -> None:
    table = Table(title=f"{plan}, batch {batch_size}, float16: a compiled step, without convolutions")
    for column in (
        "",
        "forward",
        "backward",
        "both, over nnU-Net",
        "launches",
        "convolutions' inputs and outputs",
        "maps channels last",
    ):
        table.add_column(column, justify="left" if not column else "right")
    base = None
    for name, step in counted.items():
        passes = summary(step)
        both = sum(p["bytes"] for p in passes.values())
        base = both if base is None else base
        table.add_row(
            name,
            *(f"{passes[p]['bytes'] / 2**30:.2f} GiB" for p in ("forward", "backward")),
            f"{both / base:.2f}",
            " + ".join(str(p["launches"]) for p in passes.values()),
            f"{sum(p['convolution_bytes'] for p in passes.values()) / 2**30:.2f} GiB",
            "{} of {}".format(*(sum(p[kind] for p in passes.values()) for kind in ("channels_last", "maps_read"))),
        )
    console.print(table)
    for name, step in counted.items() if details else ():
        for direction, moves in step.items():
            by_kind: Counter[str] = Counter()
            for m in moves:
                by_kind[m.kind] += m.bytes
            kinds = ", ".join(f"{kind} {count / 2**30:.3f}" for kind, count in by_kind.most_common())
            console.print(f"{name}, {direction}, GiB: {kinds}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=PLANS, choices=ALL_PLANS)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--details", action="store_true", help="also by kind of kernel")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    parser.add_argument("--json", type=Path, help="a record for docs/results/counts")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, width=140)
    counts: dict[str, dict[str, Any]] = {}
    for plan in given.plans:
        counted = {name: CONTESTANTS[name].count(plan, given.batch) for name in given.contestants}
        report(plan, counted, given.batch, given.details, console)
        counts[plan] = {name: summary(step) for name, step in counted.items()}
    if given.output is not None:
        files.write_atomically(given.output, json.dumps(counts, indent=2) + "\n")
    if given.json is not None:
        recording.write(given.json, tables(counts, given.batch), counted=True)


def tables(counts: dict[str, dict[str, Any]], batch_size: int) -> list[recording.Table]:
    """Bytes of both passes, without convolutions and of convolutions."""
    found = []
    for plan, by_contestant in counts.items():
        for what, key in (("without convolutions", "bytes"), ("inputs and outputs of convolutions", "convolution_bytes")):
            values = {name: [sum(p[key] for p in passes.values()) / 2**30] for name, passes in by_contestant.items()}
            title = f"{plan}, batch {batch_size}, float16: bytes of a compiled step, {what}"
            found.append(recording.Table(title, values, ["nnU-Net"], unit="GiB"))
    return found


if __name__ == "__main__":
    main()
