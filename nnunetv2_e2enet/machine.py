"""Memory and devices of the machine: what is there, and errors about what is not."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunetv2_e2enet.errors import E2ENetError

MEMORY = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
_ALLOCATORS = ("out of memory", "can't allocate memory", "Failed to allocate memory", "bad allocation", "bad_alloc")
"""Words of RuntimeErrors: on a GPU, of torch on a CPU, of SimpleITK and of C++."""


@dataclass(frozen=True)
class _Accounts:
    """Files of a control group: its limit, the bytes it uses, and how many of these are pages of files that can go."""

    limit: str
    used: str
    pages_of_files: tuple[str, str]


_V1 = _Accounts("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Accounts("memory.max", "memory.current", ("active_file", "inactive_file"))


def check_device(device: str, option: str) -> None:
    """Raises E2ENetError unless PyTorch finds a device of this kind, which an option of a command names."""
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(device):
        raise E2ENetError(f"PyTorch finds no {device.upper()} device here: use {option} cpu")


def free_bytes() -> float:
    """Memory that processes can still take; infinity where the system does not say.

    The limit of a container or of a batch job's control group (version 1 or 2, with all groups above it) counts where it is
    lower. Pages of files that its processes have read do not.
    """
    said = MEMORY.is_file() and "MemAvailable:" in MEMORY.read_text(encoding="utf-8")  # some systems say other things there
    free = bytes_in(MEMORY, "MemAvailable") if said else math.inf
    return min(free, *(_free_in(group, accounts) for group, accounts in _control_groups()), math.inf)


def _control_groups() -> Iterator[tuple[Path, _Accounts]]:
    """The groups that this process belongs to, as far as they can be seen from within a container."""
    lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = GROUPS / "memory" if controllers else GROUPS
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            if each.is_relative_to(root):
                yield each, _V1 if controllers else _V2


def _free_in(group: Path, accounts: _Accounts) -> float:
    try:
        limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in (accounts.limit, accounts.used))
        details = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:  # the root group has no limit, and others may not be visible
        return math.inf
    files = sum(float(details.get(name, 0)) for name in accounts.pages_of_files)
    return float(limit) - float(used) + files if limit.isdigit() else math.inf


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


@contextmanager
def out_of_memory_in_one_line() -> Iterator[None]:
    """An error about too little memory, of a GPU or of the system, becomes an E2ENetError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise E2ENetError("out of memory: close other programs, or use a machine with more") from error
        raise
