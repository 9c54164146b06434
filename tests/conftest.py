"""Fixtures: data that lies beside the repository where it is present, and a registered nnU-Net."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunetv2_e2enet.registration import find_nnunet, is_registered, register, unregister

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference outputs and real scans, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs reference outputs and scans in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def registered() -> Iterator[None]:
    """nnU-Net finds our classes while the tests run, and afterwards only if it did before."""
    nnunet = find_nnunet()
    before = is_registered(nnunet)
    register(nnunet)
    yield
    if not before:
        unregister(nnunet)
