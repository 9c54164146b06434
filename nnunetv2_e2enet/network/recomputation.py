"""Checkpoints that let autograd compute maps again in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network._raw_map import FeatureMap, flatten, regroup

RECOMPUTE = ("none", "blocks", "nodes")
"""The modes of recomputation, which say what the backward pass computes again.

- ``none``: nothing;
- ``blocks``: all of a block but its convolution, so that one map a block is kept;
- ``nodes``: all of a node but its last convolution, so that one map a node is kept. An encoder level is a node, too.
"""


def check_recompute(value: str) -> None:
    """Raises E2ENetError unless ``value`` is one of RECOMPUTE."""
    if value not in RECOMPUTE:
        raise E2ENetError(f"recompute is {value!r}: use one of {', '.join(RECOMPUTE)}")


def _all_again() -> Any:
    """The contexts of a checkpoint in which nothing is kept, as in any checkpoint.

    PyTorch 2.11 forgets it within autograd functions of a compiled network unless it is told.
    """
    return create_selective_checkpoint_contexts(_prefer_recompute)


def _prefer_recompute(*_operation: Any, **_arguments: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def convolved(
    conv: Callable[[Any], Tensor],
    read: Callable[..., Any],
    maps: Sequence[FeatureMap],
    recompute: bool,
    random: bool = False,
) -> Tensor:
    """``conv(read(*maps))``; with ``recompute``, autograd keeps the maps alone and reads them again in the backward pass.

    The convolution is not computed again: its backward pass needs its input, and there recomputation stops.

    Args:
        conv: a convolution of what ``read`` returns.
        read: makes a tensor, or other maps, from the maps.
        maps: input maps of a block.
        recompute: whether autograd keeps the maps alone.
        random: whether ``read`` draws random numbers, which are then drawn again.
    """
    if not (recompute and torch.is_grad_enabled()):
        return conv(read(*maps))
    tensors, slopes = flatten(maps)

    def read_again(*tensors: Tensor) -> Any:
        return read(*regroup(tensors, slopes))

    if torch.compiler.is_compiling():  # the compiler computes no convolution again unless it is told to
        read_maps = checkpoint(read_again, *tensors, use_reentrant=False, preserve_rng_state=random, context_fn=_all_again)
        return conv(read_maps)

    def convolve(*tensors: Tensor) -> Tensor:
        return conv(read_again(*tensors))

    return cast(Tensor, checkpoint(convolve, *tensors, use_reentrant=False, preserve_rng_state=random))
