"""Feature fusion (paper, section 3.2): a triangle of nodes, each fed by three flows.

Node ``x[j, i]`` (level ``j``, stage ``i``) fuses the maps of stage ``i - 1``: its own level (*forward* flow), the coarser
level after a transposed conv (*upward* flow), and the finer level after max-pooling (*downward* flow). The nodes of one stage
do not depend on each other. Stage 0 is the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from nnunetv2_e2enet.network._raw_map import FeatureMap
from nnunetv2_e2enet.network.blocks import CONV, MAX_POOL, BlockStyle, ShiftBlock, chain
from nnunetv2_e2enet.network.connections import MASKED_CONV_TRANSPOSE
from nnunetv2_e2enet.network.depth_shift import activated
from nnunetv2_e2enet.network.recomputation import RECOMPUTE, convolved


class FusionNode(nn.Module):
    """One node. All its convolutions are maskable.

    Args:
        channels: channels of this node and of its forward flow.
        coarser: channels of the next coarser level, where the upward flow comes from.
        upward_stride: stride between this level and the coarser one.
        finer: channels of the next finer level, 0 where there is none.
        downward_stride: stride between the finer level and this one.
        n_blocks: shift blocks; 2 in the last node of a level, otherwise 1.
        style: what the blocks of the network have in common.

    Attributes:
        flows: channels of each flow in the concatenation that the first block takes.
    """

    def __init__(
        self,
        channels: int,
        coarser: int,
        upward_stride: Sequence[int],
        finer: int,
        downward_stride: Sequence[int],
        n_blocks: int,
        style: BlockStyle,
    ) -> None:
        super().__init__()
        kernel = tuple(upward_stride)
        self.upsample = MASKED_CONV_TRANSPOSE[style.dimension](coarser, channels, kernel, kernel, bias=False)
        self.downsample = MAX_POOL[style.dimension](tuple(downward_stride)) if finer else None
        blocks = [ShiftBlock(channels + channels + finer, channels, style, maskable=True)]
        blocks += [ShiftBlock(channels, channels, style, maskable=True) for _ in range(n_blocks - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.flows = {"forward": slice(0, channels), "upward": slice(channels, 2 * channels)}
        if finer:
            self.flows["downward"] = slice(2 * channels, 2 * channels + finer)

    def forward(self, same: FeatureMap, coarser: FeatureMap, finer: FeatureMap | None) -> FeatureMap:
        maps = (same, coarser) if finer is None else (same, coarser, finer)
        return chain(self.blocks, *maps, flows=self._flows)

    def _flows(self, same: FeatureMap, coarser: FeatureMap, *finer: FeatureMap) -> list[FeatureMap]:
        flows = [same, self.upsample(activated(coarser))]
        if self.downsample is not None:
            flows += [self.downsample(activated(m)) for m in finer]
        return flows


def fusion_flows(network: nn.Module) -> dict[str, dict[str, slice]]:
    """Input channels of each flow, for every convolution in ``network`` that fuses flows, by its name."""
    return {f"{name}.blocks.0.conv": node.flows for name, node in network.named_modules() if isinstance(node, FusionNode)}


class FusionDecoder(nn.Module):
    """All fusion stages and the heads.

    ``deep_supervision`` and ``seg_layers`` are named and ordered as in ``dynamic_network_architectures``: heads from the
    coarsest to the finest, ``seg_layers[-1]`` gives the segmentation. They are those to which nnU-Net's loss gives weight.

    Args:
        features_per_stage: channels of each level, finest first.
        strides: stride into each level.
        num_classes: output channels of the heads.
        deep_supervision: whether ``forward`` returns the outputs of all heads.
        style: what the blocks of the network have in common.
    """

    def __init__(
        self,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        num_classes: int,
        deep_supervision: bool,
        style: BlockStyle,
    ) -> None:
        super().__init__()
        levels = len(features_per_stage)
        self.recompute = RECOMPUTE[0]
        self.deep_supervision = deep_supervision
        self.stages = nn.ModuleList(
            nn.ModuleList(
                FusionNode(
                    channels=features_per_stage[level],
                    coarser=features_per_stage[level + 1],
                    upward_stride=strides[level + 1],
                    finer=features_per_stage[level - 1] if level else 0,
                    downward_stride=strides[level],
                    n_blocks=2 if level + stage == levels - 1 else 1,
                    style=style,
                )
                for level in range(levels - stage)
            )
            for stage in range(1, levels)
        )
        heads = max(0, levels - 3) + 1
        self.seg_layers = nn.ModuleList(
            CONV[style.dimension](features_per_stage[level], num_classes, 1, bias=False) for level in reversed(range(heads))
        )

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor | list[Tensor]:
        """Encoder maps, finest first, to logits; with deep supervision a list of them, finest first."""
        maps = list(maps)
        last: dict[int, FeatureMap] = {}
        for nodes in cast(Iterable[nn.ModuleList], self.stages):
            maps = [node(maps[level], maps[level + 1], maps[level - 1] if level else None) for level, node in enumerate(nodes)]
            last[len(nodes) - 1] = maps[-1]
        heads = list(reversed(self.seg_layers))[: None if self.deep_supervision else 1]
        recompute = self.recompute != "none" and self.training
        logits = [convolved(head, activated, (last[level],), recompute) for level, head in enumerate(heads)]
        return logits if self.deep_supervision else logits[0]
