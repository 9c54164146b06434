"""Feature fusion (paper, section 3.2): a triangle of nodes, each fed by three flows.

Node ``x[j, i]`` (level ``j``, stage ``i``) fuses the maps of stage ``i - 1``: its own level (*forward* flow), the coarser
level after a transposed conv (*upward* flow), and the finer level after max-pooling (*downward* flow). The nodes of one stage
do not depend on each other. Stage 0 is the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network._raw_map import FeatureMap
from nnunetv2_e2enet.network.blocks import CONV, MAX_POOL, BlockStyle, ShiftBlock, chain
from nnunetv2_e2enet.network.compact import CompactLayer
from nnunetv2_e2enet.network.connections import MASKED_CONV_TRANSPOSE, MaskableLayer
from nnunetv2_e2enet.network.depth_shift import activated
from nnunetv2_e2enet.network.pooling import pooled
from nnunetv2_e2enet.network.recomputation import RECOMPUTE, convolved

SOURCES = {"forward": 0, "upward": 1, "downward": -1}
"""The level from which a flow comes, counted from the level of its node, in the order of the concatenation."""


class FusionNode(nn.Module):
    """One node. All its convolutions are maskable.

    Args:
        stage, level: of the node; stages count from 1.
        features_per_stage: channels of each level, finest first.
        strides: stride into each level.
        flows: names of the flows that the node fuses, of SOURCES.
        n_blocks: shift blocks; 2 in the last node of a level, otherwise 1.
        style: settings of all blocks.

    Attributes:
        stage, level: of the node.
        flows: channels of each flow in the concatenation that the first block takes.

    Raises:
        E2ENetError: a flow has no such name, or comes from a level that the network does not have.
    """

    def __init__(
        self,
        stage: int,
        level: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        flows: Sequence[str],
        n_blocks: int,
        style: BlockStyle,
    ) -> None:
        super().__init__()
        self.stage, self.level = stage, level
        self.flows: dict[str, slice] = {}
        channels, width = features_per_stage[level], 0
        for flow in _checked(flows, stage, level):
            first = width
            width += features_per_stage[level - 1] if flow == "downward" else channels
            self.flows[flow] = slice(first, width)
        self.upsample: MaskableLayer | None = None
        self.downsample: nn.Module | None = None
        if "upward" in self.flows:
            kernel = tuple(strides[level + 1])
            coarser = features_per_stage[level + 1]
            self.upsample = MASKED_CONV_TRANSPOSE[style.dimension](coarser, channels, kernel, kernel, bias=False)
        if "downward" in self.flows:
            self.downsample = MAX_POOL[style.dimension](tuple(strides[level]))
        blocks = [ShiftBlock(width, channels, style, maskable=True)]
        blocks += [ShiftBlock(channels, channels, style, maskable=True) for _ in range(n_blocks - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, maps: Sequence[FeatureMap]) -> FeatureMap:
        """The maps of the former stage, finest level first, to this node's."""
        sources = [maps[self.level + SOURCES[flow]] for flow in self.flows]
        return chain(self.blocks, *sources, flows=self._flows)

    def _flows(self, *maps: FeatureMap) -> list[FeatureMap]:
        return [self._flow(flow, source) for flow, source in zip(self.flows, maps, strict=True)]

    def _flow(self, flow: str, source: FeatureMap) -> FeatureMap:
        if flow == "upward" and self.upsample is not None:
            reads_maps = isinstance(self.upsample, CompactLayer) and self.upsample.reads_maps(source)
            return cast(Tensor, self.upsample([source] if reads_maps else activated(source)))
        if flow == "downward" and self.downsample is not None:
            return pooled(source, self.downsample)
        return source


def _checked(flows: Sequence[str], stage: int, level: int) -> list[str]:
    known = [flow for flow in SOURCES if flow in flows and level + SOURCES[flow] >= 0]
    if not known or len(known) != len(flows):
        raise E2ENetError(
            f"the node of stage {stage}, level {level} shall fuse the flows {', '.join(flows) or 'none'}: use one or more of "
            f"{', '.join(flow for flow in SOURCES if level + SOURCES[flow] >= 0)}, each once"
        )
    return known


def fusion_nodes(network: nn.Module) -> dict[str, FusionNode]:
    """All fusion nodes in ``network``, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, FusionNode)}


def fusion_flows(network: nn.Module) -> dict[str, dict[str, slice]]:
    """Input channels of each flow, for every convolution in ``network`` that fuses flows, by its name."""
    return {f"{name}.blocks.0.conv": node.flows for name, node in fusion_nodes(network).items()}


class FusionDecoder(nn.Module):
    """All fusion stages and the heads.

    A subclass that overrides ``flows`` is another wiring (docs/extending.md).

    ``deep_supervision`` and ``seg_layers`` are named and ordered as in ``dynamic_network_architectures``: heads from the
    coarsest to the finest, ``seg_layers[-1]`` gives the segmentation. nnU-Net's loss gives weight to each of these heads.

    Args:
        features_per_stage: channels of each level, finest first.
        strides: stride into each level.
        num_classes: output channels of the heads.
        deep_supervision: whether ``forward`` returns the outputs of all heads.
        style: settings of all blocks.
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
                    stage=stage,
                    level=level,
                    features_per_stage=features_per_stage,
                    strides=strides,
                    flows=self.flows(stage, level),
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

    def flows(self, stage: int, level: int) -> Sequence[str]:  # noqa: ARG002 (a wiring may differ from stage to stage)
        """Names of the flows that a node fuses, of SOURCES: those from levels that exist."""
        return [flow for flow, source in SOURCES.items() if level + source >= 0]

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor | list[Tensor]:
        """Encoder maps, finest first, to logits; with deep supervision a list of them, finest first."""
        maps = list(maps)
        last: dict[int, FeatureMap] = {}
        for nodes in cast(Iterable[nn.ModuleList], self.stages):
            maps = [node(maps) for node in nodes]
            last[len(nodes) - 1] = maps[-1]
        heads = list(reversed(self.seg_layers))[: None if self.deep_supervision else 1]
        recompute = self.recompute != "none" and self.training
        logits = [convolved(head, activated, (last[level],), recompute) for level, head in enumerate(heads)]
        return logits if self.deep_supervision else logits[0]
