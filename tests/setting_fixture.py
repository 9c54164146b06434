"""The fixture ``setting``, a plugin of its own for tests that run without conftest.py (tests/test_sanitizers.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from nnunetv2_e2enet import settings


@pytest.fixture
def setting() -> Iterator[Callable[..., None]]:
    """``setting(engine="on")``: settings of the package for the rest of a test."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(settings.override(**changes))
