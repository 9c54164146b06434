"""A trained model in one file: all folds, active weights only, plans, labels and postprocessing.

The file is in the safetensors format, which holds named arrays and text, and nothing that could be executed. Its text is one
JSON object with the description of the model and a checksum of everything; its arrays are named ``FOLD/NAME``, the names of
the network's state (``packing``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from nnunetv2_e2enet.deployment.description import Description
from nnunetv2_e2enet.deployment.packing import Arrays, Declared, check_declared, unpack
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import write
from nnunetv2_e2enet.machine import is_out_of_memory, out_of_memory_in_one_line
from nnunetv2_e2enet.settings import settings

FORMAT = 1
KEY = "nnunetv2-e2enet"

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "U8": np.dtype(np.uint8), "I64": np.dtype(np.int64)}
"""Weights, masks, counters of batch norms."""

T = TypeVar("T")


class _NewerFormatError(ValueError):
    """A file was written by a newer version of this package."""


@dataclass(frozen=True)
class PackedModel:
    """A trained model as it is stored.

    Attributes:
        description: all but the weights.
        folds: arrays of each fold, by its name, as ``packing.pack`` makes them.
    """

    description: Description
    folds: dict[str, Arrays]

    def states(self) -> Iterator[dict[str, Tensor]]:
        """The state of the network for each fold, one after another.

        Raises:
            E2ENetError: the weights are not of the network in the plans.
        """
        network = self.description.network()
        for fold in self.description.folds:
            yield unpack(self.folds[fold], network)

    def with_folds(self, names: Sequence[str | int] | str | int) -> PackedModel:
        """The same model with some of its folds. Postprocessing, which was found for all of them, stays with all of them.

        Raises:
            E2ENetError: it has not all of them.
        """
        wanted = list(dict.fromkeys(map(str, [names] if isinstance(names, (str, int)) else names)))
        missing = [name for name in wanted if name not in self.folds]
        if missing or not wanted:
            raise E2ENetError(
                f"the model has the folds {', '.join(self.description.folds)}, not {', '.join(missing) or 'none'}: choose of "
                "these, or export it again"
            )
        kept = self.description.postprocessing if set(wanted) == set(self.folds) else []
        description = replace(self.description, folds=wanted, postprocessing=kept)
        return PackedModel(description, {name: self.folds[name] for name in wanted})

    @property
    def foreground(self) -> dict[str, list[int]]:
        """Name of each label or region but the background, and the values that belong to it in a segmentation.

        Values may be written "1" or 1.0, which nnU-Net converts, too.
        """
        named = {name: v for name, v in self.description.dataset["labels"].items() if name not in ("background", "ignore")}
        return {name: [int(n) for n in (v if isinstance(v, (list, tuple)) else [v])] for name, v in named.items()}

    @property
    def channels(self) -> list[str]:
        """Names of the channels of an image, in their order."""
        return [str(name) for name in self.description.channel_names.values()]

    @property
    def active_weights(self) -> int:
        """Weights and biases of one fold."""
        first = self.folds[self.description.folds[0]]
        return sum(array.size for name, array in first.items() if not name.endswith(".mask"))


def write_packed(path: Path, model: PackedModel) -> int:
    """Write or replace a file.

    Returns:
        Its size in bytes.

    Raises:
        E2ENetError: it cannot be written; what was there before is left.
    """
    data = serialized(model.description.as_json(), _joined(model.folds))
    write(path, data)
    return len(data)


def serialized(description: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Content of a file."""
    content = {"format": FORMAT, "sha256": checksum(description, arrays), "model": description}
    text = json.dumps(content, separators=(",", ":"))
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()}, {KEY: text})


def read_packed(path: Path) -> PackedModel:
    """The model in a file. Nothing in it is executed. Memory is taken for the model alone.

    Raises:
        E2ENetError: the file is missing, truncated, altered or something else, or holds what cannot be used; or there is too
            little memory.
    """
    settings()  # a wrong one is no fault of the file
    if path.is_dir():
        raise E2ENetError(
            f"{path} is a folder: export it first (e2enet export {path} FILE), or use nnUNetv2_predict_from_modelfolder"
        )
    if not path.is_file():
        raise E2ENetError(f"{path} is not a file: expected one that e2enet export wrote")
    try:
        path.open("rb").close()
    except OSError as error:
        raise E2ENetError(f"cannot read {path} ({error.strerror}): check its permissions, and the disk") from error
    with out_of_memory_in_one_line():
        return _checked(path)


def _checked(path: Path) -> PackedModel:
    try:
        model = _read(path)
        for _ in model.states():  # do they fit?
            pass
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if is_out_of_memory(error):
            raise
        if path.suffix == ".pth":
            raise E2ENetError(
                f"{path} is a checkpoint, not a file that e2enet export wrote: export its model folder (e2enet export "
                "MODEL_FOLDER FILE)"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "update the package" if isinstance(error, _NewerFormatError) else "remove it and export the model again"
        raise E2ENetError(f"{path} cannot be read as a packed model ({reason}): {remedy}") from error
    return model


def is_packed(path: Path) -> bool:
    """Whether a file is a packed model, by its text alone."""
    try:
        with safe_open(path, framework="numpy") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def checksum(description: Any, arrays: Arrays) -> str:
    """SHA-256 of the whole content of a file."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _read(path: Path) -> PackedModel:
    """The model in a file. Arrays are read once their types and shapes are known to be those of its network."""
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ValueError("it is not of this package")
        content = json.loads(text)
        written = content.get("format") if isinstance(content, dict) else None
        if type(written) is int and written > FORMAT:
            raise _NewerFormatError(
                f"its format is {written}, this version reads {FORMAT}: written by a newer version of this package"
            )
        if written != FORMAT:
            raise ValueError(f"its format is not {FORMAT}, the one that this version reads")
        description = Description.from_json(content.get("model"))
        network, names = description.network(), file.keys()
        for declared in _divided({name: _declared(name, file.get_slice(name)) for name in names}, description.folds).values():
            check_declared(declared, network)
        arrays: Arrays = {name: file.get_tensor(name) for name in names}
    if content.get("sha256") != checksum(content["model"], arrays):
        raise ValueError("its content does not match its checksum")
    return PackedModel(description, _divided(arrays, description.folds))


def _declared(name: str, part: Any) -> Declared:
    dtype, shape = part.get_dtype(), tuple(part.get_shape())
    if dtype not in _DTYPES or len(shape) > 8:
        raise ValueError(f"{name} is {dtype} of shape {list(shape)}")
    return _DTYPES[dtype], shape


def _joined(folds: Mapping[str, Arrays]) -> Arrays:
    return {f"{fold}/{name}": array for fold, arrays in folds.items() for name, array in arrays.items()}


def _divided(parts: Mapping[str, T], folds: Sequence[str]) -> dict[str, dict[str, T]]:
    """What belongs to each fold, by the names without it."""
    divided: dict[str, dict[str, T]] = {fold: {} for fold in folds}
    for full_name, part in parts.items():
        fold, _, name = full_name.partition("/")
        if fold not in divided:
            raise ValueError(f"{full_name} is of no fold that it describes")
        divided[fold][name] = part
    return divided
