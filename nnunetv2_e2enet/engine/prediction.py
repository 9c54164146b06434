"""The engine behind ``E2ENet.forward`` in prediction: plans that follow the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from nnunetv2_e2enet.engine.core import Core
from nnunetv2_e2enet.engine.description import NotSupportedError, check_hooks, check_modules, describe, form
from nnunetv2_e2enet.engine.fingerprint import Fingerprint, state
from nnunetv2_e2enet.engine.layout import pages
from nnunetv2_e2enet.engine.program import Program
from nnunetv2_e2enet.engine.sessions import OfEachNetwork, Session, disabled, is_disabled
from nnunetv2_e2enet.engine.support import ENGINE_VARIABLE, check_support, loaded, why_not
from nnunetv2_e2enet.engine.units import in_units
from nnunetv2_e2enet.engine.weights import PackedWeights, pack
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.e2enet import E2ENet
from nnunetv2_e2enet.settings import settings

KEPT_BY_MALLOC = 32 << 20  # bytes, in glibc
TOLERANCES = {"float32": 1e-3, "float16": 2e-2}  # of the largest logit, in mode "check", by how maps are stored
IDLE_PROGRAMS = 2  # kept for the next patch; more are made while more threads predict at once
IDLE_BYTES = 1 << 30  # of all that are kept but the last used one


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


class PredictionSession(Session):
    """The engine's side of one network in prediction."""

    def __init__(self) -> None:
        super().__init__()
        self._plan: Plan | None = None

    def plan(self, network: E2ENet, core: Core) -> Plan:
        """The plan for the present weights, packed anew if they are others than last time.

        Raises:
            NotSupportedError: the network has to stay with PyTorch.
        """
        with self.lock:
            check_hooks(network)
            tensors, present = state(network), form(network)
            plan = self._plan if self._plan is not None and (self._plan.core, self._plan.form) == (core, present) else None
            if plan is not None and plan.fingerprint.holds(tensors, core):
                return plan
            check_modules(network)  # before the core reads at the addresses of its tensors
            fingerprint = Fingerprint.take(tensors, core)
            if plan is not None and plan.fingerprint.same_content(fingerprint):
                plan.fingerprint = fingerprint
                return plan
            self._plan = plan = None  # free its memory first
            with torch.device("cpu"):  # whatever the default device is
                description = describe(network)
                if core.storage == "float16":
                    description = in_units(description)
                self._plan = Plan(fingerprint, present, pack(description, core.has_amx), core)
            return self._plan

    def take_program(self, plan: Plan, patch_size: tuple[int, ...]) -> Program:
        """A program for patches of this size that no thread uses; a new one if none is idle."""
        with self.lock:
            for index, program in enumerate(plan.idle):
                if program.patch_size == patch_size:
                    return plan.idle.pop(index)
            _drop_idle(plan.idle, IDLE_PROGRAMS - 1, 0)
        return Program(plan.weights, patch_size, plan.core)

    def give_back(self, plan: Plan, program: Program) -> None:
        """Keep a program for the next patch, if the weights are still those of its plan."""
        with self.lock:
            if plan is self._plan:
                plan.idle.append(program)
                _drop_idle(plan.idle, IDLE_PROGRAMS, 1)

    def idle_programs(self) -> list[Program]:
        """Programs that no thread uses."""
        with self.lock:
            return [] if self._plan is None else list(self._plan.idle)

    def make_room(self) -> None:
        """Free packed weights and programs: a training changes the weights."""
        self.release()

    def release(self) -> None:
        """Free packed weights and programs."""
        with self.lock:
            self._plan = None


def _drop_idle(idle: list[Program], most: int, always: int) -> None:
    """Drops those used longest ago until ``most`` are left, which take ``IDLE_BYTES`` beside the ``always`` last ones."""
    while len(idle) > most or sum(program.n_bytes for program in idle[: len(idle) - always]) > IDLE_BYTES:
        del idle[0]


sessions = OfEachNetwork(PredictionSession)
session_of = sessions.of


def _core_for(network: E2ENet, x: Tensor) -> Core:
    """The core that predicts.

    Raises:
        NotSupportedError: this input stays with PyTorch.
    """
    check_support(network, x)
    return loaded()


def why_not_predicted(network: E2ENet, input_shape: Sequence[int]) -> str | None:
    """Why a float32 input of this shape on the CPU would stay with PyTorch; None if the engine takes it."""
    return why_not(_core_for, network, input_shape)


def bytes_to_take(network: E2ENet, input_shape: Sequence[int]) -> int:
    """Memory that the next patch of this shape takes for feature maps; 0 where PyTorch computes, or where it is held already.

    The weights are packed, and the memory is reserved, which takes none yet.
    """
    session, patch_size = session_of(network), tuple(input_shape[2:])
    try:
        core = _core_for(network, torch.empty(tuple(input_shape), dtype=torch.float32, device="cpu"))
        plan = session.plan(network, core)
    except NotSupportedError:
        return 0
    if any(program.patch_size == patch_size for program in session.idle_programs()):
        return 0
    program = session.take_program(plan, patch_size)
    session.give_back(plan, program)
    return program.n_bytes


def predict(network: E2ENet, x: Tensor) -> Tensor | list[Tensor] | None:
    """The logits of ``network(x)``, or None where PyTorch has to compute them; ``why_pytorch`` says why.

    The caller made sure that nothing is trained, traced or differentiated.

    Raises:
        E2ENetError: a setting cannot be used, or mode "check" found a difference.
    """
    if is_disabled():
        return None
    session = sessions.alone(network)
    try:
        core = _core_for(network, x)
        plan = session.plan(network, core)
    except NotSupportedError as reason:
        session.reason = str(reason)
        return None
    session.reason = None
    logits = _run(session, plan, network, x)
    if settings().engine == "check" and not plan.checked:
        _check(network, x, logits, TOLERANCES[core.storage])
        plan.checked = True
    return logits if network.decoder.deep_supervision else logits[0]


def _run(session: PredictionSession, plan: Plan, network: E2ENet, x: Tensor) -> list[Tensor]:
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
        expected = E2ENet.forward(network, x)  # not one of this network's own, around which this is computed
    expected = expected if isinstance(expected, list) else [expected]
    for level, (ours, theirs) in enumerate(zip(logits, expected, strict=True)):
        difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        if not difference <= tolerance * largest:
            raise E2ENetError(
                f"the engine's logits of level {level} differ from PyTorch's by {difference:.3g}, the largest logit is "
                f"{largest:.3g}: set {ENGINE_VARIABLE}=off and report this with the output of `e2enet info`"
            )
