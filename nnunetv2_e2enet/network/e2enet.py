"""E2ENet (Wu et al., NeurIPS 2024, arXiv 2312.04727): encoder, triangle of fusion nodes, heads."""

from __future__ import annotations

import pydoc
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import accounts
from nnunetv2_e2enet.network.acceleration import accelerated, kernels_may_compute, prepare_kernels
from nnunetv2_e2enet.network.blocks import CONV, KERNEL_SIZE, BlockStyle, ShiftBlock
from nnunetv2_e2enet.network.compact import store_active_if_in_blocks, store_all
from nnunetv2_e2enet.network.connections import MaskableLayer, check_sparsity, he_normal_, maskable_layers
from nnunetv2_e2enet.network.depth_shift import check_shift_size, check_trained_shift_size
from nnunetv2_e2enet.network.encoder import Encoder
from nnunetv2_e2enet.network.fusion import FusionDecoder
from nnunetv2_e2enet.network.recomputation import check_recompute


def e2enet_features(n_stages: int, base: int = 48, maximum: int = 320) -> list[int]:
    """Channels of each level as in the paper: doubled from level to level, up to a maximum."""
    return [min(base * 2**level, maximum) for level in range(n_stages)]


class E2ENet(nn.Module):
    """Efficient-to-efficient network with dynamic sparse feature fusion.

    The arguments are those of nnU-Net's plans, so stock nnU-Net builds the network from a plans file. A fresh network has a
    random topology of the given sparsity, drawn from torch's global random state.

    Args:
        input_channels: channels of the image.
        num_classes: channels of the logits.
        n_stages: number of levels, at least 2.
        features_per_stage: channels of each level, finest first (one number for all).
        conv_op: ``nn.Conv3d`` or ``nn.Conv2d``.
        strides: stride into each level, a number or one number an axis; the first is 1 in nnU-Net's plans, as logits have the
            size of the finest level.
        n_conv_per_stage: shift blocks in each encoder level (the paper's network has 2).
        kernel_sizes: accepted from plans and not used: all kernels are of ``kernel_size``.
        n_conv_per_stage_decoder: accepted from plans and not used: a fusion node has one block, the last of a level two.
        conv_bias: bias of the convolutions of shift blocks.
        norm_op, norm_op_kwargs: normalisation; instance norm with learned scale and offset unless given.
        dropout_op, dropout_op_kwargs: dropout after each convolution; none unless given.
        nonlin, nonlin_kwargs: activation; leaky ReLU with slope 0.01 unless given.
        deep_supervision: return the logits of all heads, finest first, instead of the finest alone.
        feature_sparsity: share of connections that are off in every maskable layer, from 0 to below 1.
        shift_size: channel groups of the depth shift, odd; 1 shifts nothing.
        kernel_size: of all convolutions of shift blocks, three odd numbers, depth first; in 2D the last two count.
        learned_shift: let each channel learn how far it moves (see LearnedDepthShift).
        encoder_class: backbone, a class or its dotted name, with the arguments of Encoder, which it is unless given.
        decoder_class: fusion and heads, a class or its dotted name, with the arguments of FusionDecoder, which it is unless
            given.

    Raises:
        E2ENetError: an argument cannot be used, or the patch cannot be divided by the strides.

    Attributes:
        encoder: backbone with ``stages``, ``output_channels``, ``strides``.
        decoder: fusion stages with ``deep_supervision`` and ``seg_layers``.
        predicts_only: whether it is built to predict. Of weights whose topology is in equal blocks, only active ones are then
            stored, where the kernels may compute them.
    """

    predicts_only = False

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        strides: int | Sequence[int | Sequence[int]],
        n_conv_per_stage: int | Sequence[int] = 2,
        kernel_sizes: Any = None,  # noqa: ARG002 (plans hold it)
        n_conv_per_stage_decoder: Any = None,  # noqa: ARG002 (plans hold it)
        conv_bias: bool = True,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        feature_sparsity: float = 0.8,
        shift_size: int = 3,
        kernel_size: Sequence[int] = KERNEL_SIZE,
        learned_shift: bool = False,
        encoder_class: type[nn.Module] | str | None = None,
        decoder_class: type[nn.Module] | str | None = None,
    ) -> None:
        super().__init__()
        self.dimension = dimension_of(conv_op)
        _check_levels(n_stages)
        check_sparsity(feature_sparsity)
        check_shift_size(shift_size)
        check_kernel_size(kernel_size)
        self.input_channels = input_channels
        self.num_classes = num_classes
        self.feature_sparsity = feature_sparsity
        self.shift_size = shift_size

        features = _per_level("features_per_stage", features_per_stage, n_stages)
        n_conv = _per_level("n_conv_per_stage", n_conv_per_stage, n_stages)
        level_strides = _strides(strides, n_stages, self.dimension)
        style = BlockStyle(
            self.dimension,
            shift_size,
            conv_bias,
            norm_op,
            kernel_size=tuple(kernel_size),
            learned_shift=learned_shift,
            **_given(
                norm_op_kwargs=norm_op_kwargs,
                dropout_op=dropout_op,
                dropout_op_kwargs=dropout_op_kwargs,
                nonlin=nonlin,
                nonlin_kwargs={} if nonlin is not None and nonlin_kwargs is None else nonlin_kwargs,
            ),
        )
        encoder = located("encoder_class", encoder_class) or Encoder
        decoder = located("decoder_class", decoder_class) or FusionDecoder
        self.encoder = cast(Encoder, encoder(input_channels, features, level_strides, n_conv, style))
        self.decoder = cast(FusionDecoder, decoder(features, level_strides, num_classes, deep_supervision, style))

        self.recompute = "blocks"
        self._start()

    def _start(self) -> None:
        """Random weights, a random topology, and the kernels of the device."""
        self.apply(self.initialize)
        for _, layer in maskable_layers(self):
            layer.set_random_topology(layer.connections_at(1 - self.feature_sparsity))
        self._prepare_kernels()

    def _prepare_kernels(self) -> None:
        in_blocks = any(layer.stores_active_only for _, layer in maskable_layers(self))
        prepare_kernels(next(self.parameters()).device, convolutions=in_blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> E2ENet:
        """The hook of ``to``, ``cuda``, ``half`` and the like: afterwards the network may be on another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare_kernels()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or a network that was sent as a whole, may be the first one in its process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare_kernels()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights and masks as any module does; ``predicts_only`` says how they are stored."""
        layers = [layer for _, layer in maskable_layers(self)]
        if self.predicts_only:
            for layer in layers:
                store_all(layer)  # the blocks of these weights may be others
        keys = super().load_state_dict(state_dict, *args, **kwargs)
        if self.predicts_only and kernels_may_compute():
            for layer in layers:
                store_active_if_in_blocks(layer)
        return keys

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """``(batch, input_channels, *patch)`` to ``(batch, num_classes, *patch)``; a list of them with deep supervision."""
        self.check_patch_size(x.shape[2:])
        logits = accelerated(self, x)
        return self.decoder(self.encoder(x)) if logits is None else logits

    @property
    def recompute(self) -> str:
        """The mode of recomputation in the backward pass; results do not depend on it.

        "none" keeps everything. "blocks" (the default) keeps one map of each shift block, the output of its convolution, and
        computes norms, activations, shifts, concatenations and the upward and downward flow again. "nodes" keeps one map of
        each fusion node and encoder level, and computes the first of two successive convolutions again as well.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: str) -> None:
        """Raises E2ENetError if ``value`` is none of these."""
        check_recompute(value)
        self._recompute = value
        for module in self.modules():
            if isinstance(module, (ShiftBlock, FusionDecoder)):
                module.recompute = value

    def check_patch_size(self, patch_size: Sequence[int]) -> None:
        """Raises E2ENetError unless the strides divide ``patch_size``."""
        divisor = [prod(axis) for axis in zip(*self.encoder.strides, strict=True)]
        if len(patch_size) != self.dimension:
            raise E2ENetError(f"the patch has {len(patch_size)} axes {list(patch_size)}, the network {self.dimension}")
        if any(size % d for size, d in zip(patch_size, divisor, strict=True)):
            raise E2ENetError(
                f"the patch {list(patch_size)} cannot be divided by the network's strides, in all {divisor}: "
                "change patch_size in the plans to multiples of them"
            )

    def get_extra_state(self) -> Tensor:
        """The shift size, saved with the weights, since their shapes do not depend on it."""
        return torch.tensor(self._effective_shift_size)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises E2ENetError if the weights were trained with another shift size."""
        check_trained_shift_size(state, self._effective_shift_size)

    @property
    def _effective_shift_size(self) -> int:
        return self.shift_size if self.dimension == 3 else 1

    @staticmethod
    @torch.no_grad()
    def initialize(module: nn.Module) -> None:
        """He normal weights (slope 0.01) and zero biases; for ``network.apply``, as nnU-Net does after building."""
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            if isinstance(module, MaskableLayer):
                module.initialize_weights()
            else:
                he_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements of all convolution outputs for one patch, nnU-Net's measure of a network's memory.

        Args:
            input_size: the patch without batch and channels.
        """
        self.check_patch_size(input_size)
        return accounts.conv_output_elements(self, (1, self.input_channels, *input_size))

    def saved_bytes(self, patch_size: Sequence[int], batch_size: int = 1) -> int:
        """Bytes that autograd keeps from the forward pass for the backward pass, in the dtype of the weights."""
        self.check_patch_size(patch_size)
        return accounts.saved_bytes(self, (batch_size, self.input_channels, *patch_size))


def located(argument: str, component: type[nn.Module] | str | None) -> type[nn.Module] | None:
    """The class that ``component`` is or names; None for None.

    Raises:
        E2ENetError: the name leads to no class of modules.
    """
    found = pydoc.locate(component) if isinstance(component, str) else component
    if found is None and component is None:
        return None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise E2ENetError(
            f"{argument} is {component!r}, which cannot be imported as a class of torch modules: make the module that defines "
            "it importable (PYTHONPATH, or pip install) wherever the network is trained or predicts"
        )
    return found


def _check_levels(n_stages: int) -> None:
    if n_stages < 2:
        raise E2ENetError(
            f"the plans have {n_stages} level(s), but E2ENet fuses at least 2: plan with a larger patch, or train this "
            "configuration with a stock trainer"
        )


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None; BlockStyle has defaults for the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def dimension_of(conv_op: object) -> int:
    """The dimension of ``nn.Conv2d`` or ``nn.Conv3d``, or of the name of one of them.

    Raises:
        E2ENetError: ``conv_op`` is neither.
    """
    for dimension, conv in CONV.items():
        if conv_op is conv or (isinstance(conv_op, str) and conv_op.endswith(f"Conv{dimension}d")):
            return dimension
    raise E2ENetError(f"conv_op is {conv_op!r}, but E2ENet is built of torch.nn.Conv3d or torch.nn.Conv2d")


def check_kernel_size(kernel_size: Sequence[int]) -> None:
    """Raises E2ENetError unless ``kernel_size`` is three odd numbers."""
    odd = isinstance(kernel_size, Sequence) and all(isinstance(k, int) and k > 0 and k % 2 for k in kernel_size)
    if not odd or len(kernel_size) != 3:
        raise E2ENetError(
            f"kernel_size is {kernel_size!r}, but three odd numbers are needed, depth first, such as [1, 3, 3] or [3, 3, 3]"
        )


def _per_level(name: str, value: int | Sequence[int], n_stages: int) -> list[int]:
    values = [value] * n_stages if isinstance(value, int) else list(value)
    if len(values) != n_stages or any(v < 1 for v in values):
        raise E2ENetError(f"{name} is {value}, but one number of at least 1 is needed for each of the {n_stages} levels")
    return values


def _strides(strides: int | Sequence[int | Sequence[int]], n_stages: int, dimension: int) -> list[list[int]]:
    given = [strides] * n_stages if isinstance(strides, int) else list(strides)
    levels = [[s] * dimension if isinstance(s, int) else [int(i) for i in s] for s in given]
    if len(levels) != n_stages or any(len(s) != dimension or min(s) < 1 for s in levels):
        raise E2ENetError(f"strides is {strides}, but {n_stages} levels of {dimension} numbers of at least 1 each are needed")
    return levels
