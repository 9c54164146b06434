"""A backbone: one shift block a level, after max-pooling instead of a strided convolution."""

from itertools import pairwise

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_e2enet.network import activated
from nnunetv2_e2enet.network.blocks import MAX_POOL, ShiftBlock
from nnunetv2_e2enet.training.trainer import E2ENetMixin


class PooledEncoder(nn.Module):
    def __init__(self, input_channels, features_per_stage, strides, n_conv_per_stage, style):
        super().__init__()
        self.output_channels, self.strides = list(features_per_stage), list(strides)  # what the decoder and checks read
        self.pools = nn.ModuleList(MAX_POOL[style.dimension](tuple(stride)) for stride in strides)
        self.stages = nn.ModuleList(ShiftBlock(*pair, style) for pair in pairwise([input_channels, *features_per_stage]))

    def forward(self, x):  # to one feature map a level, finest first
        maps = [self.stages[0](self.pools[0](x))]
        for pool, block in list(zip(self.pools, self.stages, strict=True))[1:]:
            maps.append(block(pool(activated(maps[-1]))))
        return maps


class nnUNetTrainerE2ENet_pooled(E2ENetMixin, nnUNetTrainer):
    encoder_class = PooledEncoder
