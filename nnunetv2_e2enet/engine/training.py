"""The engine behind ``E2ENet.forward`` in training: one autograd function for the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_modules

from nnunetv2_e2enet.engine.core import Core
from nnunetv2_e2enet.engine.description import NotSupportedError, check_modules
from nnunetv2_e2enet.engine.sessions import OfEachNetwork, Session, is_disabled
from nnunetv2_e2enet.engine.support import check_support, loaded, why_not
from nnunetv2_e2enet.engine.training_program import TrainingProgram
from nnunetv2_e2enet.engine.training_weights import TrainingWeights
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.connections import MaskableLayer
from nnunetv2_e2enet.network.e2enet import E2ENet
from nnunetv2_e2enet.network.fusion import FusionNode

IDLE_BATCHES = 1  # of programs kept for the next iteration


class TrainingSession(Session):
    """The engine's side of one network in training."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: TrainingWeights | None = None
        self._idle: list[list[TrainingProgram]] = []  # one list a batch

    def weights(self, network: E2ENet, core: Core) -> TrainingWeights:
        """Places of all weights, new ones if the topology is another.

        Raises:
            NotSupportedError: the network has to stay with PyTorch.
        """
        with self.lock:
            if self._weights is None or not self._weights.fits(network, core):
                self._idle.clear()
                self._weights = None  # free its memory first
                self._weights = TrainingWeights(network, core)
            return self._weights

    def take_programs(self, weights: TrainingWeights, patch_size: tuple[int, ...], n: int) -> list[TrainingProgram]:
        """Programs for the samples of a batch that no thread uses; new ones if none are idle."""
        with self.lock:
            for index, programs in enumerate(self._idle):
                first = programs[0]
                if len(programs) == n and first.patch_size == patch_size and first.weights is weights.packed:
                    return self._idle.pop(index)
            self._idle.clear()  # free its memory first
        first = TrainingProgram(weights, patch_size, n)
        return [first, *(TrainingProgram(weights, patch_size, n, first) for _ in range(n - 1))]

    def give_back(self, weights: TrainingWeights, programs: list[TrainingProgram]) -> None:
        """Keep the programs for the next batch, if the weights still lie where they did."""
        with self.lock:
            if weights is self._weights:
                self._idle.append(programs)
                del self._idle[:-IDLE_BATCHES]

    def idle_programs(self) -> list[TrainingProgram]:
        """Programs that no thread uses."""
        with self.lock:
            return [program for programs in self._idle for program in programs]

    def make_room(self) -> None:
        """Free the memory of all feature maps that no thread uses; weights keep their places, which take long to find."""
        with self.lock:
            self._idle.clear()

    def release(self) -> None:
        """Free places of weights and programs."""
        with self.lock:
            self._weights = None
            self._idle.clear()


training_sessions = OfEachNetwork(TrainingSession)
training_session_of = training_sessions.of


def _core_for(network: E2ENet, x: Tensor) -> Core:
    """The core that trains, without tile registers, for which weights would have to be split in each iteration.

    Raises:
        NotSupportedError: this input stays with PyTorch.
    """
    check_support(network, x)
    if x.requires_grad:
        raise NotSupportedError("the gradient of the input is wanted")
    if any(max(stride) > 2 for stride in network.encoder.strides):
        raise NotSupportedError("a stride is larger than 2")
    if torch_modules._global_backward_hooks or torch_modules._global_backward_pre_hooks:
        raise NotSupportedError("backward hooks are registered for all modules, and would not be called")
    for name, module in network.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotSupportedError(f"{name or 'the network'} has backward hooks, which would not be called")
        if isinstance(module, MaskableLayer) and module.dense_gradients:
            raise NotSupportedError(f"gradients of connections that are off are wanted ({name})")
        if isinstance(module, MaskableLayer) and module.stores_active_only:
            raise NotSupportedError(f"active weights alone are stored ({name})")
        if isinstance(module, ShiftBlock) and module.shift is not None:
            raise NotSupportedError(f"{name} learns its depth shift")
        if isinstance(module, ShiftBlock) and module.dropout is not None and getattr(module.dropout, "p", 1) > 0:
            raise NotSupportedError(f"{name} has dropout")
    core = loaded()
    if core.storage == "float16":
        _check_shared_weights(network)
    return loaded("avx512", core.storage) if core.has_amx else core


