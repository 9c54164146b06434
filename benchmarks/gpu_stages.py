"""The stages of benchmarks/gpu_session.py: what is measured, and how. Each measurement has a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import contestants
import gpu_training
import torch
from plans import PLANS, TINY
from training_memory import ACTIVE, STOCK, Candidate

from nnunetv2_e2enet.network._raw_map import RawMap
from nnunetv2_e2enet.network.acceleration import KERNELS, convolutions_for, prepare_kernels
from nnunetv2_e2enet.network.convolution import over_slices
from nnunetv2_e2enet.network.depth_shift import depth_shift
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST
from nnunetv2_e2enet.network.recomputation import RECOMPUTE
from nnunetv2_e2enet.network.sparse_convolution import sparse_convolution
from nnunetv2_e2enet.settings import variable

REPOSITORY = Path(__file__).resolve().parents[1]
FEW = ("nnU-Net", "E2ENet 0.8", "E2ENet 0.8, channels last", "E2ENet 0.8, blocks of 16")
TRAINED = ("nnU-Net", "E2ENet 0.8", "E2ENet 0.9")
TESTS = ("test_kernels.py", "test_sparse_convolution.py", "test_memory_format.py", "test_compile.py")
"""Those that look at other programs where there is CUDA."""
QUEUED = 20
WAIT_CYCLES = 50_000_000  # of the device, some 30 ms, in which the host queues that many calls
MOST_CYCLES = 32 * WAIT_CYCLES  # for a slow host
ENOUGH_TO_END = 20  # seconds before the end of a measurement's time, in which no round is begun
RECORD, ERROR, PARTIAL = ".json", ".error.json", ".partial"
"""How files of a measurement end: its result; why it failed; what it has found so far."""


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

    def file(self, key: str, ending: str) -> Path:
        """Of a measurement; names have no spaces and commas, so that any tool can copy the files."""
        return self.folder / (re.sub(r"[^\w.]+", "-", key) + ending)


@dataclass(frozen=True)
class Measurement:
    """Something to measure, in a process of its own: a network that is compiled there is the only one.

    Attributes:
        run: returns what goes into the record; raises Unfinished if it shall be called again.
        environment: of the process.
        least_seconds: it is not begun with less time than that, in which it would not end.
    """

    run: Callable[[Session], Any]
    environment: dict[str, str] = field(default_factory=dict)
    least_seconds: float = 60


@dataclass(frozen=True)
class Step:
    """A training step to time: a network of ``training_memory``, how it is run, and its settings."""

    kind: str
    compiled: bool = True
    channels_last: bool = False
    kernels: str = "auto"
    plane_convolutions: str = "off"

    @property
    def function(self) -> str:
        """What the network computes, which recomputation does not change."""
        return "E2ENet" if self.kind in RECOMPUTE else self.kind

    @property
    def name(self) -> str:
        parts = ["compiled" if self.compiled else "eager", *["channels last"] * self.channels_last]
        parts += [f"kernels {self.kernels}"] * (self.kernels != "auto")
        parts += ["plane convolutions"] * (self.plane_convolutions == "on")
        return ", ".join([self.kind, *parts])

    def measurement(self) -> Measurement:
        settings = {"kernels": self.kernels, "plane_convolutions": self.plane_convolutions}
        environment = {variable(name): value for name, value in settings.items()}
        return Measurement(partial(timed_step, self), environment, least_seconds=150 if self.compiled else 60)


EAGER = [Step(STOCK, compiled=False), Step("blocks", compiled=False)]
STEPS = [
    Step(STOCK), *EAGER, Step("blocks"), Step(ACTIVE, channels_last=True), Step("blocks", channels_last=True),
    Step("blocks", kernels="off"), Step(STOCK, channels_last=True), Step(ACTIVE),
    Step("blocks", channels_last=True, plane_convolutions="on"), Step("none"), Step("blocks", compiled=False, kernels="off"),
]  # fmt: skip
"""The most important ones first; and what no compiler can spoil before networks of ours that are compiled."""


def has_kernels() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels_on(session: Session) -> dict[str, str]:
    """Of the environment of a measurement that needs the kernels, on a CPU those of Triton's interpreter."""
    return {variable("kernels"): "on" if has_kernels() else "off", **({"TRITON_INTERPRET": "1"} if session.tiny else {})}


