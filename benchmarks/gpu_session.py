"""Half an hour on a GPU: what is not known of the CUDA paths, in stages of at most eight minutes each.

On a machine with a network, once; it downloads what a bare machine with Python 3.12, torch and Triton lacks:

    python benchmarks/gpu_session.py --bundle DIR --preprocessed nnUNet_preprocessed/Dataset004_Hippocampus

On the machine with the GPU, where DIR has been copied to, without a network:

    DIR/install.sh && cd DIR/repository
    python benchmarks/gpu_session.py --stage 1 --folder DIR/session         # then 2, 3, ...; again where one was cut off

Stages: 1 the kernels' tests; 2 training steps; 3 prediction of a patch; 4 convolutions alone; 5 where the time of a step goes;
6 trainings on Hippocampus, until the time is up. Every result is a JSON file of its own in ``--folder``; what is there is not
measured again. ``--device cpu`` tries the stages on tiny networks, and marks results as such.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, requires, version
from pathlib import Path
from typing import Any

import contestants
import gpu_training
import torch
from packaging.requirements import Requirement
from training_memory import ACTIVE, PLANS, STOCK, Candidate

from nnunetv2_e2enet import files
from nnunetv2_e2enet.network.convolution import over_slices
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST
from nnunetv2_e2enet.network.sparse_convolution import sparse_convolution
from nnunetv2_e2enet.settings import variable

REPOSITORY = Path(__file__).resolve().parents[1]
STAGE_SECONDS = 8 * 60
PART_BYTES = 60 * 10**6
THERE = ("torch", "triton", "nvidia", "cuda")
"""What distributions of the machine with the GPU are called; nothing of them is downloaded."""


@dataclass(frozen=True)
class Step:
    """A training step to time: a network of ``training_memory``, how it is run, and its settings."""

    kind: str
    compiled: bool = True
    channels_last: bool = False
    kernels: str = "auto"
    plane_convolutions: str = "off"

    @property
    def name(self) -> str:
        parts = ["compiled" if self.compiled else "eager", *["channels last"] * self.channels_last]
        parts += [f"kernels {self.kernels}"] * (self.kernels != "auto")
        parts += ["plane convolutions"] * (self.plane_convolutions == "on")
        return ", ".join([self.kind, *parts])


STEPS = [
    Step(STOCK), Step("blocks"), Step("blocks", channels_last=True), Step("blocks", kernels="off"),
    Step(ACTIVE, channels_last=True), Step("blocks", channels_last=True, plane_convolutions="on"),
    Step(STOCK, channels_last=True), Step("blocks", compiled=False), Step("none"), Step(ACTIVE),
    Step(STOCK, compiled=False), Step("blocks", compiled=False, kernels="off"),
]  # fmt: skip


def stage_tests(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    def run(file: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=STAGE_SECONDS, check=False)
        return {"passed": done.returncode == 0, "end": done.stdout[-3000:]}

    tests = ["test_depth_shift.py"] if given.device == "cpu" else ["test_kernels.py", "test_sparse_convolution.py"]
    return {f"1 {file}": (lambda file=file: run(file)) for file in tests}


def stage_steps(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    return {f"2 {step.name}": (lambda step=step: in_own_process(step, given)) for step in STEPS}


def in_own_process(step: Step, given: argparse.Namespace) -> Any:
    """Networks that are compiled one after the other in a process would meet the compiler's limit, and run eagerly."""
    environment = {variable("kernels"): step.kernels, variable("plane_convolutions"): step.plane_convolutions}
    command = [sys.executable, __file__, "--time", str(STEPS.index(step)), "--device", given.device]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr[-3000:]}
    return json.loads(done.stdout.splitlines()[-1])


