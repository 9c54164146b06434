"""Versions, machine and command behind a result."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("nnunetv2-e2enet", "nnunetv2", "torch", "monai", "scipy", "scikit-posthocs", "numpy", "SimpleITK")


def provenance(arguments: Sequence[str]) -> dict[str, Any]:
    """Plain data. ``arguments`` are those of the command line, without the program."""
    import torch

    return {
        "command": shlex.join(["e2enet", *arguments]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
            "processor": processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def command_line(command: str, fallback: Sequence[str]) -> list[str]:
    """The arguments of this process if it runs ``e2enet COMMAND``; otherwise the command and what it was given."""
    return sys.argv[1:] if sys.argv[1:2] == [command] else [command, *fallback]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Name of the CPU's model, with family and number of the model on Linux (virtual machines share a name)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        first, _, _ = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        if "model name" in found:
            numbers = [f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
            return f"{found['model name']} ({', '.join(numbers)})" if numbers else found["model name"]
    return platform.processor() or "unknown"
