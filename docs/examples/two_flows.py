"""A fusion wiring: the forward and the upward flow alone, as in a U-Net++, without the downward flow."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_e2enet.network.fusion import FusionDecoder
from nnunetv2_e2enet.training.trainer import E2ENetMixin


class TwoFlows(FusionDecoder):
    def flows(self, stage, level):
        """Names of the flows that a node fuses: of "forward", "upward" and, from level 1 on, "downward"."""
        return ["forward", "upward"]


class nnUNetTrainerE2ENet_twoFlows(E2ENetMixin, nnUNetTrainer):
    decoder_class = TwoFlows
