"""The engine's side of networks: what it keeps for each of them, and where it is switched off."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_local = threading.local()


@contextmanager
def disabled() -> Iterator[None]:
    """A context in which the networks of this thread predict and train through PyTorch."""
    before = getattr(_local, "disabled", False)
    _local.disabled = True
    try:
        yield
    finally:
        _local.disabled = before


def is_disabled() -> bool:
    """Whether this is within ``disabled()``."""
    return getattr(_local, "disabled", False)


class Session(ABC):
    """The engine's side of one network, for one kind of work.

    Attributes:
        reason: why the last pass of this kind went through PyTorch, None if it did not.
        lock: held while what the session keeps is changed.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.lock = threading.Lock()

    @abstractmethod
    def make_room(self) -> None:
        """Free what this kind of work will make anew anyway after another kind, or what is cheap to make."""


T = TypeVar("T", bound=Session)


class OfEachNetwork(Generic[T]):
    """Sessions of one kind, prediction or training, each of which lives as long as its network.

    Args:
        make: makes the session of a network that has none.
    """

    _kinds: ClassVar[list[OfEachNetwork[Any]]] = []

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._objects: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()
        self._kinds.append(self)

    def of(self, network: nn.Module) -> T:
        """The session of a network, made now if there is none."""
        with self._lock:
            return self._objects.setdefault(network, self._make())

    def alone(self, network: nn.Module) -> T:
        """The same, which is about to be used. Other kinds make room: a network trains or is validated."""
        for kind in self._kinds:
            if kind is not self and network in kind._objects:
                kind.of(network).make_room()
        return self.of(network)
