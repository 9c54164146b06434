"""nnU-Net's checkpoints: read without running code from them, and compared with the network of a trainer."""

from __future__ import annotations

import codecs
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import nn
from torch.serialization import safe_globals

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.machine import is_out_of_memory
from nnunetv2_e2enet.network.blocks import KERNEL_SIZE


def _called(function: Any, path: str) -> Any:
    """A function as pickles of another numpy name it; torch asks a function for its name (torch 2.5 takes no other one)."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    module, _, call.__name__ = path.rpartition(".")
    call.__module__, call.__qualname__ = module, call.__name__
    return call


# nnU-Net logs numpy numbers, and trainers may log arrays. Their pickles name these functions and types; no others are allowed.
_ALLOWED: list[Any] = [
    *(
        _called(function, f"{module}.multiarray.{name}")
        for name, function in (("scalar", np.float32(0).__reduce__()[0]), ("_reconstruct", np.zeros(1).__reduce__()[0]))
        for module in ("numpy._core", "numpy.core")
    ),
    codecs.encode,  # the bytes of an array, to bytes
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
]
_NOT_ALLOWED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""nnU-Net's checkpoints, in its order: a training goes on from the first that is there.

The best one may be many epochs older than the latest.
"""

_NAME_ANOTHER = "name a model folder, a fold's folder or a checkpoint_*.pth"
_NEXT = f"the next of {', '.join(CHECKPOINTS)} that is there"
_RESUME = f"remove it and repeat the command; nnU-Net resumes from {_NEXT}"
_FINISH = f"remove it and finish the training with --c, which resumes from {_NEXT}; then validate"

_CONTINUE = "continue it with the trainer and the settings that it was trained with, or train in another folder"

_reading = RLock()  # what is allowed holds for all threads, and ends with the first that has read

_ZIP_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
# torch's writer of checkpoints, whose errors are RuntimeErrors; the last one is of its end

_KEYS = ("network_weights", "optimizer_state", "current_epoch", "init_args", "trainer_name")
# What has to agree, with the value where plans do not name it; the rest of a network shows in the shapes of its weights.
_ARCHITECTURE = {
    "network_class_name": None,  # in the place of which DSFF was put
    "strides": None,
    "features_per_stage": None,
    "n_conv_per_stage": None,
    "kernel_size": KERNEL_SIZE,
    "shift_size": None,
    "learned_shift": False,
    "encoder_class": None,
    "decoder_class": None,
    "feature_sparsity": None,
}


def why_not_written(error: BaseException, path: Path) -> str | None:
    """The message about a checkpoint that could not be written; None for an error of another kind.

    Args:
        error: what ended the attempt.
        path: the file that was to be written.
    """
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if is_out_of_memory(error):
        what, remedy = f"out of memory while {path} was written ({reason})", "Free memory"
    elif _is_write_failure(error):
        free = shutil.disk_usage(path.parent).free
        what, remedy = f"{path} could not be written ({reason}; {free / 1e9:.1f} GB are free)", "Make room"
    else:
        return None
    return f"{what}: former checkpoints are intact. {remedy} and resume with --c"


def _is_write_failure(error: BaseException) -> bool:
    """Whether a file could not be written: no room, no permission, no folder."""
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and any(name in str(error) for name in _ZIP_WRITER))


@contextmanager
def contents_of_checkpoints() -> Iterator[None]:
    """A context in which torch loads what nnU-Net writes into checkpoints, even where weights alone are asked for."""
    with _reading, safe_globals(_ALLOWED):
        yield


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in a fold's folder from which nnU-Net would go on; None where there is none."""
    return next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)


def fold_checkpoints(model: Path) -> dict[str, Path]:
    """The newest checkpoint of each fold that has one, by the name of the fold."""
    files = {folder.name.removeprefix("fold_"): newest_checkpoint(folder) for folder in sorted(model.glob("fold_*"))}
    return {name: file for name, file in files.items() if file is not None}


