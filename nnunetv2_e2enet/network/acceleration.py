"""Asks the engine (CPU) and the kernels (GPU) before PyTorch computes.

Every pass of theirs has a counterpart in PyTorch in ``network``. Both build on ``network``, which imports them by name when it
first needs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.settings import settings, variable

_PACKAGE = "nnunetv2_e2enet.kernels"
_kernels: dict[str, Any] = {}
"""The package of fused kernels, where its passes over maps are used, by device type."""
_convolutions: dict[str, Any] = {}
"""The same package, where its convolutions of active connections are used, by device type."""
_agrees: dict[tuple[str, str], bool] = {}
"""Results of the comparisons of the kernels with PyTorch in this process, by device type and check."""
KERNELS = {"wrong_kernel": "fused kernels", "wrong_convolution": "convolutions of active connections"}
"""Names of the kernels in a warning, by the function of the package that checks them."""


def accelerated(network: nn.Module, x: Tensor) -> Tensor | list[Tensor] | None:
    """The logits from the engine; None where PyTorch computes: in traces, off the CPU, in one of training and gradients."""
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if network.training != torch.is_grad_enabled() or torch.compiler.is_compiling() or traced:
        return None
    if x.device.type != "cpu" or _is_watched():
        return None
    engine = importlib.import_module("nnunetv2_e2enet.engine")
    logits: Tensor | list[Tensor] | None = (engine.train if network.training else engine.predict)(network, x)
    return logits


def _is_watched() -> bool:
    """Whether a dispatch mode (counters, fake tensors) or a transform is active, which has to see PyTorch's operations."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return torch._C._len_torch_dispatch_stack() > 0 or transformed


def kernels_status() -> str:
    """Whether the fused kernels can be used in this environment, and why not, for people."""
    mode = settings().kernels
    if mode == "off":
        return f"not used: {variable('kernels')}=off"
    if importlib.util.find_spec("triton") is None:
        return "not used: Triton is not installed"
    if not torch.cuda.is_available():
        return "not used: no CUDA device"
    return "used" if mode == "on" else "used, after a check in each process"


def kernels_may_compute() -> bool:
    """Whether a network that is built now may meet the fused kernels on the device that it is moved to."""
    mode, installed = settings().kernels, importlib.util.find_spec("triton") is not None
    return installed and (mode == "on" or (mode == "auto" and torch.cuda.is_available()))


def kernels_for(x: Tensor) -> Any:
    """The package of fused kernels where its passes over maps compute with ``x``, else None.

    The setting "auto": on CUDA where Triton is installed and ``prepare_kernels`` has found them to agree with PyTorch. "on":
    wherever they run, unchecked. "off": never.
    """
    return _kernels.get(x.device.type)


def convolutions_for(x: Tensor) -> Any:
    """As ``kernels_for``, of the convolutions of active connections, which have a check of their own."""
    return _convolutions.get(x.device.type)


def prepare_kernels(device: torch.device, convolutions: bool = False) -> None:
    """Decide whether the fused kernels compute on this kind of device, before a network computes there.

    Each check runs once a process, and not where a dispatch mode would see its operations. Compiled networks ask
    ``kernels_for`` while they are traced, too late for a check.

    Args:
        device: where the network computes.
        convolutions: whether a layer stores active weights alone. Nothing else needs the convolutions of active connections,
            whose programs take a minute or two to compile for their check.

    Raises:
        E2ENetError: the setting is "on" without Triton.
        ImportError: the setting is "on", and Triton cannot be imported.
    """
    mode = settings().kernels
    installed = importlib.util.find_spec("triton") is not None
    if mode == "on" and not installed:
        raise E2ENetError(
            f"{variable('kernels')} is on, but Triton is not installed: pip install triton, or unset the variable"
        )
    _kernels.pop(device.type, None)
    _convolutions.pop(device.type, None)
    if mode == "off" or not installed or device.type == "meta" or (mode == "auto" and device.type != "cuda"):
        return
    for used, check, wanted in ((_kernels, "wrong_kernel", True), (_convolutions, "wrong_convolution", convolutions)):
        key = device.type, check
        if mode == "auto" and wanted and key not in _agrees and not _is_watched():
            _agrees[key] = _agree_with_pytorch(device, check)
        if mode == "on" or _agrees.get(key):
            kernels = importlib.import_module(_PACKAGE)
            if device.type in kernels.DEVICES:
                used[device.type] = kernels


def _agree_with_pytorch(device: torch.device, check: str) -> bool:
    """Do without these kernels, with a warning, where they cannot be imported, fail or differ from PyTorch."""
    try:
        wrong = getattr(importlib.import_module(_PACKAGE), check)(device)
        problem = wrong and f"{wrong} differs from PyTorch"
    except Exception as error:  # noqa: BLE001 (whatever a compiler or a driver may raise)
        cause: BaseException = error
        while cause.__cause__ is not None:  # Triton's own errors begin with a place in its source
            cause = cause.__cause__
        problem = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
    if problem:
        warnings.warn(f"E2ENet computes without its {KERNELS[check]} on {device}: {problem}", stacklevel=2)
    return not problem
