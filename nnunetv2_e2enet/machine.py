"""Memory of the machine: the free amount, and errors about none."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import torch

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
_ALLOCATORS = ("out of memory", "can't allocate memory")  # on a GPU; on a CPU, where torch raises a RuntimeError


def free_bytes() -> float:
    """Memory that processes can still take; infinity where the system does not say.

    A container's limit counts where it is lower; pages of files that its processes have read do not.
    """
    free = math.inf
    if MEMORY.is_file():
        free = bytes_in(MEMORY, "MemAvailable")
    limit, used, details = GROUP / "memory.max", GROUP / "memory.current", GROUP / "memory.stat"
    if limit.is_file() and used.is_file() and details.is_file():
        maximum = limit.read_text(encoding="utf-8").strip()
        if maximum.isdigit():
            files = dict(line.split() for line in details.read_text(encoding="utf-8").splitlines())
            free = min(free, float(maximum) - float(used.read_text(encoding="utf-8")) + float(files.get("inactive_file", 0)))
    return free


def bytes_in(file: Path, field: str) -> float:
    """A field of ``/proc/meminfo`` or of another file of its kind, where numbers are of kibibytes."""
    fields = dict(line.split(":", 1) for line in file.read_text(encoding="utf-8").splitlines())
    return float(fields[field].split()[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the system had no memory left for a tensor or an object."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said_so = isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)
    return said_so or isinstance(error, (MemoryError, torch.OutOfMemoryError))