def _check_shared_weights(network: E2ENet) -> None:
    modules = [module for _, module in network.named_modules(remove_duplicate=False)]
    weights = [module.conv.weight for module in modules if isinstance(module, ShiftBlock)]
    weights += [module.upsample.weight for module in modules if isinstance(module, FusionNode) and module.upsample is not None]
    if len(set(map(id, weights))) < len(weights):
        raise NotSupportedError("layers share a weight, and the outputs of each would be in another unit")


def train(network: E2ENet, x: Tensor) -> Tensor | list[Tensor] | None:
    """The logits of ``network(x)`` with their place in autograd's graph, or None where PyTorch has to compute them.

    The caller made sure that the network is in training mode and gradients are on. ``why_pytorch`` says why None was returned.

    Raises:
        E2ENetError: a setting cannot be used.
    """
    if is_disabled():
        return None
    session = training_sessions.alone(network)
    try:
        core = _core_for(network, x)
        check_modules(network)
        weights = session.weights(network, core)
    except NotSupportedError as reason:
        session.reason = str(reason)
        return None
    session.reason = None
    wanted = len(weights.heads) if network.decoder.deep_supervision else 1
    logits: tuple[Tensor, ...] = _Network.apply(session, weights, wanted, x, *network.parameters())  # type: ignore[no-untyped-call]
    return list(logits) if network.decoder.deep_supervision else logits[0]


def why_not_trained(network: E2ENet, input_shape: Sequence[int]) -> str | None:
    """Why training iterations with a float32 input of this shape on the CPU would stay with PyTorch; None if they do not."""
    return why_not(_core_for, network, input_shape)


def _logit_shapes(weights: TrainingWeights, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of the logits of all heads, finest first."""
    shapes, size = [], list(x.shape[2:])
    for (_, _, classes), stride in zip(weights.packed.heads, weights.packed.strides, strict=False):
        size = [s // t for s, t in zip(size, stride[-len(size) :], strict=True)]
        shapes.append((x.shape[0], classes, *size))
    return shapes


class _Network(torch.autograd.Function):
    """All logits from the image and all parameters; gradients of all parameters at once."""

    @staticmethod
    def forward(
        ctx: Any,
        session: TrainingSession,
        weights: TrainingWeights,
        heads: int,
        x: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        threads = torch.get_num_threads()
        shapes = _logit_shapes(weights, x)
        logits = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes[:heads]]
        programs = session.take_programs(weights, tuple(x.shape[2:]), x.shape[0])
        samples = x.detach().contiguous()
        with weights.lock:
            weights.refresh(parameters, threads)
            for n, program in enumerate(programs):
                program.run(samples[n], [level[n] for level in logits], threads)
        programs[0].empty_between()  # for the loss
        # So that a change before the backward pass is an error, as always
        ctx.save_for_backward(*(p if k in weights.read else None for k, p in enumerate(parameters)))
        ctx.set_materialize_grads(False)
        ctx.session, ctx.weights, ctx.programs = session, weights, programs
        ctx.shapes = shapes
        return tuple(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; gradients of a linear loss require none, but these depend on the weights
            grads = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads)
        return _Network._backward_once(ctx, *grads)

    @staticmethod
    @once_differentiable
    def _backward_once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        if ctx.programs is None:
            raise E2ENetError(
                "the backward pass of this iteration was computed before, and what it needs is gone: call backward once, or "
                "set nnUNet_e2enet_engine=off for retain_graph"
            )
        programs, ctx.programs = ctx.programs, None
        weights: TrainingWeights = ctx.weights
        gradients = [_zeros(shape) for shape in weights.shapes]
        given = [*grads, *[None] * (len(ctx.shapes) - len(grads))]
        logits = [_zeros(s) if g is None else g.contiguous() for s, g in zip(ctx.shapes, given, strict=True)]
        threads = torch.get_num_threads()
        with weights.lock:
            weights.refresh(parameters, threads, backward=True)
            for n, program in enumerate(programs):
                program.run_backward([level[n] for level in logits], gradients, threads)
        weights.finish_gradients(gradients)
        ctx.session.give_back(weights, programs)
        reached = weights.reached_from([head for head, grad in enumerate(given) if grad is not None])
        wanted = [need and k in reached for k, need in enumerate(ctx.needs_input_grad[-len(parameters) :])]
        return (None, None, None, None, *(g if w else None for g, w in zip(gradients, wanted, strict=True)))


def _zeros(shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float32, device="cpu")
