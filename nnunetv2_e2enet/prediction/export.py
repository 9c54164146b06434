"""Segmentations from logits: nnU-Net's resampling, labels and cropping, without logits at full resolution.

``convert_predicted_logits_to_segmentation_with_correct_shape`` resamples all logits in float64, rounds them to float16 and
looks for labels then. Here each row of the result is resampled in float32, which is enough to tell most labels. Voxels where
two logits lie too close for that are computed in float64 and rounded as nnU-Net does. The segmentation is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunetv2_e2enet.engine.scan import Axis, Labeler, Rule, ScanCore

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

RESAMPLING = "resample_data_or_seg_to_shape"
SEPARATE_Z = ("force_separate_z", "separate_z_anisotropy_threshold")


def why_not(plans: PlansManager, configuration: ConfigurationManager, labels: LabelManager) -> str | None:
    """Why these plans need nnU-Net's own export; None if they do not."""
    settings = configuration.configuration
    name, options = settings["resampling_fn_probabilities"], dict(settings["resampling_fn_probabilities_kwargs"])
    for option in SEPARATE_Z:
        options.pop(option, None)
    if name != RESAMPLING or options != {"is_seg": False, "order": 1, "order_z": 0}:
        return f"logits are resampled by {name} with {options}"
    if type(labels) is not LabelManager:
        return f"labels are those of {type(labels).__name__}"
    if len(plans.transpose_forward) != 3:
        return "images have not three axes"
    return None


def label_dtype(labels: LabelManager) -> type[np.uint8] | type[np.uint16]:
    """What nnU-Net stores a segmentation in."""
    return np.uint8 if len(labels.foreground_labels) < 255 else np.uint16


def rule(labels: LabelManager) -> Rule:
    """As ``LabelManager.convert_logits_to_segmentation``."""
    if not labels.has_regions:
        return Rule(np.arange(labels.num_segmentation_heads, dtype=np.uint16))
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)  # all from 0 to 65504
    probable = labels.apply_inference_nonlin(halves[None])[0] > 0.5
    threshold = float(halves[int(probable.int().argmax()) - 1])  # the largest logit whose probability is not above a half
    return Rule(np.array([0, *labels.regions_class_order], np.uint16), True, threshold)


def resampled_axes(
    shape: Sequence[int], new_shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float], **options: Any
) -> tuple[Axis, Axis, Axis]:
    """As ``resample_data_or_seg_to_shape`` with order 1, and order 0 on an axis that is resampled separately.

    Args:
        shape: of the logits.
        new_shape: of the result.
        spacing: of the logits, mm.
        new_spacing: of the result, mm.
        options: ``SEPARATE_Z``, as plans give them.
    """
    _, separate = determine_do_sep_z_and_axis(options.pop("force_separate_z", False), spacing, new_spacing, **options)
    # scipy leaves alone what keeps its size; else, what is no number spreads to neighbours of weight 0
    same = all(shape[axis] == new_shape[axis] for axis in range(3) if axis != separate)
    axes = [
        _nearest(n, m) if axis == separate or same else _linear(n, m)
        for axis, (n, m) in enumerate(zip(shape, new_shape, strict=True))
    ]
    return axes[0], axes[1], axes[2]


def _axis(
    size: int, lower: NDArray[np.floating[Any]], upper: NDArray[np.floating[Any]], upper_weight: NDArray[np.float64]
) -> Axis:
    places = [np.clip(places, 0, size - 1).astype(np.int32) for places in (lower, upper)]
    lower_weight = 1.0 - upper_weight
    return Axis(places[0], places[1], lower_weight, 1.0 - lower_weight)  # in the order in which scipy rounds


def _centres(size: int, new_size: int) -> NDArray[np.float64]:
    return (np.arange(new_size, dtype=np.float64) + 0.5) * np.float64(size / new_size) - 0.5


def _nearest(size: int, new_size: int) -> Axis:
    """As scipy's ``map_coordinates`` of order 0 with edges repeated; each voxel itself where the sizes are the same."""
    places = np.floor(_centres(size, new_size) + 0.5)
    return _axis(size, places, places, np.zeros(new_size))


def _linear(size: int, new_size: int) -> Axis:
    """As scipy's ``zoom`` of order 1 with edges repeated and pixels as areas, to which skimage's ``resize`` comes."""
    places = _centres(size, new_size)
    lower = np.floor(places)
    return _axis(size, lower, lower + 1, places - lower)


class Export:
    """The segmentation of one scan, filled in slice by slice.

    Attributes:
        result: as nnU-Net gives it, in the order of axes of the image; complete when all slices were taken.
    """

    def __init__(
        self,
        core: ScanCore,
        plans: PlansManager,
        configuration: ConfigurationManager,
        labels: LabelManager,
        properties: Mapping[str, Any],
        shape: Sequence[int],
        strides: tuple[int, int],
    ) -> None:
        """Look up how the logits of this scan are resampled and labelled.

        Args:
            core: the compiled functions.
            plans: of the model.
            configuration: of the model.
            labels: of the model.
            properties: of the preprocessed image, as nnU-Net's preprocessor gives them.
            shape: of the logits, ``(depth, height, width)``.
            strides: of classes and rows in a slice of logits, in elements.
        """
        new_shape = properties["shape_after_cropping_and_before_resampling"]
        new_spacing = [properties["spacing"][i] for i in plans.transpose_forward]
        spacing = list(configuration.spacing)
        if len(spacing) < len(new_shape):
            spacing = [new_spacing[0], *spacing]
        kwargs = configuration.configuration["resampling_fn_probabilities_kwargs"]
        options = {name: kwargs[name] for name in SEPARATE_Z if name in kwargs}
        axes = resampled_axes(shape, new_shape, spacing, new_spacing, **options)
        whole = np.zeros(properties["shape_before_cropping"], label_dtype(labels))
        inside = whole[tuple(slice(*map(int, bounds)) for bounds in properties["bbox_used_for_cropping"])]
        self._labeler: Labeler = core.labeler(axes, rule(labels), strides, shape[2], inside)
        self.result = whole.transpose(plans.transpose_backward)

    def take(self, first: int, slices: Sequence[torch.Tensor]) -> None:
        """As ``Labeler.take``."""
        self._labeler.take(first, slices)
