"""Where faster ways to compute are asked first: the CPU engine and the GPU kernels. The network knows their names alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnunetv2_e2enet.errors import E2ENetError

if TYPE_CHECKING:
    from nnunetv2_e2enet.network.e2enet import E2ENet

ENGINE = "nnunetv2_e2enet.engine"  # imported at the first prediction that it could do
KERNELS = "nnunetv2_e2enet.kernels"  # imported with the first network where they could be used
KERNELS_VARIABLE = "nnUNet_e2enet_kernels"
KERNELS_MODES = ("auto", "on", "off")

_kernels: Any = None
_kernels_when_compiled = False
_kernels_checked = False


def accelerated(network: E2ENet, x: Tensor) -> Tensor | list[Tensor] | None:
    """The logits from the engine; None where PyTorch computes them: in traces, off the CPU, in one of training and gradients."""
    if network.training != torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != "cpu" or _is_watched():
        return None
    engine: Any = importlib.import_module(ENGINE)
    logits: Tensor | list[Tensor] | None = (engine.train if network.training else engine.accelerate)(network, x)
    return logits


def _is_watched() -> bool:
    """Whether something wants to see the operations themselves: a dispatch mode (counters, fake tensors) or a transform."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def kernels_mode() -> str:
    """What ``nnUNet_e2enet_kernels`` says.

    Raises:
        E2ENetError: it says something else than it may.
    """
    mode = os.environ.get(KERNELS_VARIABLE, "") or "auto"
    if mode not in KERNELS_MODES:
        raise E2ENetError(f"{KERNELS_VARIABLE} is {mode!r}: use one of {', '.join(KERNELS_MODES)}")
    return mode


def kernels_status() -> str:
    """Whether the fused kernels can be used in this environment, and why not, for people."""
    mode = kernels_mode()
    if mode == "off":
        return f"not used: {KERNELS_VARIABLE}=off"
    if importlib.util.find_spec("triton") is None:
        return "not used: Triton is not installed"
    if not torch.cuda.is_available():
        return "not used: no CUDA device"
    return "used, in compiled networks too" if mode == "on" else "used where networks are not compiled, after a check"


def load_kernels() -> None:
    """Get the fused kernels ready, as ``nnUNet_e2enet_kernels`` says.

    "auto" (also when unset): on CUDA where Triton is installed, once they have been found to agree with PyTorch there; not in
    compiled networks, where fusion is left to the compiler. "on": in compiled networks too, and unchecked. "off": never.

    Raises:
        E2ENetError: the variable says something else, or "on" without Triton.
    """
    global _kernels, _kernels_when_compiled
    mode = kernels_mode()
    installed = importlib.util.find_spec("triton") is not None
    if mode == "on" and not installed:
        raise E2ENetError(f"{KERNELS_VARIABLE} is on, but Triton is not installed: pip install triton, or unset the variable")
    wanted = mode == "on" or (mode == "auto" and installed and torch.cuda.is_available())
    refused = _kernels_checked and _kernels is None and mode == "auto"  # in this process, by an earlier network
    _kernels = importlib.import_module(KERNELS) if wanted and not refused else None
    _kernels_when_compiled = mode == "on"


def kernels_for(x: Tensor) -> Any:
    """The package of fused kernels if it shall compute with ``x``, else None."""
    if _kernels is None or x.device.type not in _kernels.DEVICES:
        return None
    if torch.compiler.is_compiling():
        return _kernels if _kernels_when_compiled else None
    if not (_kernels_checked or _kernels_when_compiled):
        _check_kernels(x.device)
    return _kernels


def _check_kernels(device: torch.device) -> None:
    """Do without the kernels, with a warning, where they fail or differ from PyTorch."""
    global _kernels, _kernels_checked
    try:
        wrong = _kernels.wrong_kernel(device)
        problem = wrong and f"{wrong} differs from PyTorch"
    except Exception as error:  # noqa: BLE001 (whatever a compiler or a driver may raise)
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if problem:
        warnings.warn(f"E2ENet computes without its fused kernels on {device}: {problem}", stacklevel=2)
        _kernels = None
    _kernels_checked = True
