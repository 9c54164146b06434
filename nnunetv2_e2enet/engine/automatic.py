"""The engine behind ``E2ENet.forward``: when it steps in, and plans that follow the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnunetv2_e2enet.engine.core import Core, load_core
from nnunetv2_e2enet.engine.description import NotSupportedError, check_classes, check_hooks, describe, form
from nnunetv2_e2enet.engine.fingerprint import Fingerprint, state
from nnunetv2_e2enet.engine.halves import within_halves
from nnunetv2_e2enet.engine.layout import pages
from nnunetv2_e2enet.engine.program import Program
from nnunetv2_e2enet.engine.weights import PackedWeights, pack
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.e2enet import E2ENet
from nnunetv2_e2enet.settings import settings, variable


class HoldsMemory(Protocol):
    """The engine's side of one network, for one kind of work."""

    def make_room(self) -> None:
        """Free what this kind of work will make anew anyway after another kind, or what is cheap to make."""


T = TypeVar("T", bound=HoldsMemory)
ENGINE_VARIABLE = variable("engine")
# Multiply-accumulates of the dense network a patch; below, in mode "auto", there is little to save
LEAST_WORK = 2e9
LEAST_TRAINING_WORK = 2e8
KEPT_BY_MALLOC = 32 << 20  # bytes, in glibc
TOLERANCES = {"float32": 1e-3, "float16": 2e-2}  # of the largest logit, in mode "check", by how maps are stored
IDLE_PROGRAMS = 2  # kept for the next patch; more are made while more threads predict at once
IDLE_BYTES = 1 << 30  # of all that are kept but the last used one

_local = threading.local()


@contextmanager
def disabled() -> Iterator[None]:
    """A context in which the networks of this thread predict and train through PyTorch."""
    before = getattr(_local, "disabled", False)
    _local.disabled = True
    try:
        yield
    finally:
        _local.disabled = before


def is_disabled() -> bool:
    """Whether this is within ``disabled()``."""
    return getattr(_local, "disabled", False)


@dataclass
class Plan:
    """One state of the weights, ready to run.

    Attributes:
        fingerprint: of all tensors that the weights were packed from.
        form: everything else that they were packed from.
        idle: programs that no thread is running, the last used at the end.
        checked: whether it was compared with PyTorch.
    """

    fingerprint: Fingerprint
    form: list[object]
    weights: PackedWeights
    core: Core
    idle: list[Program] = field(default_factory=list)
    checked: bool = False


