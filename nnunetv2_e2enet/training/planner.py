"""E2ENet's behaviour in an nnU-Net experiment planner, as a mixin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_e2enet.files import read_json
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.training.architecture import BASE_NUM_FEATURES, MAX_NUM_FEATURES, e2enet_architecture
from nnunetv2_e2enet.training.interface import PLANNER_ATTRIBUTES, Overrides, check_attributes
from nnunetv2_e2enet.training.network import one_line_errors

if TYPE_CHECKING:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
        ExperimentPlanner as PlannerBase,
    )
else:
    PlannerBase = object

# What stock nnU-Net's PlainConvUNet keeps for backward in float32, per element of its own memory estimate. It turns nnU-Net's
# reference values, which stand for a GPU memory in use, into bytes kept. tests/test_planner.py measures it.
STOCK_BYTES_PER_ELEMENT = 7.9


class E2ENetPlannerMixin(Overrides, PlannerBase):
    """Plans for E2ENet; to be put before an nnU-Net experiment planner.

    The patch is as large as ``-gpu_memory_target`` allows, judged by the bytes that autograd keeps of E2ENet's forward pass,
    where stock nnU-Net counts elements of feature maps. The networks in the plans are dense (sparsity 0), so that stock
    trainers train every connection; ``nnUNetTrainerE2ENet`` sets its own sparsity.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetE2ENetPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        with one_line_errors():
            check_attributes(self, PLANNER_ATTRIBUTES)
        self.UNet_class = E2ENet
        self.UNet_base_num_features = BASE_NUM_FEATURES
        self.UNet_max_features_2d = MAX_NUM_FEATURES
        self.UNet_max_features_3d = MAX_NUM_FEATURES
        self.UNet_reference_val_2d *= STOCK_BYTES_PER_ELEMENT
        self.UNet_reference_val_3d *= STOCK_BYTES_PER_ELEMENT

    @staticmethod
    def static_estimate_VRAM_usage(  # noqa: N802 (nnU-Net's name)
        patch_size: tuple[int, ...],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: tuple[str, ...],
    ) -> int:
        """Bytes kept for backward for one patch, in float32 and with the outputs of deep supervision."""
        with torch.device("meta"):
            network = get_network_from_plans(
                arch_class_name,
                arch_kwargs,
                arch_kwargs_req_import,
                input_channels,
                output_channels,
                allow_init=False,
                deep_supervision=True,
            )
        return cast(E2ENet, network).saved_bytes([int(size) for size in patch_size])

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Preprocessed as with nnUNetPlans, 2d and 3d_fullres share its data, as the ResEnc planners' do."""
        if configuration_name in ("2d", "3d_fullres") and self._preprocesses_as_stock:
            return f"nnUNetPlans_{configuration_name}"
        return f"{self.plans_identifier}_{configuration_name}"

    @property
    def _preprocesses_as_stock(self) -> bool:
        stock = self.preprocessor_name == "DefaultPreprocessor" and self.overwrite_target_spacing is None
        return stock and not self.suppress_transpose and self._stock_plans_are_alike

    @property
    def _stock_plans_are_alike(self) -> bool:
        """Whether nnUNetPlans, if they are there, are of the same images: as they are now, at the same spacing."""
        file = Path(nnUNet_preprocessed, self.dataset_name, "nnUNetPlans.json")
        if not file.is_file():
            return True
        with one_line_errors():
            plans = read_json(file)
        order, _ = self.determine_transpose()
        spacing = self.determine_fullres_target_spacing()[order]
        configurations = plans.get("configurations", {})
        return plans.get("transpose_forward") == [int(axis) for axis in order] and all(
            configuration["preprocessor_name"] == self.preprocessor_name
            and np.allclose(configuration["spacing"], spacing[-len(configuration["spacing"]) :])
            for configuration in (configurations[name] for name in ("2d", "3d_fullres") if name in configurations)
        )

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | tuple[float, ...] | list[float],
        median_shape: np.ndarray | tuple[int, ...],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """As nnU-Net does, with E2ENet as the network."""
        with one_line_errors():
            plan: dict[str, Any] = super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
            plan["architecture"] = e2enet_architecture(plan["architecture"], feature_sparsity=0.0, shift_size=3)
        return plan
