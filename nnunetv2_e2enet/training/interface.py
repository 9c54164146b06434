"""Checks of the methods and attributes of nnU-Net's classes that this package uses: a change there gives one line of error."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from operator import attrgetter

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import ADVICE

TRAINER_ATTRIBUTES = (
    *("configuration_manager", "configuration_name", "plans_manager", "output_folder"),
    *("fold", "current_epoch", "num_epochs", "was_initialized", "enable_deep_supervision", "disable_checkpointing"),
    *("device", "network", "loss", "optimizer", "grad_scaler", "dataloader_train", "is_ddp", "local_rank"),
    *("logger.local_logger.verbose", "print_to_log_file"),
    *("configure_optimizers", "_do_i_compile"),
)
PLANNER_ATTRIBUTES = (
    *("UNet_class", "UNet_base_num_features", "UNet_max_features_2d", "UNet_max_features_3d"),
    *("UNet_reference_val_2d", "UNet_reference_val_3d", "plans_identifier"),
    *("preprocessor_name", "overwrite_target_spacing", "suppress_transpose"),
    *("dataset_name", "determine_fullres_target_spacing", "determine_transpose"),
)


class Overrides:
    """Base of a mixin for a class of nnU-Net. Each public method must be one of nnU-Net's, with the same parameters.

    A method is compared with nnU-Net's first definition of it, since variants of nnU-Net may change the parameters.
    Optional parameters that nnU-Net adds behind the others are accepted.

    Attributes:
        own_hooks: methods of the mixin that nnU-Net does not have.

    Raises:
        E2ENetError: on definition of a class, if nnU-Net has no such method, or one with other parameters, or if nnU-Net's
            class comes before the mixin, whose methods would then not be called.
    """

    own_hooks: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        originals = [base for base in reversed(cls.__mro__) if base.__module__.startswith("nnunetv2.")]
        if originals:
            root = cls.__mro__.index(originals[0])
            late = [base for base in cls.__mro__[root:] if issubclass(base, Overrides) and base is not Overrides]
            if late:
                raise E2ENetError(
                    f"{cls.__name__} has {originals[0].__name__} before {late[0].__name__}, whose methods would not be "
                    f"called: name {late[0].__name__} first among the bases of {cls.__name__}"
                )
            for mixin in cls.__mro__:
                if issubclass(mixin, Overrides) and not issubclass(mixin, originals[0]):
                    _check_methods(mixin, originals)


def _check_methods(mixin: type[Overrides], originals: list[type]) -> None:
    for name, ours in vars(mixin).items():
        internal = name.startswith("_") and name != "__init__"
        if not inspect.isroutine(ours) or internal or name in mixin.own_hooks:
            continue
        original = next((base for base in originals if name in vars(base)), None)
        if original is None:
            if mixin.__module__.startswith("nnunetv2_e2enet."):
                raise E2ENetError(f"the installed nnU-Net has no {originals[0].__name__}.{name}: {ADVICE}")
            continue  # a method of the user's own
        expected, found = (list(inspect.signature(getattr(cls, name)).parameters.values()) for cls in (mixin, original))
        if not _takes(found, expected):
            raise E2ENetError(
                f"{original.__name__}.{name} of the installed nnU-Net takes ({_names(found)}), but ({_names(expected)}) was "
                f"expected: {ADVICE}"
            )


def _takes(found: list[inspect.Parameter], expected: list[inspect.Parameter]) -> bool:
    """Whether a call with the expected parameters in their order is one that the method takes."""
    added = found[len(expected) :]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    optional = all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in added)
    return optional and [p.name for p in found[: len(expected)]] == [p.name for p in expected]


def _names(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(p.name for p in parameters)


def check_attributes(instance: object, names: Iterable[str]) -> None:
    """Raises E2ENetError unless an object of nnU-Net has all of these attributes; ``a.b`` is one of an attribute."""
    missing = [name for name in names if not _has(instance, name)]
    if missing:
        raise E2ENetError(f"{type(instance).__name__} of the installed nnU-Net has no {', '.join(missing)}: {ADVICE}")


def _has(instance: object, name: str) -> bool:
    try:
        attrgetter(name)(instance)
    except AttributeError:
        return False
    return True
