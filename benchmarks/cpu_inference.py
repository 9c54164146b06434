"""Time of one patch on the CPU: E2ENet in the engine, against stock nnU-Net in PyTorch and in OpenVINO.

    python benchmarks/cpu_inference.py                             # all parts
    python benchmarks/cpu_inference.py --parts targets float16 --json result.json
    python benchmarks/cpu_inference.py --parts targets --patch 32 128 128 --sparsity 0.8 0.9 --rounds 7

Parts:
    targets   the AMOS plan, 64 x 160 x 160, 16 classes, float32: against stock nnU-Net in PyTorch and OpenVINO; arithmetic a
              second against the machine's peak; where the time goes
    small     the Hippocampus patch, and 32 x 32 x 32
    float16   OpenVINO's bfloat16 beside the engine with maps in float32 and in float16, and how far the logits of each are
              from PyTorch's in float32
    sparsity  the engine as S goes from 0 to 0.95
    volume    the engine as the patch grows
    pytorch   E2ENet in PyTorch (half a minute a patch), and the largest difference of a logit to it

What a part compares is timed in turn, round by round in one process, so that a machine whose speed drifts drifts for all. Read
the ratios, which are taken round by round, rather than the seconds. OpenVINO is used if it is installed.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
from plans import AMOS, HIPPOCAMPUS, Plan
from recording import Table
from torch import Tensor, nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.settings import override

Call = Callable[[], Any]
PYTORCH, OPENVINO = "nnU-Net, PyTorch", "nnU-Net, OpenVINO"


def e2enet(plan: Plan, sparsity: float) -> E2ENet:
    return plan.e2enet(sparsity, deep_supervision=False).eval()


def openvino_call(network: nn.Module, x: Tensor, precision: str, threads: int) -> Call | None:
    try:
        import openvino
    except ImportError:
        return None
    model = openvino.convert_model(network, example_input=x, input=[list(x.shape)])
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: request.infer([array])


def pytorch_call(network: E2ENet, x: Tensor) -> Call:
    def call() -> object:
        with engine.disabled():
            return network(x)

    return call


def engine_call(network: E2ENet, x: Tensor, storage: str = "float32") -> Call:
    def call() -> object:
        with override(engine_storage=storage):
            return network(x)

    call()  # packs the weights, and touches all memory for the first time
    reason = engine.why_pytorch(network)
    if reason is not None:
        raise SystemExit(f"the engine is not used: {reason}")
    return call


def time_in_turn(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    return recording.seconds_in_turn(calls, rounds)


def stock_calls(plan: Plan, x: Tensor, threads: int) -> dict[str, Call]:
    stock = plan.stock(deep_supervision=False).eval()
    calls: dict[str, Call] = {PYTORCH: lambda: stock(x)}
    compiled = openvino_call(stock, x, "f32", threads)
    if compiled is not None:
        calls[OPENVINO] = compiled
    return calls


def image(patch: Sequence[int]) -> Tensor:
    return torch.randn(1, 1, *patch)


def speed(
    title: str, plan: Plan, patch: Sequence[int], options: argparse.Namespace, rounds: int
) -> tuple[Table, dict[float, E2ENet]]:
    x = image(patch)
    calls = stock_calls(plan, x, options.threads)
    bases = list(calls)
    networks = {sparsity: e2enet(plan, sparsity) for sparsity in options.sparsity}
    calls |= {f"E2ENet S={sparsity}, engine": engine_call(network, x) for sparsity, network in networks.items()}
    shape = " x ".join(map(str, patch))
    return Table(f"{title}, {shape}, {plan.classes} classes", time_in_turn(calls, rounds), bases), networks


def targets(options: argparse.Namespace) -> list[Table]:
    patch = options.patch or AMOS.patch
    table, networks = speed("AMOS plan", AMOS, patch, options, options.rounds)
    peak = engine.peak_flops(options.threads)
    table.notes.append(
        f"peak of the machine: {peak / 1e9:.0f} GFLOP/s in a loop of multiply-adds, {bandwidth():.0f} GB/s copied"
    )
    for sparsity, network in networks.items():
        seconds = median(table.values[f"E2ENet S={sparsity}, engine"])
        before = engine.profile(network)  # with the first patch, which touches all memory for the first time
        network(image(patch))
        parts = {name: value - before[name] for name, value in engine.profile(network).items()}
        whole = sum(parts.values())
        overall = 2 * engine.executed_macs(network, patch) / seconds
        alone = 2 * engine.product_macs(network, patch) / parts["products"]  # the first thread's time, and a share of the work
        table.notes.append(
            f"S={sparsity}: all multiply-accumulates with weights over the whole time, {overall / 1e9:.0f} GFLOP/s "
            f"({overall / peak:.0%} of the peak); products alone, {alone / 1e9:.0f} GFLOP/s ({alone / peak:.0%})"
        )
        shares = [f"{name} {part / whole:.0%}" for name, part in sorted(parts.items(), key=lambda item: -item[1]) if part]
        table.notes.append(f"S={sparsity}, CPU time of the first thread: {', '.join(shares)}")
    return [table]


def small(options: argparse.Namespace) -> list[Table]:
    rounds = 10 * options.rounds
    cases = [("Hippocampus plan", HIPPOCAMPUS, HIPPOCAMPUS.patch), ("AMOS plan", AMOS, (32, 32, 32))]
    return [speed(title, plan, patch, options, rounds)[0] for title, plan, patch in cases]


def float16(options: argparse.Namespace) -> list[Table]:
    x = image(options.patch or AMOS.patch)
    stock = AMOS.stock(deep_supervision=False).eval()
    compiled = openvino_call(stock, x, "bf16", options.threads)
    calls = {} if compiled is None else {"nnU-Net, OpenVINO bfloat16": compiled}
    bases = list(calls)
    notes = [] if compiled is None else [f"{bases[0]}: {distance(torch.from_numpy(compiled()[0]), stock(x))}"]
    for s in options.sparsity:
        network = e2enet(AMOS, s)
        exact = pytorch_call(network, x)()
        for storage in ("float32", "float16"):
            name = f"E2ENet S={s}, engine, {storage}"
            calls[name] = engine_call(copy.deepcopy(network), x, storage)
            notes.append(f"{name}: {distance(calls[name](), exact)}")
    notes.insert(
        0, "logits and PyTorch's in float32, the largest difference as a share of the largest logit, voxels of another label:"
    )
    return [Table("16 bits", time_in_turn(calls, options.rounds), bases, notes)]


def distance(ours: Tensor, exact: Tensor) -> str:
    largest = ((ours - exact).abs().max() / exact.abs().max()).item()
    return f"{largest:.1e}, {(ours.argmax(1) != exact.argmax(1)).float().mean().item():.2%}"


def sparsity(options: argparse.Namespace) -> list[Table]:
    x = image(options.patch or AMOS.patch)
    calls = {f"S={s}": engine_call(e2enet(AMOS, s), x) for s in (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)}
    return [Table("E2ENet in the engine as S grows", time_in_turn(calls, options.rounds), ["S=0.0"])]


def volume(options: argparse.Namespace) -> list[Table]:
    network = e2enet(AMOS, 0.8)
    patches = [[32, 64, 64], [32, 96, 96], [32, 128, 128], [64, 128, 128], [64, 160, 160], [96, 160, 160]]
    seconds: dict[str, list[float]] = {}
    for patch in patches:  # not in turn: the engine keeps the buffers of two sizes
        seconds |= time_in_turn({" x ".join(map(str, patch)): engine_call(network, image(patch))}, options.rounds)
    table = Table("E2ENet S=0.8 in the engine as the patch grows", seconds, [])
    voxels = [p[0] * p[1] * p[2] / 1e6 for p in patches]
    rates = [f"{median(s) / v:.2f}" for s, v in zip(table.values.values(), voxels, strict=True)]
    table.notes.append("seconds a million voxels: " + ", ".join(rates))
    return [table]


def pytorch(options: argparse.Namespace) -> list[Table]:
    x = image(options.patch or AMOS.patch)
    network = e2enet(AMOS, options.sparsity[0])
    name = f"E2ENet S={options.sparsity[0]}"
    calls = {f"{name}, PyTorch": pytorch_call(network, x), f"{name}, engine": engine_call(network, x)}
    ours, theirs = calls[f"{name}, engine"](), calls[f"{name}, PyTorch"]()
    table = Table("E2ENet in PyTorch", time_in_turn(calls, 1), [f"{name}, engine"])
    table.notes.append(f"largest difference of the logits, voxels of another label: {distance(ours, theirs)}")
    return [table]


PARTS: dict[str, Callable[[argparse.Namespace], list[Table]]] = {
    part.__name__: part for part in (targets, small, float16, sparsity, volume, pytorch)
}


def bandwidth() -> float:
    """GB read and written a second, at best."""
    source, target = torch.ones(1 << 27), torch.empty(1 << 27)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best / 1e9


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--patch", type=int, nargs=3, help="instead of 64 x 160 x 160")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(", ".join(f"{key} {value}" for key, value in recording.machine().items()))
    tables: list[Table] = []
    for part in options.parts:
        for table in PARTS[part](options):
            print("\n".join(table.lines()), flush=True)
            tables.append(table)
            if options.json is not None:
                recording.write(options.json, tables)
    print(f"\npeak memory of all of it {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