def stage_tests(session: Session) -> dict[str, Measurement]:
    check = {"1 check of the kernels": Measurement(agreement, kernels_on(session), least_seconds=120)} if has_kernels() else {}
    return check | {f"1 {file}": Measurement(partial(passed, file), least_seconds=180) for file in TESTS}


def agreement(session: Session) -> dict[str, float]:
    """Seconds that each check takes before the kernels are used, most of them for compiling.

    Raises:
        SystemExit: a kernel fails, or differs from PyTorch.
    """
    from nnunetv2_e2enet import kernels  # which need Triton

    seconds, wrong = {}, []
    for check, what in KERNELS.items():
        begin = time.perf_counter()
        try:
            name = getattr(kernels, check)(torch.device(session.device))
        except Exception:  # noqa: BLE001 (the other check shall be asked as well)
            traceback.print_exc()
            name = f"one of the {what}"
        seconds[what] = time.perf_counter() - begin
        print(f"{what}: {seconds[what]:.0f} s", flush=True)
        wrong += [] if name is None else [name]
    if wrong:
        raise SystemExit(f"not as PyTorch: {', '.join(wrong)}")
    return seconds


def passed(file: str, session: Session) -> dict[str, Any]:
    """Of the installed package, from another folder than the repository. On a CPU the programs run in Triton's interpreter.

    Raises:
        SystemExit: a test failed, or the tests could not be run; they are run again by the next call.
    """
    where = ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(REPOSITORY / "tests" / file), "-q", *where]
    done = subprocess.run(command, cwd=session.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr[-1000:]}\n{done.stdout[-3000:]}".rstrip())
    return {"passed": True, "end": done.stdout[-3000:]}


def stage_steps(_: Session) -> dict[str, Measurement]:
    return {f"2 {step.name}": step.measurement() for step in STEPS}