def timed_step(step: Step, device: str) -> dict[str, Any]:
    """Milliseconds of training steps, 3 x 30 of them, and the bytes allocated at the peak."""
    contestants.as_nnunet_trains(device)
    tiny = device == "cpu"
    plan, rounds, steps = ("Hippocampus", 1, 2) if tiny else ("AMOS", 3, 30)
    candidate = Candidate(step.kind, plan, (16, 16, 16) if tiny else PLANS[plan][1], 5 if tiny else 16)
    network: Any = candidate.build().to(device)
    x = torch.randn(candidate.input_shape(1 if tiny else 2), device=device)
    if step.channels_last:
        network = network.to(memory_format=CHANNELS_LAST[x.dim() - 2])
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    scaler = torch.amp.GradScaler(device, enabled=not tiny)
    run = torch.compile(network, backend="eager" if tiny else "inductor", fullgraph=True) if step.compiled else network

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, enabled=not tiny):
            loss = sum((output.float().square().mean() for output in run(x)), x.new_zeros(()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(1 if tiny else 5):
        once()
    synchronize(device)
    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            once()
        synchronize(device)
        seconds.append((time.perf_counter() - begin) / steps)
    peak = {} if tiny else {"peak_bytes": torch.cuda.max_memory_allocated()}
    return {"milliseconds": [1e3 * s for s in seconds], **peak}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def stage_prediction(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    def run(options: tuple[str, ...]) -> Any:
        output = given.folder / "prediction.json"
        output.unlink(missing_ok=True)
        command = [sys.executable, "benchmarks/gpu_inference.py", "-d", "4", "--device", given.device, "--output", str(output)]
        tiny = ["--rounds", "1", "--contestants", "nnU-Net"] if given.device == "cpu" else ["--amos"]
        environment = {**os.environ, "nnUNet_preprocessed": str(given.preprocessed)}
        done = subprocess.run(
            [*command, *tiny, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
        return json.loads(output.read_text()) if done.returncode == 0 else {"error": done.stderr[-3000:]}

    return {"3 prediction": lambda: run(()), "3 prediction, compiled": lambda: run(("--compile",))}


def stage_convolutions(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The second convolution of a level of the AMOS plan, forward and backward: in 3D, over slices, of active blocks alone."""
    levels = [(48, (64, 160, 160)), (96, (64, 80, 80)), (192, (32, 40, 40)), (320, (16, 20, 20))]
    if given.device == "cpu":
        levels = [(48, (2, 6, 6))]
    return {f"4 {c} maps": (lambda c=c, size=size: time_convolutions(c, size, given.device)) for c, size in levels}


def time_convolutions(channels: int, size: tuple[int, ...], device: str) -> dict[str, Any]:
    contestants.as_nnunet_trains(device)
    dtype = torch.float32 if device == "cpu" else torch.float16
    per_block = round(0.2 * channels)
    inputs = torch.stack([torch.randperm(channels)[:per_block].sort().values for _ in range(channels // 16)]).to(device)
    result: dict[str, Any] = {}
    for last in (False, True):
        x = torch.randn(2, channels, *size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format).requires_grad_()
        dense = torch.randn(channels, channels, 1, 3, 3, device=device, dtype=dtype)
        dense = dense.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format).requires_grad_()
        active = torch.randn(channels, per_block, 1, 3, 3, device=device, dtype=dtype, requires_grad=True)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "conv3d": lambda x=x, w=dense: torch.nn.functional.conv3d(x, w, padding=(0, 1, 1)),
            "sparse blocks": lambda x=x, w=active: sparse_convolution(x, w, None, inputs, (1, 1, 1)),
        }
        if last:
            ways["over slices"] = lambda x=x, w=dense: over_slices(x, w, None, (1, 1, 1), (0, 1, 1), (1, 1, 1), 1)
        if device == "cpu":
            del ways["sparse blocks"]  # whose kernels are not for it
        for name, way in ways.items():
            result[f"{name}{', channels last' * last}"] = milliseconds(way, device)
    return result


def milliseconds(way: Callable[[], torch.Tensor], device: str, rounds: int = 20) -> list[float]:
    values = []
    for _ in range(rounds if device == "cuda" else 2):
        begin = time.perf_counter()
        out = way()
        out.backward(torch.ones_like(out))
        synchronize(device)
        values.append(1e3 * (time.perf_counter() - begin))
    return values[1:]


def stage_profile(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    def run(contestant: str) -> Any:
        os.environ["nnUNet_preprocessed"] = str(given.preprocessed)
        tiny = given.device == "cpu"
        settings = gpu_training.Settings("4", "3d_fullres", "nnUNetPlans", not tiny, 1, 1 if tiny else 10, 1, given.device)
        return gpu_training.in_own_process(contestant, settings, False, True)["profile"]

    names = ["nnU-Net"] if given.device == "cpu" else ["nnU-Net", "E2ENet 0.8", "E2ENet 0.8, channels last"]
    return {f"5 {name}": (lambda name=name: run(name)) for name in names}


def stage_trainings(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Several at once, each of one contestant in a folder of its own, until the stage's time is up."""

    def run() -> Any:
        tiny = given.device == "cpu"
        names = ["nnU-Net"] if tiny else ["nnU-Net", "E2ENet 0.8", "E2ENet 0.9"]
        options = ["--epochs", "1" if tiny else "100", "--folds", "0", "--device", given.device, "--minutes", "6"]
        options += ["--iterations", "1", "--validation-iterations", "1"] if tiny else []
        running = {}
        for name in names:
            folder = given.folder / "hippocampus" / name.replace(" ", "_")
            (folder / "nnUNet_raw").mkdir(parents=True, exist_ok=True)
            if not (folder / "nnUNet_preprocessed").exists():
                (folder / "nnUNet_preprocessed").symlink_to(given.preprocessed)
            command = [sys.executable, "benchmarks/hippocampus.py", "--folder", str(folder), "--contestants", name, *options]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running[name] = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
        ends = {name: process.communicate()[0][-2000:] for name, process in running.items()}
        return {name: {"returned": running[name].returncode, "end": ends[name]} for name in names}

    return {f"6 trainings, call {len(list(given.folder.glob('6*.json'))) + 1}": run}


STAGES = (stage_tests, stage_steps, stage_prediction, stage_convolutions, stage_profile, stage_trainings)


def run_stage(number: int, given: argparse.Namespace) -> None:
    given.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + STAGE_SECONDS
    for key, measure in STAGES[number - 1](given).items():
        file = given.folder / f"{key}.json"
        if file.is_file():
            continue
        if time.monotonic() > deadline - 60:
            print(f"time is up before {key}: call the stage again")
            return
        begin = time.perf_counter()
        result = measure()
        record = {"what": key, "machine": contestants.machine(given.device), "result": result}
        failed = isinstance(result, dict) and "error" in result  # which the next call tries again
        target = file.with_suffix(".error.json") if failed else file
        files.write_atomically(target, json.dumps(record, indent=2) + "\n")
        print(f"{key}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"stage {number} is done")


def bundle(folder: Path, preprocessed: Path) -> None:
    """Wheels for Python 3.12 in parts, the repository, the preprocessed data set, and what installs them."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for name in sorted(needed(["nnunetv2-e2enet", "pytest", "hypothesis", "setuptools"])):
        pip(name, wheels)
    parts: list[int] = []
    for wheel in sorted(wheels.glob("*.whl")):
        size = wheel.stat().st_size
        part = next((i for i, used in enumerate(parts) if used + size <= PART_BYTES), len(parts))
        parts[part:] = [parts[part] + size if part < len(parts) else size, *parts[part + 1 :]]
        (folder / f"wheels{part}").mkdir(exist_ok=True)
        wheel.rename(folder / f"wheels{part}" / wheel.name)
    shutil.rmtree(wheels)
    (folder / "repository").mkdir(exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=REPOSITORY, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder / "repository")], input=archive, check=True)
    shutil.copytree(preprocessed, folder / "nnUNet_preprocessed" / preprocessed.name, dirs_exist_ok=True)
    (folder / "nnUNet_preprocessed" / preprocessed.name / "prepared").touch()
    install = folder / "install.sh"
    install.write_text(
        '#!/bin/sh\nset -e\nhere=$(cd "$(dirname "$0")" && pwd)\n'
        'python3 -m pip install --no-index --no-deps "$here"/wheels*/*.whl\n'
        'python3 -m pip install --no-index --no-deps --no-build-isolation "$here"/repository\n'
    )
    install.chmod(0o755)


def needed(names: Sequence[str]) -> set[str]:
    """Distributions that these ones need, directly or not, but for those that are there, and for ours."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found or name.startswith(THERE):
            continue
        found.add(name)
        extras = requirement.extras or {""}
        for text in requires(distribution(name).metadata["Name"]) or []:
            other = Requirement(text)
            if other.marker is None or any(other.marker.evaluate({"extra": e, "python_version": "3.12"}) for e in extras):
                todo.append(replace_marker(other))
    return found - {"nnunetv2-e2enet"}


def replace_marker(requirement: Requirement) -> Requirement:
    requirement.marker = None
    return requirement


def pip(name: str, wheels: Path) -> None:
    """A wheel for Python 3.12 of the version that is installed here; built here where only its source is distributed."""
    wanted = f"{name}=={version(name)}"
    common = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    platforms = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    binary = ["--only-binary=:all:", "--python-version", "3.12", *(f"--platform={p}" for p in platforms)]
    download = [sys.executable, "-m", "pip", "download", *common, *binary, "-d", str(wheels), wanted]
    if subprocess.run(download, check=False, capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "pip", "wheel", *common, "-w", str(wheels), wanted], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="prepare a folder for the machine with the GPU")
    parser.add_argument("--stage", type=int, choices=range(1, len(STAGES) + 1))
    parser.add_argument("--time", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("session"), help="of the records")
    parser.add_argument("--preprocessed", type=Path, help="nnUNet_preprocessed; for --bundle, the data set's folder in it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args(arguments)
    if given.bundle is not None:
        if given.preprocessed is None:
            parser.error("--bundle needs --preprocessed")
        bundle(given.bundle, given.preprocessed.resolve())
        return
    contestants.check_device(given.device)
    if given.time is not None:
        print(json.dumps(timed_step(STEPS[given.time], given.device)))
        return
    if given.stage is None:
        parser.error("say --bundle or --stage")
    given.folder = given.folder.resolve()
    given.preprocessed = (given.preprocessed or REPOSITORY.parent / "nnUNet_preprocessed").resolve()
    run_stage(given.stage, given)


if __name__ == "__main__":
    main()
