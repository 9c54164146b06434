"""Topologies under DistributedDataParallel: sent once at the start and with each update, not with each step."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_e2enet.network import maskable_layers


def share_topology(network: nn.Module) -> None:
    """Give all processes the topology of the first one, and keep DistributedDataParallel from sending it again.

    DistributedDataParallel would send all masks before each forward pass, though updates are the same on all ranks
    (``TopologyUpdater``). Call this before DistributedDataParallel wraps the network, compiled or not.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    kinds = ("mask", "explored", "active_inputs")  # the last of layers that store active weights alone
    layers = dict(maskable_layers(network))
    names = [f"{prefix}{name}.{kind}" for name in layers for kind in kinds for prefix in ("", "_orig_mod.")]
    for layer in layers.values():
        for flags in (layer.mask, layer.explored):
            sent = flags.to(torch.uint8)  # gloo sends no bool
            distributed.broadcast(sent, src=0)
            flags.copy_(sent.bool())
        layer.clear_inactive_weights()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)