def read_checkpoint(path: Path, remedy: str = _NAME_ANOTHER, lazily: bool = False) -> dict[str, Any]:
    """A checkpoint that nnU-Net wrote, on the CPU. Nothing in it is executed.

    Args:
        path: the file.
        remedy: what to do where it cannot be used, for the message.
        lazily: whether tensors stay in the file until they are used, if its format (torch's since 1.6) allows it.

    Raises:
        E2ENetError: the file is missing, truncated, not nnU-Net's, or holds something that a checkpoint does not.
    """
    try:
        with contents_of_checkpoints():
            checkpoint: dict[str, Any] = torch.load(
                path, map_location="cpu", weights_only=True, mmap=lazily and is_zipfile(path)
            )
    except Exception as error:  # torch raises errors of many kinds, and its texts are of its options
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            raise E2ENetError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
        found = _NOT_ALLOWED.search(str(error))
        if found:
            raise E2ENetError(
                f"{path} holds {found[1]}, which is not read because a file could run code through it: expected tensors, "
                "numbers, strings, lists, dictionaries and numpy's numbers; let the trainer save those alone"
            ) from error
        raise E2ENetError(f"{path} is not a checkpoint of nnU-Net, or it is truncated: {remedy}") from error
    missing = [key for key in _KEYS if key not in checkpoint] if isinstance(checkpoint, dict) else list(_KEYS)
    if missing:
        raise E2ENetError(f"{path} has no {', '.join(missing)}: it is not a checkpoint of an nnU-Net training; {remedy}")
    return checkpoint


def check_checkpoint(path: Path, architecture: Mapping[str, Any], network: nn.Module, resumes: bool = True) -> None:
    """Raises E2ENetError unless a checkpoint is of exactly the network that is to be continued.

    Args:
        path: the checkpoint.
        architecture: entry of the plans from which the network was built.
        network: that network, not wrapped.
        resumes: whether its training goes on (``--c``); otherwise it is validated (``--val``).
    """
    checkpoint = read_checkpoint(path, _RESUME if resumes else _FINISH)
    check_architecture(path, checkpoint, architecture, "the trainer", _CONTINUE)
    weights = {key.removeprefix("module."): value for key, value in checkpoint["network_weights"].items()}  # as nnU-Net does
    shapes = {key: getattr(value, "shape", None) for key, value in network.state_dict().items()}  # not all are tensors
    wrong = [key for key, shape in shapes.items() if key not in weights or getattr(weights[key], "shape", None) != shape]
    if wrong:
        raise E2ENetError(
            f"{path} lacks {len(wrong)} of the network's tensors or has them in another shape, such as {wrong[0]}: it is not "
            "of this network; train anew, or restore the checkpoint"
        )
    parameters = dict(network.named_parameters(remove_duplicate=False))
    broken = [key for key in parameters if not torch.isfinite(weights[key]).all()]
    if broken:
        raise E2ENetError(
            f"{path} holds weights that are not finite, in {broken[0]} and {len(broken) - 1} more: the training had diverged. "
            "Remove it to resume from an earlier checkpoint, with a lower initial_lr"
        )


def check_architecture(
    path: Path, checkpoint: Mapping[str, Any], architecture: Mapping[str, Any], owner: str, remedy: str
) -> None:
    """Raises E2ENetError unless a checkpoint is of the network that an entry of plans describes.

    Args:
        path: the checkpoint, for the message.
        checkpoint: its content.
        architecture: entry of the plans.
        owner: what has this entry, for the message.
        remedy: what to do where the network is another one, for the message.
    """
    saved = _architecture(checkpoint)
    if saved.get("network_class_name") != architecture["network_class_name"]:
        raise E2ENetError(
            f"{path} is of {saved.get('network_class_name', 'an unknown network')} ({checkpoint['trainer_name']}), not of "
            f"{architecture['network_class_name']}: {remedy}"
        )
    ours, theirs = architecture["arch_kwargs"], saved["arch_kwargs"]
    for key, default in _ARCHITECTURE.items():
        wanted, found = (_plain(arguments.get(key, default)) for arguments in (ours, theirs))
        if wanted != found:
            raise E2ENetError(f"{path} was trained with {key} = {found}, but {owner} has {wanted}: {remedy}")


def _architecture(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    arguments = checkpoint["init_args"]
    configurations = dict(arguments["plans"]["configurations"])
    configuration = configurations.pop(arguments["configuration"], {})
    while "architecture" not in configuration and configuration.get("inherits_from") in configurations:
        configuration = configurations.pop(configuration["inherits_from"])
    architecture: dict[str, Any] = configuration.get("architecture", {})
    return architecture


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
