"""The network and its costs, in torch alone."""

from nnunetv2_e2enet.network.accounts import Counts
from nnunetv2_e2enet.network.compact import store_active_only
from nnunetv2_e2enet.network.connections import MaskableLayer, maskable_layers
from nnunetv2_e2enet.network.depth_shift import activated, depth_shift
from nnunetv2_e2enet.network.e2enet import E2ENet, e2enet_features
from nnunetv2_e2enet.network.fusion import fusion_flows, fusion_nodes

__all__ = [
    "Counts",
    "E2ENet",
    "MaskableLayer",
    "activated",
    "depth_shift",
    "e2enet_features",
    "fusion_flows",
    "fusion_nodes",
    "maskable_layers",
    "store_active_only",
]
