"""Reports of the engine: status, reasons, times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nnunetv2_e2enet.engine.core import KERNELS, KERNELS_VARIABLE, TIMERS, Core, load_core
from nnunetv2_e2enet.engine.prediction import session_of
from nnunetv2_e2enet.engine.support import ENGINE_VARIABLE
from nnunetv2_e2enet.engine.training import training_session_of
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.settings import settings


@dataclass(frozen=True)
class Status:
    """Whether CPU prediction and training use the engine in this environment.

    Attributes:
        used: whether it does, for networks that it supports.
        mode: "auto", "on", "off" or "check".
        kernels: "amx", "avx512", "avx2" or "generic"; None without a compiled core.
        storage: of feature maps, "float32" or "float16"; None without a compiled core.
        library: the compiled core; None without one.
        reason: one line for people.
    """

    used: bool
    mode: str
    kernels: str | None
    storage: str | None
    library: Path | None
    reason: str


def status() -> Status:
    """Look for the compiled core and read the settings.

    Raises:
        E2ENetError: an environment variable has a value that cannot be used.
    """
    core, setting = load_core(), settings().engine
    if not isinstance(core, Core):
        return Status(False, setting, None, None, None, f"CPU prediction and training use PyTorch: {core}")
    if setting == "off":
        reason = f"CPU prediction and training use PyTorch: {ENGINE_VARIABLE} switches the engine off"
        return Status(False, setting, core.kernels, core.storage, core.path, reason)
    kernels = _kernels(core) + (" (in training avx512)" if core.has_amx else "")
    reason = f"CPU prediction and training use the sparse engine with {kernels} and maps in {core.storage}"
    return Status(True, setting, core.kernels, core.storage, core.path, reason)


def _kernels(core: Core) -> str:
    """The kernels that are used, and the reason."""
    if settings().engine_kernels:
        return f"{core.kernels} kernels ({KERNELS_VARIABLE} asks for them)"
    better = [name for name in KERNELS[: KERNELS.index(core.kernels)] if name != "amx" or core.storage == "float16"]
    return f"{core.kernels} kernels" + (f" (no {' and no '.join(better)} in this CPU or this build)" if better else "")


def peak_flops(threads: int) -> float:
    """Peak of this CPU: floating-point operations a second in a loop of multiply-adds.

    Raises:
        E2ENetError: there is no compiled core.
    """
    core = load_core()
    if not isinstance(core, Core):
        raise E2ENetError(core)
    return core.peak_flops(threads)


def why_pytorch(network: nn.Module) -> str | None:
    """Why the last prediction that could have used the engine did not, or the last training iteration; None if it did."""
    return (training_session_of if network.training else session_of)(network).reason


def profile(network: nn.Module) -> dict[str, float]:
    """Seconds that the first thread spent by kind of work, over all patches of the programs that are at hand."""
    programs = [*session_of(network).idle_programs(), *training_session_of(network).idle_programs()]
    return {name: sum(float(p.seconds[i]) for p in programs) for i, name in enumerate(TIMERS)}


def release(network: nn.Module) -> None:
    """Give back the memory that the engine holds for this network; the next prediction or iteration takes it again."""
    session_of(network).release()
    training_session_of(network).release()
