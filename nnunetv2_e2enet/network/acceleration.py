"""Where a faster way to predict is asked first. The network knows its name and nothing else of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nnunetv2_e2enet.network.e2enet import E2ENet

ENGINE = "nnunetv2_e2enet.engine"  # imported at the first prediction that it could do


def accelerated(network: E2ENet, x: Tensor) -> Tensor | list[Tensor] | None:
    """The logits without PyTorch; None where PyTorch computes them: in training, with gradients, in traces, off the CPU."""
    if network.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != "cpu" or _is_watched():
        return None
    engine: Any = importlib.import_module(ENGINE)
    logits: Tensor | list[Tensor] | None = engine.accelerate(network, x)
    return logits


def _is_watched() -> bool:
    """Whether something wants to see the operations themselves: a dispatch mode (counters, fake tensors) or a transform."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
