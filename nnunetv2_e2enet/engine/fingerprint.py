"""A check that the weights are still those that were packed, cheap enough for every patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from nnunetv2_e2enet.engine.core import Core
from nnunetv2_e2enet.network import MaskableLayer

ROUND_BYTES = 3 << 20  # of weights that are checked in full at each question, in turn


def state(network: nn.Module) -> list[Tensor]:
    """All that the logits depend on, parameters and masks, in a fixed order."""
    found: list[Tensor] = []
    for module in network.modules():
        found += [parameter for parameter in module._parameters.values() if parameter is not None]
        if isinstance(module, MaskableLayer):
            found.append(module.mask)
    return found


@dataclass
class Fingerprint:
    """The state of weights at one moment.

    Attributes:
        storages: of the tensors. As long as they are referred to, even weakly, no other has the number of one of them.
        identity: of each tensor the number of its storage, where it lies, its size and how often it was written. Writes
            through ``.data`` are not counted, nor any to tensors that were made in inference mode.
        sample: of a few words of each tensor, which sees such writes unless they leave most of a tensor alone.
        sums: of each tensor its shape and a sum of all its bytes.
        turn: the next tensor to check in full.
    """

    storages: list[StorageWeakRef]
    identity: list[tuple[int, int, int, int]]
    sample: int
    sums: list[tuple[torch.Size, int]]
    turn: int = 0

    @classmethod
    def take(cls, tensors: list[Tensor], core: Core) -> Fingerprint:
        """The fingerprint of the tensors as they are now."""
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        return cls(storages, _identity(tensors), _sample(tensors, core), [_sum(tensor, core) for tensor in tensors])

    def holds(self, tensors: list[Tensor], core: Core) -> bool:
        """Whether the tensors appear unchanged: compares identity and sample of all, and some of them in full."""
        if self.identity != _identity(tensors) or self.sample != _sample(tensors, core):
            return False
        checked = 0
        while checked < ROUND_BYTES:
            tensor = tensors[self.turn]
            if self.sums[self.turn] != _sum(tensor, core):
                return False
            checked += max(1, tensor.nbytes)
            self.turn = (self.turn + 1) % len(tensors)
            if self.turn == 0:
                break
        return True

    def same_content(self, other: Fingerprint) -> bool:
        """Whether two fingerprints are of tensors with the same shapes and bytes."""
        return self.sums == other.sums


def _identity(tensors: list[Tensor]) -> list[tuple[int, int, int, int]]:
    return [(t.untyped_storage()._cdata, t.data_ptr(), t.nbytes, -1 if t.is_inference() else t._version) for t in tensors]


def _sample(tensors: list[Tensor], core: Core) -> int:
    flat = [t if t.is_contiguous() else t.detach().contiguous() for t in tensors]
    return core.sample([t.data_ptr() for t in flat], [t.nbytes for t in flat])


def _sum(tensor: Tensor, core: Core) -> tuple[torch.Size, int]:
    flat = tensor.detach().contiguous()
    return flat.shape, core.checksum(flat.data_ptr(), flat.nbytes, torch.get_num_threads())
