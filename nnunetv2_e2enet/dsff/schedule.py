"""Schedules: when the topology changes, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Protocol

from nnunetv2_e2enet.errors import E2ENetError


class Schedule(Protocol):
    """The epochs of updates, and the share of the topology that each of them replaces."""

    def is_update(self, epoch: int) -> bool:
        """Whether the topology changes before the first iteration of ``epoch`` (counted from 0)."""

    def prune_fraction(self, epoch: int) -> float:
        """Share of the active connections that an update before ``epoch`` replaces, from 0 to 1."""


@dataclass(frozen=True)
class CosineSchedule:
    """An update after every ``period`` epochs; the fraction falls by a cosine to 0 at the last epoch (paper, section 3.2).

    Args:
        n_epochs: length of the training.
        period: epochs between two updates.
        initial_fraction: share of active connections replaced at epoch 0.
    """

    n_epochs: int
    period: int = 5
    initial_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name, epochs in (("num_epochs", self.n_epochs), ("topology_update_period", self.period)):
            if not isinstance(epochs, int) or epochs < 1:
                raise E2ENetError(f"{name} is {epochs!r}, but it is a number of epochs: use a whole number of at least 1")
        fraction = self.initial_fraction
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise E2ENetError(f"initial_prune_fraction is {fraction!r}, but it is a share: use a number from 0 to 1")

    def is_update(self, epoch: int) -> bool:
        """Whether ``epoch`` is a multiple of the period, and neither the first epoch nor the last."""
        return epoch % self.period == 0 and 0 < epoch < self.n_epochs - 1

    def prune_fraction(self, epoch: int) -> float:
        """A cosine from ``initial_fraction`` at epoch 0 to 0 at the last epoch."""
        progress = min(epoch / (self.n_epochs - 1), 1.0) if self.n_epochs > 1 else 1.0
        return self.initial_fraction * (1 + cos(pi * progress)) / 2


@dataclass(frozen=True)
class StaticSchedule:
    """The topology of the start is kept."""

    def is_update(self, epoch: int) -> bool:  # noqa: ARG002 (the same answer for every epoch)
        """False for every epoch."""
        return False

    def prune_fraction(self, epoch: int) -> float:  # noqa: ARG002
        """0 for every epoch."""
        return 0.0
