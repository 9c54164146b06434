"""Time of one patch on the CPU: E2ENet in the engine, against stock nnU-Net in PyTorch and in OpenVINO.

    python benchmarks/cpu_inference.py                       # the AMOS plan, float32
    python benchmarks/cpu_inference.py --plan hippocampus
    python benchmarks/cpu_inference.py --patch 32 32 32 --sparsity 0 0.5 0.8 0.9 0.95

All candidates are timed in turn, round by round in one process, so that a machine whose speed drifts drifts for all. Read the
ratios, which are taken round by round, not the seconds. OpenVINO is used if it is installed (``pip install
nnunetv2-e2enet[benchmarks]``).
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet, e2enet_features

Call = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    strides: list[list[int]]
    patch: list[int]
    classes: int
    first_kernel: list[int]


PLANS = {
    "amos": Plan([[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4], [64, 160, 160], 16, [1, 3, 3]),
    "hippocampus": Plan([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], [40, 56, 40], 3, [3, 3, 3]),
}


def stock_network(plan: Plan) -> nn.Module:
    levels = len(plan.strides)
    return PlainConvUNet(
        input_channels=1,
        n_stages=levels,
        features_per_stage=[min(32 * 2**level, 320) for level in range(levels)],
        conv_op=nn.Conv3d,
        kernel_sizes=[plan.first_kernel, *[[3, 3, 3]] * (levels - 1)],
        strides=plan.strides,
        n_conv_per_stage=2,
        num_classes=plan.classes,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    ).eval()


def e2enet(plan: Plan, sparsity: float) -> E2ENet:
    levels = len(plan.strides)
    network = E2ENet(1, plan.classes, levels, e2enet_features(levels), nn.Conv3d, plan.strides, feature_sparsity=sparsity)
    return network.eval()


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


def engine_call(network: E2ENet, x: Tensor) -> Call:
    network(x)  # packs the weights
    reason = engine.why_pytorch(network)
    if reason is not None:
        raise SystemExit(f"the engine is not used: {reason}")
    return lambda: network(x)


def seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def report(times: dict[str, list[float]], bases: list[str]) -> None:
    width = max(len(name) for name in times)
    print(f"\n{'':{width}}  seconds, median (least to most)   " + "   ".join(f"over {base}" for base in bases))
    for name, values in times.items():
        ratios = [spread([a / b for a, b in zip(values, times[base], strict=True)], ".3f") for base in bases]
        print(f"{name:{width}}  {spread(values, '.3f')}   " + "   ".join(ratios))


def largest_error(network: E2ENet, x: Tensor) -> float:
    ours = network(x)
    with engine.disabled():
        theirs = network(x)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="amos")
    parser.add_argument("--patch", type=int, nargs=3, help="another patch size for the plan")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--e2enet-in-pytorch", action="store_true", help="time that as well, and compare the logits")
    parser.add_argument("--without-openvino", action="store_true")
    arguments = parser.parse_args()
    plan = PLANS[arguments.plan]
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    x = torch.randn(1, 1, *(arguments.patch or plan.patch))
    print(engine.status().reason)
    print(f"patch {list(x.shape[2:])}, {plan.classes} classes, {arguments.threads} threads, torch {torch.__version__}")

    stock = stock_network(plan)
    calls: dict[str, Call] = {"nnU-Net, PyTorch": lambda: stock(x)}
    compiled = None if arguments.without_openvino else openvino_call(stock, x, "f32", arguments.threads)
    if compiled is not None:
        calls["nnU-Net, OpenVINO"] = compiled
    networks = {sparsity: e2enet(plan, sparsity) for sparsity in arguments.sparsity}
    for sparsity, network in networks.items():
        calls[f"E2ENet S={sparsity}, engine"] = engine_call(network, x)
    bases = list(calls)[: 1 if compiled is None else 2]
    if arguments.e2enet_in_pytorch:
        for sparsity, network in networks.items():
            print(f"S={sparsity}: largest difference {largest_error(network, x):.1e} of the largest logit")
        last = arguments.sparsity[-1]
        calls[f"E2ENet S={last}, PyTorch"] = pytorch_call(networks[last], x)
        bases.append(f"E2ENet S={last}, PyTorch")
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    report(times, bases)
    for sparsity, network in networks.items():
        parts = engine.profile(network)
        whole = sum(parts.values())
        print(f"S={sparsity}, where the time goes: " + ", ".join(f"{k} {v / whole:.0%}" for k, v in parts.items()))
    print(f"peak memory of all of it {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
