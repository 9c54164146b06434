"""Trainer classes that differ from another in settings alone."""

from __future__ import annotations

from typing import Any

import torch


def variant(base: Any, suffix: str, **settings: Any) -> type:
    """A subclass of ``base`` named ``{base}_{suffix}`` whose ``__init__`` ends by setting these attributes.

    Args:
        base: an nnU-Net trainer.
        suffix: appended to the name.
        settings: attributes that ``base`` has.

    Raises:
        AttributeError: on construction, for a setting that ``base`` does not have.
    """

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
                if not hasattr(self, name):
                    raise AttributeError(f"{base.__name__} has no setting {name}")
                setattr(self, name, value)

    Variant.__name__ = Variant.__qualname__ = f"{base.__name__}_{suffix}"
    Variant.__doc__ = f"{base.__name__} with {', '.join(f'{name} = {value}' for name, value in settings.items())}."
    return Variant


def variants(base: Any, settings: dict[str, dict[str, Any]]) -> dict[str, type]:
    """Several of them, by class name. ``settings`` is by suffix."""
    classes = [variant(base, suffix, **values) for suffix, values in settings.items()]
    return {cls.__name__: cls for cls in classes}
