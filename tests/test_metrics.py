"""Metrics of a case against an independent implementation, against MONAI's own, and on cases made by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_metrics import brute_force

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.labels import Labels, read_labels
from nnunetv2_e2enet.evaluation.metrics import ClassMetrics, case_metrics

CLASSES = {"background": 0, "a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}
IGNORE = 4


def labels_of(content: dict[str, Any], ignore: bool = False) -> Labels:
    return read_labels({"labels": {**content, **({"ignore": IGNORE} if ignore else {})}}, "test")


def one_class(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], tolerance: float = 1) -> ClassMetrics:
    return case_metrics(reference, prediction, spacing, labels_of({"background": 0, "a": 1}), [tolerance])[0]


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction of a few blocks each; classes may be missing, one voxel large, or at the edge."""
    shape = draw(st.one_of(st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.integers(1, 9)] * 2)))
    maps = []
    for largest in (IGNORE, 3):
        voxels = np.zeros(shape, draw(st.sampled_from([np.uint8, np.int16, np.int64])))
        for _ in range(draw(st.integers(0, 5))):
            corner = [draw(st.integers(0, n - 1)) for n in shape]
            size = [draw(st.integers(1, 4)) for _ in shape]
            voxels[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = draw(st.integers(0, largest))
        maps.append(voxels)
    if draw(st.booleans()):  # a prediction that is nearly right, as most are
        maps[1] = np.where(maps[0] == IGNORE, maps[1], maps[0]).astype(maps[0].dtype)
        if draw(st.booleans()):
            maps[1] = np.roll(maps[1], 1, axis=draw(st.integers(0, len(shape) - 1)))
    return maps[0], maps[1]


@given(
    maps=label_maps(),
    millimetres=st.tuples(*[st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0])] * 3),
    content=st.sampled_from([CLASSES, REGIONS]),
    ignore=st.booleans(),
    tolerances=st.tuples(*[st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.5, 4.0])] * 3),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_equal_to_an_independent_implementation(
    maps: tuple[np.ndarray, np.ndarray],
    millimetres: tuple[float, ...],
    content: dict[str, Any],
    ignore: bool,
    tolerances: tuple[float, ...],
) -> None:
    reference, prediction = maps
    if not ignore:
        reference = np.where(reference == IGNORE, 0, reference)
    spacing = millimetres[: reference.ndim]
    labels = labels_of(content, ignore)
    found = case_metrics(reference, prediction, spacing, labels, tolerances)
    for members, tolerance, metrics in zip(labels.classes.values(), tolerances, found, strict=True):
        expected = brute_force(reference, prediction, spacing, members, tolerance, labels.ignore)
        assert metrics._asdict() == pytest.approx(expected, rel=1e-5, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_monai_on_classes_that_both_have(seed: int) -> None:
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    random = np.random.default_rng(seed)
    spacing = (3.0, 0.7, 1.0)
    maps = []
    for _ in range(2):
        voxels = np.zeros((12, 14, 10), np.uint8)
        for value in (1, 2, 3):
            low = random.integers(0, 6, 3)
            voxels[tuple(slice(n, n + 4) for n in low)] = value
        voxels[0, 0, :3] = (1, 2, 3)
        maps.append(voxels)
    reference, prediction = maps
    found = case_metrics(reference, prediction, spacing, labels_of(CLASSES), [1.0, 2.0, 4.0])
    one_hot = [torch.from_numpy(np.stack([m == v for v in (1, 2, 3)])[None]).float() for m in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dice = compute_dice(*one_hot)[0]
        nsd = compute_surface_dice(*one_hot, [1.0, 2.0, 4.0], include_background=True, spacing=spacing)[0]
        hd95 = compute_hausdorff_distance(*one_hot, include_background=True, percentile=95, spacing=spacing)[0]
    assert [m.dice for m in found] == pytest.approx(dice.tolist(), rel=1e-5)
    assert [m.nsd for m in found] == pytest.approx(nsd.tolist(), rel=1e-5)
    assert [m.hd95 for m in found] == pytest.approx(hd95.tolist(), rel=1e-5)


def test_single_voxels_on_an_anisotropic_grid() -> None:
    reference, prediction = np.zeros((5, 9, 9), np.uint8), np.zeros((5, 9, 9), np.uint8)
    reference[2, 4, 4] = 1
    prediction[3, 4, 4] = 1
    metrics = one_class(reference, prediction, (5.0, 1.0, 1.0), tolerance=4.9)
    assert metrics == ClassMetrics(0.0, 0.0, 5.0, 0.0, 0.005, 0.005)
    assert one_class(reference, prediction, (5.0, 1.0, 1.0), tolerance=5.0).nsd == 1.0
    assert one_class(reference, prediction, (1.0, 1.0, 1.0), tolerance=1.0).hd95 == 1.0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_that_is_stored_in_3d_is_a_2d_image(axis: int) -> None:
    rows, columns = np.indices((64, 64))
    spacing = (0.5, 0.8)
    discs = [((rows - 30 - moved) ** 2 + (columns - 30) ** 2 <= 400).astype(np.uint8) for moved in (0, 4)]
    flat = one_class(*discs, spacing, tolerance=0.5)
    assert flat.nsd < 0.5
    in_3d = [np.expand_dims(disc, axis) for disc in discs]
    stored = one_class(*in_3d, tuple(np.insert(spacing, axis, 3.0)), tolerance=0.5)
    assert (stored.dice, stored.nsd, stored.hd95) == (flat.dice, flat.nsd, flat.hd95)


def test_a_cube_moved_by_one_voxel() -> None:
    reference, prediction = np.zeros((10, 10, 10), np.uint8), np.zeros((10, 10, 10), np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    prediction[3:7, 2:6, 2:6] = 1
    metrics = one_class(reference, prediction, (2.0, 1.0, 1.0), tolerance=1.0)
    assert metrics.dice == pytest.approx(2 * 48 / 128)
    assert metrics.hd95 == pytest.approx(2.0)
    # each cube has 56 voxels on its surface; the 16 of its slice that the other has not are 2 mm away from the other
    assert metrics.nsd == pytest.approx(40 / 56)
    assert metrics.volume_error == 0


def test_empty_masks() -> None:
    empty, full = np.zeros((4, 3, 12), np.uint8), np.ones((4, 3, 12), np.uint8)
    nothing = one_class(empty, empty, (1, 1, 1))
    assert all(math.isnan(value) for value in nothing[:4])
    assert nothing[4:] == (0, 0)
    for pair in ((empty, full), (full, empty)):
        metrics = one_class(*pair, (1, 1, 1))
        assert (metrics.dice, metrics.nsd, metrics.hd95) == (0, 0, 13.0)
        assert metrics.volume_error == pytest.approx(0.144)
    assert one_class(full, full, (1, 1, 1))[:4] == (1, 1, 0, 0)


def test_ignored_voxels_count_for_nothing_and_have_no_surface() -> None:
    labels = labels_of({"background": 0, "a": 1, "b": 2, "c": 3}, ignore=True)
    reference = np.full((1, 1, 8), IGNORE, np.uint8)
    reference[..., :2], reference[..., 6:] = 1, 0
    prediction = np.zeros_like(reference)
    prediction[..., :5] = 1
    assert case_metrics(reference, prediction, (1, 1, 1), labels, [0.0] * 3)[0][:4] == (1, 1, 0, 0)
    everything_ignored = np.full_like(reference, IGNORE)
    assert all(math.isnan(n) for n in case_metrics(everything_ignored, prediction, (1, 1, 1), labels, [0.0] * 3)[0][:4])


def test_a_scribble_within_ignored_voxels_has_no_surface() -> None:
    """Whatever the prediction leaves out, be it everything, there is nothing to measure distances to."""
    labels = labels_of({"background": 0, "a": 1, "b": 2, "c": 3}, ignore=True)
    reference = np.full((3, 9, 9), IGNORE, np.uint8)
    reference[1, 4, 2:7] = 1
    prediction = np.zeros_like(reference)
    prediction[1, 4, 2:5] = 1
    for predicted in (prediction, np.where(reference == 1, reference, 0).astype(np.uint8), np.zeros_like(reference)):
        metrics = case_metrics(reference, predicted, (1, 1, 1), labels, [1.0] * 3)[0]
        assert metrics.dice == pytest.approx(2 * (predicted == 1).sum() / (5 + (predicted == 1).sum()))
        assert math.isnan(metrics.nsd)
        assert math.isnan(metrics.hd95)
        expected = brute_force(reference, predicted, (1, 1, 1), (1,), 1.0, IGNORE)
        assert metrics._asdict() == pytest.approx(expected, nan_ok=True)


def test_an_invented_class_within_ignored_voxels_is_wrong() -> None:
    """The reference says that the class is not there, so surfaces do not matter."""
    labels = labels_of(CLASSES, ignore=True)
    reference = np.full((3, 4, 12), IGNORE, np.uint8)
    reference[1, 1, 2:7] = 0
    prediction = np.where(reference == 0, 1, 0).astype(np.uint8)
    metrics = case_metrics(reference, prediction, (1, 1, 1), labels, [1.0] * 3)[0]
    assert (metrics.dice, metrics.nsd, metrics.hd95) == (0, 0, 13.0)
    assert metrics._asdict() == pytest.approx(brute_force(reference, prediction, (1, 1, 1), (1,), 1.0, IGNORE))


def test_a_region_with_background_in_it() -> None:
    reference, prediction = np.zeros((1, 6, 8), np.uint8), np.zeros((1, 6, 8), np.uint8)
    reference[0, 2:4, 2:4], prediction[0, 2:4, 3:6] = 2, 2
    reference[0, 0, 0], prediction[0, 0, 1] = 1, 1
    labels = Labels({"all but b": (0, 1), "b": (2,)}, None, (0, 1, 2))
    for members, metrics in zip(
        labels.classes.values(), case_metrics(reference, prediction, (1, 1, 1), labels, [1.0] * 2), strict=True
    ):
        expected = brute_force(reference, prediction, (1, 1, 1), members, 1.0, None)
        assert metrics._asdict() == pytest.approx(expected)


def test_a_spacing_that_floats_cannot_say_is_within_its_tolerance() -> None:
    reference, prediction = np.zeros((1, 1, 30), np.uint8), np.zeros((1, 1, 30), np.uint8)
    reference[..., 3], prediction[..., 13] = 1, 1
    assert one_class(reference, prediction, (1, 1, float(np.float32(0.1))), tolerance=1.0).nsd == 1.0


def test_labels_are_understood_as_nnunet_does() -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    for content, order in ((CLASSES, None), (REGIONS, [1, 2, 3]), ({"b": 2, "background": 0, "a": 1}, None)):
        manager = LabelManager(content, order)
        ours = labels_of(content)
        expected = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        assert list(ours.classes.values()) == [
            value if manager.has_regions and isinstance(value, tuple) else (value,) for value in expected
        ]
    for content in ({"labels": {"a": 1}}, {}, {"labels": {"background": 0}}):
        with pytest.raises(E2ENetError, match="label"):
            read_labels(content, "x.json")


@pytest.mark.parametrize("value", ["x", None, 1.5, True, [1, [2]], [], {"a": 1}])
def test_values_of_labels_are_whole_numbers(value: Any) -> None:
    with pytest.raises(E2ENetError, match=r"x.json has the label a with the value .*: expected a whole number"):
        read_labels({"labels": {"background": 0, "a": value}}, "x.json")


@pytest.mark.parametrize("value", ["1", 1.0, ["1"], [1.0]])
def test_whole_numbers_may_be_written_as_nnunet_reads_them(value: Any) -> None:
    assert read_labels({"labels": {"background": 0, "a": value}}, "x.json").classes == {"a": (1,)}


def test_a_class_with_the_name_of_the_mean() -> None:
    with pytest.raises(E2ENetError, match=r"x.json has a label mean, .*: rename it"):
        read_labels({"labels": {"background": 0, "mean": 1}}, "x.json")
