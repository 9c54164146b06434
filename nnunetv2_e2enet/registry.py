"""Packages that compute faster, by purpose: the network asks for a purpose and names no package.

``nnunetv2_e2enet/__init__.py`` names the packages. A package is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_modules: dict[str, str] = {}


def register(purpose: str, module: str) -> None:
    """Let the module of this name serve a purpose, in the place of another that did."""
    _modules[purpose] = module


def load(purpose: str) -> Any:
    """The module that serves a purpose; None if none was registered."""
    module = _modules.get(purpose)
    return None if module is None else importlib.import_module(module)
