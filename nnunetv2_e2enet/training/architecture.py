"""E2ENet as the ``architecture`` entry of nnU-Net's plans."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, e2enet_features
from nnunetv2_e2enet.network.e2enet import dimension_of

NETWORK_CLASS_NAME = "nnunetv2_e2enet.network.E2ENet"
CONVERTED_NETWORK = "nnunetv2_e2enet.network.conversion.converted_network"
BASE_NUM_FEATURES = 48
MAX_NUM_FEATURES = 320

_CLASS_NAMES = (NETWORK_CLASS_NAME, f"{E2ENet.__module__}.{E2ENet.__name__}")


def is_e2enet(architecture: Mapping[str, Any]) -> bool:
    """Whether an architecture entry of plans is of E2ENet."""
    return architecture["network_class_name"] in _CLASS_NAMES


def e2enet_architecture(
    architecture: dict[str, Any],
    base_num_features: int = BASE_NUM_FEATURES,
    max_num_features: int = MAX_NUM_FEATURES,
    **settings: Any,
) -> dict[str, Any]:
    """The architecture entry that makes nnU-Net build E2ENet in the place of the network in ``architecture``.

    Levels, strides and dimension are taken over. If ``architecture`` is E2ENet already, its other values are kept as well;
    otherwise channels, convolutions and norms are E2ENet's own.

    Args:
        architecture: of any configuration of any plans; not changed.
        base_num_features: channels of the finest level, where the plans are not E2ENet's.
        max_num_features: upper limit of the channels of a level, where the plans are not E2ENet's.
        settings: arguments of E2ENet that override those of the plans, such as ``feature_sparsity`` and ``shift_size``.

    Raises:
        E2ENetError: the entry has no strides, or no convolution of a known dimension; channels are no whole numbers.
    """
    for name, channels in (("base_num_features", base_num_features), ("max_num_features", max_num_features)):
        if not isinstance(channels, int) or channels < 1:
            raise E2ENetError(
                f"{name} is {channels!r}, but it is a number of channels: use a whole number such as {BASE_NUM_FEATURES}"
            )
    result = deepcopy(architecture)
    if is_e2enet(architecture):
        result["network_class_name"] = NETWORK_CLASS_NAME
        result["arch_kwargs"].pop("kernel_sizes", None)
        result["arch_kwargs"].pop("n_conv_per_stage_decoder", None)
    else:
        given = architecture["arch_kwargs"]
        missing = [name for name in ("strides", "conv_op") if name not in given]
        if missing:
            raise E2ENetError(
                f"the plans' network {architecture['network_class_name']} has no {' and no '.join(missing)}: take plans of a "
                "U-Net, such as nnUNetPlans, a ResEnc preset, or nnUNetE2ENetPlans"
            )
        dimension = dimension_of(given["conv_op"])
        n_stages = len(given["strides"])
        result["network_class_name"] = NETWORK_CLASS_NAME
        result["arch_kwargs"] = {
            "n_stages": n_stages,
            "features_per_stage": e2enet_features(n_stages, base_num_features, max_num_features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
            "strides": deepcopy(given["strides"]),
            "n_conv_per_stage": [2] * n_stages,
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        result["_kw_requires_import"] = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    result["arch_kwargs"].update(settings)
    return result


def converted_architecture(architecture: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The architecture entry that makes nnU-Net build the network in ``architecture`` with DSFF or depth shifts put into it.

    Args:
        architecture: of any configuration of any plans; not changed.
        settings: arguments of ``converted_network``: ``feature_sparsity`` and ``shift_size``.
    """
    result = deepcopy(architecture)
    if result["network_class_name"] != CONVERTED_NETWORK:
        result["arch_kwargs"]["network_class_name"] = result["network_class_name"]
        result["network_class_name"] = CONVERTED_NETWORK
    result["arch_kwargs"].update(settings)
    return result


def scaled_architecture(architecture: dict[str, Any], width: float) -> dict[str, Any]:
    """The architecture entry with the channels of every level multiplied by ``width``, rounded to whole numbers."""
    result = deepcopy(architecture)
    features = result["arch_kwargs"]["features_per_stage"]
    result["arch_kwargs"]["features_per_stage"] = [max(1, round(width * channels)) for channels in features]
    return result