class Session:
    """The engine's side of one network."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._plan: Plan | None = None

    def plan(self, network: E2ENet, core: Core) -> Plan:
        """The plan for the present weights, packed anew if they are others than last time.

        Raises:
            NotSupportedError: the network has to stay with PyTorch.
        """
        with self._lock:
            check_hooks(network)
            tensors, present = state(network), form(network)
            plan = self._plan if self._plan is not None and (self._plan.core, self._plan.form) == (core, present) else None
            if plan is not None and plan.fingerprint.holds(tensors, core):
                return plan
            fingerprint = Fingerprint.take(tensors, core)
            if plan is not None and plan.fingerprint.same_content(fingerprint):
                plan.fingerprint = fingerprint
                return plan
            self._plan = plan = None  # free its memory first
            description = describe(network)
            if core.storage == "float16":
                description = within_halves(description)
            self._plan = Plan(fingerprint, present, pack(description, core.has_tiles), core)
            return self._plan

    def take_program(self, plan: Plan, patch_size: tuple[int, ...]) -> Program:
        """A program for patches of this size that no thread uses; a new one if none is idle."""
        with self._lock:
            for index, program in enumerate(plan.idle):
                if program.patch_size == patch_size:
                    return plan.idle.pop(index)
            _drop_idle(plan.idle, IDLE_PROGRAMS - 1, 0)
        return Program(plan.weights, patch_size, plan.core)

    def give_back(self, plan: Plan, program: Program) -> None:
        """Keep a program for the next patch, if the weights are still those of its plan."""
        with self._lock:
            if plan is self._plan:
                plan.idle.append(program)
                _drop_idle(plan.idle, IDLE_PROGRAMS, 1)

    def idle_programs(self) -> list[Program]:
        """Programs that no thread uses."""
        with self._lock:
            return [] if self._plan is None else list(self._plan.idle)

    def make_room(self) -> None:
        """Free packed weights and programs: a training changes the weights."""
        self.release()

    def release(self) -> None:
        """Free packed weights and programs."""
        with self._lock:
            self._plan = None


def _drop_idle(idle: list[Program], most: int, always: int) -> None:
    """Drops those used longest ago until ``most`` are left, which take ``IDLE_BYTES`` beside the ``always`` last ones."""
    while len(idle) > most or sum(program.n_bytes for program in idle[: len(idle) - always]) > IDLE_BYTES:
        del idle[0]


class OfEachNetwork(Generic[T]):
    """Sessions of one kind, prediction or training, each of which lives as long as its network.

    Args:
        make: makes the session of a network that has none.
    """

    _kinds: ClassVar[list[OfEachNetwork[Any]]] = []

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._objects: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()
        self._kinds.append(self)

    def of(self, network: nn.Module) -> T:
        """The session of a network, made now if there is none."""
        with self._lock:
            return self._objects.setdefault(network, self._make())

    def alone(self, network: nn.Module) -> T:
        """The same, which is about to be used. Other kinds make room: a network trains or is validated."""
        for kind in self._kinds:
            if kind is not self and network in kind._objects:
                kind.of(network).make_room()
        return self.of(network)


sessions = OfEachNetwork(Session)
session_of = sessions.of


def why_not(network: E2ENet, x: Tensor) -> str | None:
    """Why this input stays with PyTorch; None if the engine takes it. Says nothing about the weights."""
    if settings().engine == "off":
        return f"the engine is switched off ({ENGINE_VARIABLE})"
    if type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided:
        return "the input is not an ordinary tensor on the CPU"
    if x.dtype != torch.float32:
        return f"the input is {x.dtype}, not float32"
    if torch.is_autocast_cpu_enabled():
        return "autocast is on"
    try:
        check_classes(network)
    except NotSupportedError as reason:
        return str(reason)
    if x.dim() != network.dimension + 2 or x.shape[1] != network.input_channels or x.numel() == 0:
        return "the input has not the shape that the network expects"
    size = list(x.shape[2:])
    for stride in network.encoder.strides:
        if any(s % t for s, t in zip(size, stride, strict=True)):
            return "the input is not divisible by the strides of the network"
        size = [s // t for s, t in zip(size, stride, strict=True)]
        if all(s == 1 for s in size):
            return "a level has one voxel, for which instance norm is not defined"
    least = LEAST_TRAINING_WORK if network.training else LEAST_WORK
    if settings().engine == "auto" and _work(network, list(x.shape[2:])) < least:
        return f"the network is small, a patch takes PyTorch little time ({ENGINE_VARIABLE}=on uses the engine all the same)"
    return None


def _work(network: E2ENet, size: list[int]) -> float:
    """About the multiply-accumulates of the dense network for one patch."""
    voxels = []
    for stride in network.encoder.strides:
        size = [s // t for s, t in zip(size, stride, strict=True)]
        voxels.append(prod(size))
    levels = [*enumerate(network.encoder.stages)]
    levels += [pair for nodes in network.decoder.stages for pair in enumerate(nodes.children())]
    return float(sum(voxels[level] * p.numel() for level, module in levels for p in module.parameters()))


def why_not_predicted(network: E2ENet, input_shape: Sequence[int]) -> str | None:
    """Why a float32 input of this shape on the CPU would stay with PyTorch; None if the engine takes it."""
    core = load_core()
    x = torch.empty(tuple(input_shape), dtype=torch.float32, device="cpu")
    reason = core if isinstance(core, str) else why_not(network, x)
    return reason or why_not_described(network)


def why_not_described(network: E2ENet) -> str | None:
    """Why a part of the network is none that the engine has; None if it has all."""
    try:
        describe(network)
    except NotSupportedError as reason:
        return str(reason)
    return None


def bytes_to_take(network: E2ENet, input_shape: Sequence[int]) -> int:
    """Memory that the next patch of this shape takes for feature maps; 0 where PyTorch computes, or where it is held already.

    The weights are packed, and the memory is reserved, which takes none yet.
    """
    core = load_core()
    if isinstance(core, str) or why_not_predicted(network, input_shape) is not None:
        return 0
    session, patch_size = session_of(network), tuple(input_shape[2:])
    try:
        plan = session.plan(network, core)
    except NotSupportedError:
        return 0
    if any(program.patch_size == patch_size for program in session.idle_programs()):
        return 0
    program = session.take_program(plan, patch_size)
    session.give_back(plan, program)
    return program.n_bytes


def accelerate(network: E2ENet, x: Tensor) -> Tensor | list[Tensor] | None:
    """The logits of ``network(x)``, or None where PyTorch has to compute them.

    The caller made sure that nothing is trained, traced or differentiated. ``status`` says why None was returned.

    Raises:
        E2ENetError: a setting cannot be used, or mode "check" found a difference.
    """
    if is_disabled():
        return None
    session = sessions.alone(network)
    session.reason = why_not(network, x)
    if session.reason is not None:
        return None
    core = load_core()
    if isinstance(core, str):
        session.reason = core
        return None
    try:
        plan = session.plan(network, core)
    except NotSupportedError as reason:
        session.reason = str(reason)
        return None
    logits = _run(session, plan, network, x)
    if settings().engine == "check" and not plan.checked:
        _check(network, x, logits, TOLERANCES[core.storage])
        plan.checked = True
    return logits if network.decoder.deep_supervision else logits[0]


def _run(session: Session, plan: Plan, network: E2ENet, x: Tensor) -> list[Tensor]:
    heads = plan.weights.heads if network.decoder.deep_supervision else plan.weights.heads[:1]
    size = list(x.shape[2:])
    logits = []
    for (_, _, classes), stride in zip(heads, network.encoder.strides, strict=False):
        size = [s // t for s, t in zip(size, stride, strict=True)]
        logits.append(_empty((x.shape[0], classes, *size)))
    program = session.take_program(plan, tuple(x.shape[2:]))
    samples = x.contiguous()
    for n in range(x.shape[0]):
        program.run(samples[n], [level[n] for level in logits], torch.get_num_threads())
    session.give_back(plan, program)
    return logits


def _empty(shape: Sequence[int]) -> Tensor:
    """Room for logits. Malloc gives large ones back to the system each time, and the first touch of small pages takes long."""
    if 4 * prod(shape) <= KEPT_BY_MALLOC:
        return torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    return torch.from_numpy(pages(prod(shape))).view(tuple(shape))


def _check(network: E2ENet, x: Tensor, logits: list[Tensor], tolerance: float) -> None:
    with disabled():
        expected = network(x)
    expected = expected if isinstance(expected, list) else [expected]
    for level, (ours, theirs) in enumerate(zip(logits, expected, strict=True)):
        difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        if not difference <= tolerance * largest:
            raise E2ENetError(
                f"the engine's logits of level {level} differ from PyTorch's by {difference:.3g}, the largest logit is "
                f"{largest:.3g}: set {ENGINE_VARIABLE}=off and report this with the output of `e2enet info`"
            )
