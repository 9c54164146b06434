"""The stages of benchmarks/gpu_session.py: what is measured, and how. Each measurement has a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import contestants
import gpu_training
import torch
from training_memory import ACTIVE, PLANS, STOCK, TINY, Candidate

from nnunetv2_e2enet.network.convolution import over_slices
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST
from nnunetv2_e2enet.network.sparse_convolution import sparse_convolution
from nnunetv2_e2enet.settings import variable

REPOSITORY = Path(__file__).resolve().parents[1]
FEW = ("nnU-Net", "E2ENet 0.8", "E2ENet 0.8, channels last", "E2ENet 0.8, blocks of 16")
TRAINED = ("nnU-Net", "E2ENet 0.8", "E2ENet 0.9")


class Unfinished(Exception):  # noqa: N818 (nothing went wrong)
    """The rest is for the next call."""


@dataclass(frozen=True)
class Session:
    """What stages are told.

    Attributes:
        device: "cuda", or "cpu" for small networks that try the program.
        folder: of the records.
        preprocessed: nnUNet_preprocessed.
        seconds: that a measurement has.
    """

    device: str
    folder: Path
    preprocessed: Path
    seconds: float

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Measurement:
    """Something to measure, in a process of its own: a network that is compiled there is the only one.

    Attributes:
        run: returns what goes into the record; raises Unfinished if it shall be called again.
        environment: of the process.
    """

    run: Callable[[Session], Any]
    environment: dict[str, str] = field(default_factory=dict)


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

    def measurement(self) -> Measurement:
        settings = {"kernels": self.kernels, "plane_convolutions": self.plane_convolutions}
        return Measurement(partial(timed_step, self), {variable(name): value for name, value in settings.items()})


STEPS = [
    Step(STOCK), Step("blocks"), Step("blocks", channels_last=True), Step("blocks", kernels="off"),
    Step(ACTIVE, channels_last=True), Step("blocks", channels_last=True, plane_convolutions="on"),
    Step(STOCK, channels_last=True), Step("blocks", compiled=False), Step("none"), Step(ACTIVE),
    Step(STOCK, compiled=False), Step("blocks", compiled=False, kernels="off"),
]  # fmt: skip


def stage_tests(_: Session) -> dict[str, Measurement]:
    tests = ("test_kernels.py", "test_sparse_convolution.py")
    return {f"1 {file}": Measurement(partial(passed, file)) for file in tests}


def passed(file: str, session: Session) -> dict[str, Any]:
    """Of the installed package, from another folder than the repository. On a CPU the programs run in Triton's interpreter.

    Raises:
        RuntimeError: the tests could not be run.
    """
    where = ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(REPOSITORY / "tests" / file), "-q", *where]
    done = subprocess.run(command, cwd=session.folder, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {"passed": done.returncode == 0, "end": done.stdout[-3000:]}


def stage_steps(_: Session) -> dict[str, Measurement]:
    return {f"2 {step.name}": step.measurement() for step in STEPS}


def timed_step(step: Step, session: Session) -> dict[str, Any]:
    """Milliseconds of training steps, 3 x 30 of them, and the bytes allocated at the peak."""
    device, tiny = session.device, session.tiny
    contestants.as_nnunet_trains(device)
    plan, rounds, steps = ("tiny", 1, 2) if tiny else ("AMOS", 3, 30)
    candidate = Candidate(step.kind, plan, (PLANS | TINY)[plan][1], 16)
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

    begin = time.perf_counter()
    once()
    synchronize(device)
    first = time.perf_counter() - begin
    for _ in range(0 if tiny else 5):
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
    return {"milliseconds": [1e3 * s for s in seconds], "first_step_seconds": first, **peak}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def stage_prediction(_: Session) -> dict[str, Measurement]:
    return {f"3 {way}": Measurement(partial(predicted, way)) for way in ("patch", "patch, compiled", "volume")}


def predicted(way: str, session: Session) -> Any:
    output = session.folder / "prediction.json"
    output.unlink(missing_ok=True)
    names = FEW[:2] if session.tiny else FEW if way != "patch" else tuple(contestants.timed())
    size = (20, 20, 20) if session.tiny else (128, 320, 320)
    options = {"patch": [], "patch, compiled": ["--compile"], "volume": ["--volume", *map(str, size)]}[way]
    rounds = "2" if session.tiny else "3" if way == "volume" else "20"
    command = [sys.executable, "benchmarks/gpu_inference.py", "-d", "4", "--device", session.device, "--output", str(output)]
    command += ["--plan", "tiny" if session.tiny else "amos", "--contestants", *names, "--rounds", rounds, *options]
    environment = {**os.environ, "nnUNet_preprocessed": str(session.preprocessed)}
    environment |= {"TORCH_COMPILE_DISABLE": "1"} if session.tiny else {}  # a compiler need not be there
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    result = json.loads(output.read_text())
    output.unlink()
    return result


def stage_convolutions(_: Session) -> dict[str, Measurement]:
    """The second convolution of a level of the AMOS plan, forward and backward: in 3D, over slices, of active blocks alone."""
    levels = [(48, (64, 160, 160)), (96, (64, 80, 80)), (192, (32, 40, 40)), (320, (16, 20, 20))]
    return {f"4 {channels} maps": Measurement(partial(timed_convolutions, channels, size)) for channels, size in levels}


def timed_convolutions(channels: int, size: tuple[int, ...], session: Session) -> dict[str, Any]:
    device = session.device
    contestants.as_nnunet_trains(device)
    if session.tiny:
        size = (2, 6, 6)
    dtype = torch.float32 if session.tiny else torch.float16
    per_block = round(0.2 * channels)
    inputs = torch.stack([torch.randperm(channels)[:per_block].sort().values for _ in range(channels // 16)]).to(device)
    result: dict[str, Any] = {}
    for last in (False, True):
        form = torch.channels_last_3d if last else torch.contiguous_format
        x, dense = (
            torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=form).requires_grad_()
            for shape in ((2, channels, *size), (channels, channels, 1, 3, 3))
        )
        active = torch.randn(channels, per_block, 1, 3, 3, device=device, dtype=dtype, requires_grad=True)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "conv3d": lambda x=x, w=dense: torch.nn.functional.conv3d(x, w, padding=(0, 1, 1)),
        }
        if not session.tiny:  # where there are no kernels but the interpreter's
            ways["sparse blocks"] = lambda x=x, w=active: sparse_convolution(x, w, None, inputs, (1, 1, 1))
        if last:
            ways["over slices"] = lambda x=x, w=dense: over_slices(x, w, None, (1, 1, 1), (0, 1, 1), (1, 1, 1), 1)
        for name, way in ways.items():
            result[f"{name}{', channels last' * last}"] = milliseconds(way, device)
    return result


def milliseconds(way: Callable[[], torch.Tensor], device: str) -> list[float]:
    values = []
    for _ in range(20 if device == "cuda" else 2):
        begin = time.perf_counter()
        out = way()
        out.backward(torch.ones_like(out))
        synchronize(device)
        values.append(1e3 * (time.perf_counter() - begin))
    return values[1:]


def stage_profile(session: Session) -> dict[str, Measurement]:
    names = FEW[:2] if session.tiny else FEW
    return {f"5 {name}": Measurement(partial(profiled, name)) for name in names}


def profiled(contestant: str, session: Session) -> Any:
    os.environ["nnUNet_preprocessed"] = str(session.preprocessed)
    tiny = session.tiny
    settings = gpu_training.Settings(
        *("4", "3d_fullres", "nnUNetPlans", "tiny" if tiny else "amos", 1, 1 if tiny else 10, 1, session.device)
    )
    return gpu_training.measure(contestant, settings, loading=False, profile=True)["profile"]


def stage_trainings(session: Session) -> dict[str, Measurement]:
    """All at once, each of one contestant in a folder of its own; each call of the stage goes on where the last one ended."""
    names = TRAINED[:2] if session.tiny else TRAINED
    workers = (os.cpu_count() or 1) // len(names)
    environment = {"nnUNet_n_proc_DA": str(0 if session.tiny else workers), "nnUNet_def_n_proc": str(max(1, workers))}
    return {f"6 {name}": Measurement(partial(trained, name), environment) for name in names}


def trained(contestant: str, session: Session) -> Any:
    """Raises Unfinished until the training and its validation are at their end."""
    folder = session.folder / "hippocampus" / contestant.replace(" ", "_")
    (folder / "nnUNet_raw").mkdir(parents=True, exist_ok=True)
    if not (folder / "nnUNet_preprocessed").exists():
        (folder / "nnUNet_preprocessed").symlink_to(session.preprocessed)
    command = [sys.executable, "benchmarks/hippocampus.py", "--folder", str(folder), "--contestants", contestant]
    command += ["--folds", "0", "--device", session.device]
    command += ["--minutes", str(0 if session.tiny else (session.seconds - 90) / 60)]  # 90 s for an epoch and the validation
    if session.tiny:
        command += [
            "--epochs",
            "2",
            "--iterations",
            "1",
            "--validation-iterations",
            "1",
            "--batch-size",
            "2",
            "--width",
            "0.17",
        ]
    else:
        command += ["--epochs", "100"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    results = (
        json.loads((folder / "hippocampus.json").read_text())["results"] if (folder / "hippocampus.json").is_file() else {}
    )
    if not results:
        raise Unfinished(f"{contestant} trains on when the stage is called again")
    return results


STAGES = (stage_tests, stage_steps, stage_prediction, stage_convolutions, stage_profile, stage_trainings)
AT_ONCE = (stage_trainings,)
"""Stages whose measurements run beside each other."""
