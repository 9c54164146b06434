"""Settings of the computation: one object, whose defaults are environment variables, read once a process.

A variable is called ``nnUNet_e2enet_`` and the name of a field below. ``engine_storage=float16`` rounds feature maps; other
settings change results by no more than rounding in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from nnunetv2_e2enet.errors import E2ENetError

PREFIX = "nnUNet_e2enet_"
CHOICES: dict[str, tuple[str, ...]] = {
    "engine": ("auto", "on", "off", "check"),
    "engine_kernels": ("", "amx", "avx512", "avx2", "generic"),
    "engine_storage": ("float32", "float16"),
    "kernels": ("auto", "on", "off"),
    "plane_convolutions": ("off", "on"),
    "predictor": ("on", "off"),
}
STORAGE_16_BIT = CHOICES["engine_storage"][1]
"""The engine's feature maps in half the memory."""
_SWITCHES = {"0": "off", "false": "off", "1": "on", "true": "on"}


@dataclass(frozen=True)
class Settings:
    """Choices that change speed and memory; ``engine_storage`` changes precision as well.

    Attributes:
        engine: whether networks predict and train on the CPU with ``nnunetv2_e2enet.engine``; see docs/engine.md.
        engine_kernels: instruction set of the engine; the best of the CPU if empty.
        engine_storage: dtype of the engine's feature maps.
        kernels: whether the fused GPU kernels are used; see docs/memory.md.
        plane_convolutions: whether convolutions without depth, of channels-last maps, are computed in 2D over all slices.
        predictor: whether scans are predicted on the CPU with ``nnunetv2_e2enet.prediction``; see docs/engine.md.

    Raises:
        E2ENetError: a value is none of ``CHOICES``.
    """

    engine: str = "auto"
    engine_kernels: str = ""
    engine_storage: str = "float32"
    kernels: str = "auto"
    plane_convolutions: str = "off"
    predictor: str = "on"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Variables that are unset or empty leave the default.

        Raises:
            E2ENetError: a variable has a value that cannot be used.
        """
        values = {field.name: environment.get(variable(field.name), "") for field in fields(cls)}
        given = {name: value.lower() for name, value in values.items() if value}
        return cls(**{name: _SWITCHES.get(value, value) if "on" in CHOICES[name] else value for name, value in given.items()})


def variable(name: str) -> str:
    """The environment variable of a field of ``Settings``."""
    return PREFIX + name


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises E2ENetError unless ``value`` is one of ``choices`` of the field ``name``."""
    if value not in choices:
        named = ", ".join(choice for choice in choices if choice)
        raise E2ENetError(f"{variable(name)} is {value!r}: use one of {named}{', or nothing' if '' in choices else ''}")


_current: Settings | None = None


def settings() -> Settings:
    """The settings in force: those of ``override``, else of the environment when it was first asked for.

    Raises:
        E2ENetError: an environment variable has a value that cannot be used.
    """
    global _current
    if _current is None:
        _current = Settings.from_environment()
    return _current


@contextmanager
def override(**changes: str) -> Iterator[Settings]:
    """Other settings within this context, in all threads of the process.

    Args:
        changes: fields of ``Settings`` and their values.

    Raises:
        E2ENetError: a value cannot be used.
    """
    global _current
    before = settings()
    _current = replace(before, **changes)
    try:
        yield _current
    finally:
        _current = before
