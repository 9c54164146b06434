"""Free memory of the machine."""

from __future__ import annotations

import math
from pathlib import Path

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def free_bytes() -> float:
    """Memory that processes can still take; infinity where the system does not say.

    A container's limit counts where it is lower; pages of files that its processes have read do not.
    """
    free = math.inf
    if MEMORY.is_file():
        fields = dict(line.split(":", 1) for line in MEMORY.read_text(encoding="utf-8").splitlines())
        free = float(fields["MemAvailable"].split()[0]) * 1024
    limit, used, details = GROUP / "memory.max", GROUP / "memory.current", GROUP / "memory.stat"
    if limit.is_file() and used.is_file() and details.is_file():
        maximum = limit.read_text(encoding="utf-8").strip()
        if maximum.isdigit():
            files = dict(line.split() for line in details.read_text(encoding="utf-8").splitlines())
            free = min(free, float(maximum) - float(used.read_text(encoding="utf-8")) + float(files.get("inactive_file", 0)))
    return free