def timed_step(step: Step, session: Session) -> dict[str, Any]:
    """Milliseconds of training steps, 3 x 30 of them or as many as there is time for, and the bytes allocated at the peak.

    And the loss of the first step, the norm of its gradient, and the loss scale after the last one, which are nearly the same
    for all steps of one function. What has been timed is kept where a later round fails.
    """
    device, tiny = session.device, session.tiny
    deadline = time.monotonic() + session.seconds - ENOUGH_TO_END
    output = session.file(f"2 {step.name}", PARTIAL)
    output.unlink(missing_ok=True)  # of a process that was stopped
    found = contestants.Record(output, {"what": step.name})
    contestants.as_nnunet_trains(device)
    torch.manual_seed(0)
    plan, rounds, steps = ("tiny", 1, 2) if tiny else ("AMOS", 3, 30)
    candidate = Candidate(step.kind, plan, (PLANS | TINY)[plan].patch, 16)
    network: Any = candidate.build().to(device)
    x = torch.randn(candidate.input_shape(1 if tiny else 2), device=device)
    if step.channels_last:
        network = network.to(memory_format=CHANNELS_LAST[x.dim() - 2])
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    scaler = torch.amp.GradScaler(device, enabled=not tiny)
    run = torch.compile(network, backend="eager" if tiny else "inductor", fullgraph=True) if step.compiled else network

    def once() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, enabled=not tiny):
            loss = sum((output.float().square().mean() for output in run(x)), x.new_zeros(()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # which takes the scale out of the gradients
        scaler.update()
        return loss.detach()

    begin = time.perf_counter()
    loss = once()
    synchronize(device)
    found.add("first_step_seconds", time.perf_counter() - begin)
    found.add("without_kernels", contestants.without_kernels(network))
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    found.add("function", step.function)
    found.add("first_loss", loss.item())
    found.add("gradient_norm", torch.stack(norms).norm().item())
    for _ in range(0 if tiny else 5):
        once()
    synchronize(device)
    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    milliseconds: list[float] = []
    for _ in range(rounds):
        if milliseconds and time.monotonic() > deadline:
            break
        begin = time.perf_counter()
        for _ in range(steps):
            once()
        synchronize(device)
        milliseconds.append(1e3 * (time.perf_counter() - begin) / steps)
        found.add("milliseconds", milliseconds)
        if not tiny:
            found.add("peak_bytes", torch.cuda.max_memory_allocated())
    found.add("loss_scale", scaler.get_scale())
    return found.results


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def stage_prediction(_: Session) -> dict[str, Measurement]:
    least_seconds = {"patch": 60, "patch, compiled": 180, "volume": 90}
    return {f"3 {way}": Measurement(partial(predicted, way), least_seconds=least) for way, least in least_seconds.items()}


def predicted(way: str, session: Session) -> Any:
    output = session.file(f"3 {way}", PARTIAL)  # with the rounds of a command that is stopped
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
    return json.loads(output.read_text())["results"]


def stage_convolutions(session: Session) -> dict[str, Measurement]:
    """The second convolution of a level of the AMOS plan, forward and backward: in 3D, over slices, of active blocks alone.

    On the coarsest level a few programs have all the work of the gradient of its maps. Convolutions of active blocks are timed
    in three ways: on a map as it is, after a pass for norm, activation and shift, and with these three in their own programs.
    """
    levels = [(48, (64, 160, 160)), (320, (4, 5, 5)), (320, (16, 20, 20)), (96, (64, 80, 80)), (192, (32, 40, 40))]
    keys = {f"4 {channels} maps of {' x '.join(map(str, size))}": (channels, size) for channels, size in levels}
    return {
        key: Measurement(partial(timed_convolutions, key, *level), kernels_on(session), least_seconds=90)
        for key, level in keys.items()
    }


def timed_convolutions(key: str, channels: int, size: tuple[int, ...], session: Session) -> dict[str, Any]:
    """What has been timed is kept where a later way fails, and is not timed again."""
    device = torch.device(session.device)
    contestants.as_nnunet_trains(session.device)
    if has_kernels():
        prepare_kernels(device, convolutions=True)  # as a network does when it is made
    if session.tiny:
        channels, size = 16, (2, 4, 4)
    dtype = torch.float32 if session.tiny else torch.float16
    found = contestants.Record(session.file(key, PARTIAL), {"what": key})
    ways: dict[str, Callable[[], object]] = {}
    for last in (False, True):
        ways |= ways_to_convolve(channels, size, device, dtype, last)
    for name in sorted(ways, key=lambda name: "sparse" in name):  # our programs last
        if name not in found.results:
            found.add(name, milliseconds_of(ways[name], session.device))
    return found.results


def ways_to_convolve(
    channels: int, size: tuple[int, ...], device: torch.device, dtype: torch.dtype, last: bool
) -> dict[str, Callable[[], object]]:
    """By name; of maps whose channels come last in memory or not."""
    form = torch.channels_last_3d if last else torch.contiguous_format
    x, dense = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=form).requires_grad_()
        for shape in ((2, channels, *size), (channels, channels, 1, 3, 3))
    )
    grad = torch.randn_like(x)
    one = (1, 1, 1)

    def there_and_back(convolve: Callable[[], torch.Tensor], weight: torch.Tensor) -> object:
        return torch.autograd.grad(convolve(), (x, weight), grad)

    conv3d = partial(torch.nn.functional.conv3d, x, dense, padding=(0, 1, 1))
    ways: dict[str, Callable[[], object]] = {"conv3d": partial(there_and_back, conv3d, dense)}
    if last:
        planes = partial(over_slices, x, dense, None, one, (0, 1, 1), one, 1)
        ways["over slices"] = partial(there_and_back, planes, dense)
    kernels = convolutions_for(x)
    if kernels is not None:
        per_block = round(0.2 * channels)
        inputs = torch.stack([torch.randperm(channels)[:per_block].sort().values for _ in range(channels // 16)]).to(device)
        active = torch.randn(channels, per_block, 1, 3, 3, device=device, dtype=dtype, requires_grad=True)
        scale, offset = torch.rand(2, channels, 1, 1, 1, device=device), torch.rand(2, channels, 1, 1, 1, device=device)
        raw, layer = RawMap(x, scale, offset, 0.01), (active, None, inputs, one)

        def joined_first() -> torch.Tensor:
            return sparse_convolution([depth_shift(raw, 3)], 1, *layer)

        plain: tuple[Any, ...] = ([x], [None], 1)
        ways |= {
            "sparse blocks": partial(there_and_back, partial(sparse_convolution, [x], 1, *layer), active),
            "sparse blocks, forward": partial(kernels.convolve, *plain, active, inputs, one),
            "sparse blocks, gradient of maps": partial(kernels.input_gradient, grad, active, inputs, [x], 1, one),
            "sparse blocks, gradient of weights": partial(kernels.weight_gradient, grad, *plain, inputs, (1, 3, 3), one),
            "sparse blocks after norm and shift": partial(there_and_back, joined_first, active),
            "sparse blocks with norm and shift": partial(
                there_and_back, partial(sparse_convolution, [raw], 3, *layer), active
            ),
        }
    return {name + ", channels last" * last: way for name, way in ways.items()}


def milliseconds_of(once: Callable[[], object], device: str) -> dict[str, list[float]]:
    """Of a call, when it is warm: "wall", from the call to its end, and on a GPU "device", without the host's time."""
    on_gpu = device == "cuda"
    for _ in range(3 if on_gpu else 1):
        once()
    synchronize(device)
    wall = []
    for _ in range(20 if on_gpu else 1):
        begin = time.perf_counter()
        once()
        synchronize(device)
        wall.append(1e3 * (time.perf_counter() - begin))
    return {"wall": wall, **({"device": [queued_milliseconds(once) for _ in range(5)]} if on_gpu else {})}


def queued_milliseconds(once: Callable[[], object], cycles: int = WAIT_CYCLES) -> float:
    """The device's time for a call, of QUEUED ones that have all been queued before the first begins.

    Where the host needs longer for that, the device waits longer.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    for _ in range(QUEUED):
        once()
    too_early = begin.query()
    end.record()
    torch.cuda.synchronize()
    if too_early and cycles < MOST_CYCLES:
        return queued_milliseconds(once, 2 * cycles)
    return begin.elapsed_time(end) / QUEUED


def stage_profile(session: Session) -> dict[str, Measurement]:
    names = FEW[:2] if session.tiny else FEW
    return {f"5 {name}": Measurement(partial(profiled, name), least_seconds=150) for name in names}


def profiled(contestant: str, session: Session) -> Any:
    os.environ["nnUNet_preprocessed"] = str(session.preprocessed)
    tiny = session.tiny
    settings = gpu_training.Settings(
        *("4", "3d_fullres", "nnUNetPlans", "tiny" if tiny else "amos", 1, 1 if tiny else 10, 1, session.device)
    )
    result = gpu_training.measure(contestant, settings, loading=False, profile=True)
    return {name: result[name] for name in ("profile", "without_kernels")}


def stage_trainings(session: Session) -> dict[str, Measurement]:
    """All at once, each of one contestant in a folder of its own; each call of the stage goes on where the last one ended."""
    names = TRAINED[:2] if session.tiny else TRAINED
    workers = (os.cpu_count() or 1) // len(names)
    environment = {"nnUNet_n_proc_DA": str(0 if session.tiny else workers), "nnUNet_def_n_proc": str(max(1, workers))}
    return {f"6 {name}": Measurement(partial(trained, name), environment, least_seconds=180) for name in names}


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
        command += ["--epochs", "20", "--iterations", "100", "--validation-iterations", "10"]
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


def by_value(session: Session) -> list[str]:
    """Names of the measurements of all stages but the trainings, in the order in which their answers are worth most."""
    tests, steps, prediction, convolutions, profile, _ = (list(stage(session)) for stage in STAGES)
    before = 1 + len(EAGER)  # networks of ours are compiled
    first = [*tests[: -len(TESTS)], *steps[:before], prediction[0], convolutions[0], *steps[before : before + 3]]
    first += [convolutions[1], *steps[before + 3 : before + 5], prediction[1], *profile[:2]]
    return list(dict.fromkeys([*first, *steps, *prediction, *convolutions, *tests, *profile]))
