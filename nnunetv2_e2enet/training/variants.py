"""Trainer classes that differ in settings alone, or in the class of nnU-Net that they extend."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import ADVICE


def variant(base: Any, suffix: str, **settings: Any) -> type:
    """A subclass of ``base`` named ``{base}_{suffix}`` with these attributes.

    Settings that are attributes of the class stay so, and subclasses can override them. nnU-Net sets its own, such as the
    number of epochs, in ``__init__``: these are set after it.

    Args:
        base: an nnU-Net trainer.
        suffix: appended to the name.
        settings: attributes that ``base`` has.

    Raises:
        AttributeError: on construction, for a setting that ``base`` does not have.
    """
    of_class = {name: value for name, value in settings.items() if hasattr(base, name)}

    class Variant(base):
        def __init__(
            self,
            plans: dict[str, Any],
            configuration: str,
            fold: int,
            dataset_json: dict[str, Any],
            device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature that nnU-Net inspects)
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            for name, value in settings.items():
                if name in of_class and name not in vars(self):
                    continue
                if not hasattr(self, name):
                    raise AttributeError(f"{base.__name__} has no setting {name}")
                setattr(self, name, value)

    for name, value in of_class.items():
        setattr(Variant, name, value)
    Variant.__name__ = Variant.__qualname__ = f"{base.__name__}_{suffix}"
    Variant.__doc__ = f"{base.__name__} with {', '.join(f'{name} = {value}' for name, value in settings.items())}."
    return Variant


def variants(base: Any, settings: dict[str, dict[str, Any]]) -> dict[str, type]:
    """Several of them, by class name. ``settings`` is by suffix."""
    classes = [variant(base, suffix, **values) for suffix, values in settings.items()]
    return {cls.__name__: cls for cls in classes}


def combination(name: str, mixin: type, base: str) -> type:
    """A trainer of nnU-Net, which may have moved in a newer one, with a mixin before it.

    Args:
        name: of the combination.
        mixin: such as E2ENetMixin.
        base: module and class of nnU-Net's trainer.

    Raises:
        E2ENetError: the installed nnU-Net has no such trainer, or the mixin does not fit it.
    """
    module, _, class_name = base.rpartition(".")
    try:
        original = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise E2ENetError(f"{error}: {ADVICE}") from error
    return type(name, (mixin, original), {"__doc__": f"{mixin.__name__} before nnU-Net's {class_name}."})
