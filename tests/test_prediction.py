"""Whole scans on a CPU: voxel by voxel what nnU-Net makes of the same logits, and of the same images."""

from __future__ import annotations

import inspect
import os
import re
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support import full_disk, run_python

from nnunetv2_e2enet.engine.scan import Rule, ScanCore, load_scan_core
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import times
from nnunetv2_e2enet.machine import free_bytes
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.prediction import export, install, known, scans, takeover, why_never, why_nnunet
from nnunetv2_e2enet.prediction.export import Export
from nnunetv2_e2enet.prediction.takeover import REPLACEMENTS
from nnunetv2_e2enet.prediction.windows import predict_mirrored
from nnunetv2_e2enet.settings import override

pytestmark = pytest.mark.skipif(isinstance(load_scan_core(), str), reason="the compiled core was not built")

RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
PLAIN = {"background": 0, "liver": 1, "spleen": 2, "lesion": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "lesion": [3]}
ORDER = [1, 2, 3]


def make_plans(transpose: tuple[int, ...] = (0, 1, 2), **configuration: Any) -> PlansManager:
    """nnU-Net's plans with one configuration, ``here``."""
    here = {
        "spacing": [1.0, 1.0, 1.0],
        "patch_size": [8, 16, 16],
        "preprocessor_name": "DefaultPreprocessor",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**RESAMPLING, "order": 3},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": RESAMPLING,
        "architecture": {},
        **configuration,
    }
    return PlansManager(
        {
            "dataset_name": "Dataset001_Test",
            "plans_name": "test",
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "transpose_forward": list(transpose),
            "transpose_backward": np.argsort(transpose).tolist(),
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"here": here},
        }
    )


def scan_core() -> ScanCore:
    core = load_scan_core()
    assert not isinstance(core, str)
    return core


# ---- logits to segmentations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logits:
    """Of one scan, and where they belong."""

    values: np.ndarray
    plans: PlansManager
    labels: LabelManager
    properties: dict[str, Any]

    def by_nnunet(self) -> np.ndarray:
        configuration = self.plans.get_configuration("here")
        with np.errstate(invalid="ignore"):
            return convert_predicted_logits_to_segmentation_with_correct_shape(
                self.values, self.plans, configuration, self.labels, self.properties, num_threads_torch=1
            )

    def by_us(self, pieces: np.random.Generator) -> np.ndarray:
        """In pieces of random sizes, as windows leave them behind."""
        slices = torch.from_numpy(np.ascontiguousarray(self.values.transpose(1, 0, 2, 3)))
        configuration = self.plans.get_configuration("here")
        strides = (slices.stride(1), slices.stride(2))
        shape = self.values.shape[1:]
        export = Export(scan_core(), self.plans, configuration, self.labels, self.properties, shape, strides)
        first = 0
        while first < len(slices):
            n = int(pieces.integers(1, len(slices) - first + 1))
            export.take(first, list(slices[first : first + n]))
            first += n
        return export.result


def random_logits(seed: int) -> Logits:
    """Labels, regions and many labels; scans in and out of plane; ties, halves of a step, zeros and what is no number."""
    generator = np.random.default_rng(seed)
    kind = generator.choice(["plain", "regions", "many"], p=[0.6, 0.35, 0.05])
    names = {"plain": PLAIN, "regions": REGIONS, "many": {"background": 0, **{f"label {i}": i for i in range(1, 300)}}}[kind]
    labels = LabelManager(names, list(generator.permutation([1, 2, 7])) if kind == "regions" else None)
    shape = generator.integers(1, 6 if kind == "many" else 13, 3)
    factors = generator.choice([1, 1, 1 / 3, 0.5, 0.77, 1.25, 1.5, 2, 3], 3)
    cropped = np.maximum(1, np.round(shape * factors)).astype(int)
    before = generator.integers(0, 3, 3)
    whole = cropped + before + generator.integers(0, 3, 3)
    two_d = generator.random() < 0.2
    spacing = generator.choice([0.7, 1.0, 2.5, 5.0], 2 if two_d else 3)
    transpose = tuple(generator.permutation(3))
    force = [None, False, True][generator.integers(3)]
    kwargs = {**RESAMPLING, "force_separate_z": force}
    plans = make_plans(transpose, spacing=list(spacing), resampling_fn_probabilities_kwargs=kwargs)
    classes = (labels.num_segmentation_heads, *shape)
    values = {
        "integers": lambda: generator.integers(-2, 3, classes),
        "halves of a step": lambda: generator.integers(-2, 3, classes) + generator.integers(-1, 2, classes) * 2.0**-9,
        "small": lambda: generator.normal(0, 1e-6, classes),
        "usual": lambda: generator.normal(0, 5, classes),
        "large": lambda: generator.uniform(-65504, 65504, classes),
    }
    logits = values[str(generator.choice(list(values)))]().astype(np.float16)
    if generator.random() < 0.05:
        logits[tuple(generator.integers(0, n) for n in classes)] = np.nan
    properties = {
        "spacing": list(generator.choice([0.7, 1.0, 2.5, 5.0], 3)),
        "shape_before_cropping": tuple(map(int, whole)),
        "shape_after_cropping_and_before_resampling": tuple(map(int, cropped)),
        "bbox_used_for_cropping": [[int(a), int(a + n)] for a, n in zip(before, cropped, strict=True)],
    }
    return Logits(logits, plans, labels, properties)


def assert_same_export(seed: int) -> None:
    case = random_logits(seed)
    theirs, ours = case.by_nnunet(), case.by_us(np.random.default_rng(seed))
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@given(st.integers(0, 2**32 - 1))
@example(1_476_691_124)  # a logit that is no number, in slices that keep their size
@settings(max_examples=200, deadline=None)
def test_the_export_is_nnunets(seed: int) -> None:
    assert_same_export(seed)


@pytest.mark.slow
def test_the_export_is_nnunets_in_thousands_of_cases() -> None:
    for seed in range(10_000):
        assert_same_export(seed)


def test_a_threshold_is_the_probability_that_nnunet_asks_for() -> None:
    """Every number in float16 as the logit of a region."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    labels = LabelManager({"background": 0, "all": [1, 2], "part": [2]}, [1, 2])
    values = np.stack([halves[np.isfinite(halves)]] * 2)[:, None, None]
    values[0] = -1
    shape = values.shape[1:]
    properties = {
        "spacing": [1.0, 1.0, 1.0],
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
    }
    case = Logits(values, make_plans(), labels, properties)
    np.testing.assert_array_equal(case.by_us(np.random.default_rng(0)), case.by_nnunet())


# ---- images to segmentations ---------------------------------------------------------------------------------------------


def make_network(plans: PlansManager, heads: int, seed: int) -> E2ENet:
    dimension = len(plans.get_configuration("here").patch_size)
    torch.manual_seed(seed)
    convolution, norm = {2: (torch.nn.Conv2d, torch.nn.InstanceNorm2d), 3: (torch.nn.Conv3d, torch.nn.InstanceNorm3d)}[
        dimension
    ]
    network = E2ENet(
        1,
        heads,
        n_stages=3,
        features_per_stage=[8, 12, 16],
        conv_op=convolution,
        strides=[[1] * dimension, [2] * dimension, [2] * dimension],
        n_conv_per_stage=[2, 2, 2],
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )
    for name, parameter in network.named_parameters():
        if "seg_layers" in name or parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return network.eval()


def make_predictor(
    plans: PlansManager,
    labels: dict[str, Any] | None = None,
    folds: int = 1,
    mirrors: tuple[int, ...] | None = None,
    **options: Any,
) -> nnUNetPredictor:
    install()
    names = PLAIN if labels is None else labels
    dataset = {"labels": names, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "regions_class_order": ORDER}
    heads = plans.get_label_manager(dataset).num_segmentation_heads
    states = [make_network(plans, heads, seed).state_dict() for seed in range(folds)]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=mirrors is not None, **options)
    predictor.manual_initialization(
        make_network(plans, heads, 0), plans, plans.get_configuration("here"), states, dataset, "nnUNetTrainerE2ENet", mirrors
    )
    return predictor


def image(shape: tuple[int, ...], margin: int = 1) -> np.ndarray:
    values = np.random.default_rng(0).normal(100, 30, shape).astype(np.float32)
    values[:margin] = values[:, :margin] = 0  # cropped by nnU-Net
    return values[None]


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes nnU-Net's own export fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nnU-Net's own export was called")

    def apply() -> None:
        for name in ("convert_predicted_logits_to_segmentation_with_correct_shape", "export_prediction_from_logits"):
            monkeypatch.setattr(predict_from_raw_data, name, fail)

    return apply


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], list[float]]] = {
    "one window": ({}, {}, (8, 16, 16), [1, 1, 1]),
    "smaller than a window": ({}, {}, (5, 12, 13), [1, 1, 1]),
    "many windows": ({}, {}, (30, 37, 21), [1, 1, 1]),
    "steps as large as windows": ({}, {"tile_step_size": 1.0}, (33, 37, 21), [1, 1, 1]),
    "resampled": ({"spacing": [1.5, 0.8, 0.8]}, {}, (20, 30, 31), [2.5, 0.9, 0.7]),
    "downsampled": ({"spacing": [0.6, 0.6, 0.6]}, {}, (9, 15, 14), [1, 1, 1]),
    "upsampled in depth": ({"spacing": [3, 1, 1]}, {}, (50, 20, 18), [1, 1, 1]),
    "depth apart": ({"spacing": [5, 0.8, 0.8]}, {}, (21, 25, 31), [2.5, 0.9, 0.7]),
    "another axis apart": ({}, {}, (21, 25, 9), [1, 1, 4]),
    "transposed": ({"transpose": (2, 0, 1), "spacing": [1.2, 0.8, 0.9]}, {}, (21, 25, 13), [0.9, 0.7, 2.5]),
    "regions": ({"spacing": [1.5, 0.8, 0.8]}, {"labels": REGIONS}, (20, 30, 31), [2.5, 0.9, 0.7]),
    "mirrored": ({}, {"mirrors": (0, 2)}, (12, 20, 19), [1, 1, 0.9]),
    "three folds": ({"spacing": [1.5, 0.8, 0.8]}, {"folds": 3}, (20, 30, 31), [2.5, 0.9, 0.7]),
    "mirrored along all axes": ({}, {"mirrors": (0, 1, 2), "tile_step_size": 1.0}, (12, 20, 19), [1, 1, 0.9]),
    "no Gaussian": ({}, {"use_gaussian": False}, (12, 20, 19), [1, 1, 0.9]),
    "2D": ({"patch_size": [16, 24], "spacing": [0.8, 0.9]}, {}, (7, 30, 31), [3, 0.9, 0.7]),
    "2D, regions, mirrored": (
        {"patch_size": [16, 24], "spacing": [0.8, 0.9]},
        {"labels": REGIONS, "mirrors": (0, 1), "folds": 2},
        (7, 30, 31),
        [3, 0.9, 0.7],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_scan_is_nnunets(name: str, setting: Callable[..., None], only_ours: Callable[[], None]) -> None:
    plans, options, shape, spacing = CASES[name]
    predictor = make_predictor(make_plans(**plans), **options)
    setting(predictor="off")
    theirs = predictor.predict_single_npy_array(image(shape), {"spacing": spacing})
    setting(predictor="on")
    assert why_nnunet(predictor) is None
    only_ours()
    ours = predictor.predict_single_npy_array(image(shape), {"spacing": spacing})
    assert ours.dtype == theirs.dtype
    assert ours.shape == shape
    assert len(np.unique(theirs)) > 1
    np.testing.assert_array_equal(ours, theirs)


def test_a_scan_with_the_engine_is_nnunets(setting: Callable[..., None], only_ours: Callable[[], None]) -> None:
    predictor = make_predictor(make_plans(spacing=[1.5, 0.8, 0.8]), mirrors=(1,))
    setting(engine="on", predictor="off")
    theirs = predictor.predict_single_npy_array(image((20, 30, 31)), {"spacing": [2.5, 0.9, 0.7]})
    setting(predictor="on")
    only_ours()
    ours = predictor.predict_single_npy_array(image((20, 30, 31)), {"spacing": [2.5, 0.9, 0.7]})
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("predicting", ["off", "on"])
def test_threads_are_as_many_as_nnunets(
    setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch, predicting: str
) -> None:
    """At most nnUNet_def_n_proc while the network computes, and as before when it is done."""
    for module in (predict_from_raw_data, scans):
        monkeypatch.setattr(module, "default_num_processes", 2)
    predictor = make_predictor(make_plans())
    setting(predictor=predicting)
    seen: list[int] = []
    predictor.network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        for threads, expected in ((1, 1), (3, 2)):
            torch.set_num_threads(threads)
            predictor.predict_single_npy_array(image((8, 16, 16)), {"spacing": [1, 1, 1]})
            assert seen.pop() == expected
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_switched_off_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch, setting: Callable[..., None]) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(takeover, "_installed", False)
    monkeypatch.setattr(takeover, "_replace", lambda name, _: replaced.append(name))
    setting(predictor="off")
    install()
    assert not replaced
    setting(predictor="on")
    for _ in range(2):
        install()
    assert len(replaced) == 4


def test_logits_that_float16_cannot_hold(setting: Callable[..., None]) -> None:
    predictor = make_predictor(make_plans())
    for parameters in predictor.list_of_parameters:
        for name, value in parameters.items():
            if "seg_layers" in name:
                value.mul_(1e5)
    for predicting in ("off", "on"):
        setting(predictor=predicting)
        with pytest.raises(RuntimeError, match="Encountered inf in predicted array"):
            predictor.predict_single_npy_array(image((8, 16, 16)), {"spacing": [1, 1, 1]})


@pytest.mark.parametrize("shape", [(1, 3, 5, 7, 9), (1, 2, 6, 11)])
def test_the_mean_over_mirror_images_is_nnunets(shape: tuple[int, ...]) -> None:
    """To the bit, for any axes, from a network that gives other numbers for each mirror image."""
    generator = torch.Generator().manual_seed(0)
    spatial = len(shape) - 2
    answers = [torch.randn((1, 4, *shape[2:]), generator=generator) for _ in range(2**spatial)]
    patch = torch.randn(shape, generator=generator)
    predictor = make_predictor(make_plans())
    for n in range(1, spatial + 1):
        for axes in combinations(range(spatial), n):
            predictor.use_mirroring, predictor.allowed_mirroring_axes = True, axes
            seen: dict[str, list[torch.Tensor]] = {"theirs": [], "ours": []}

            def network(x: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
                images.append(x)
                return answers[len(images) - 1].clone()

            predictor.network = partial(network, images=seen["theirs"])
            expected = predictor._internal_maybe_mirror_and_predict(patch)
            ours = predict_mirrored(scan_core(), partial(network, images=seen["ours"]), patch, axes)
            assert torch.equal(ours, expected)
            assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
    assert torch.equal(predict_mirrored(scan_core(), lambda x: 2 * x, patch, None), 2 * patch)


# ---- what stays with nnU-Net ---------------------------------------------------------------------------------------------


class _Predictor(nnUNetPredictor):
    """Somebody else's."""


class _Network(E2ENet):
    """Somebody else's."""


class _Labels(LabelManager):
    """Somebody else's."""


def _other_plans(predictor: nnUNetPredictor, **changes: Any) -> None:
    predictor.configuration_manager.configuration.update(changes)


OTHERS: dict[str, Callable[[nnUNetPredictor], None]] = {
    "another predictor": lambda predictor: setattr(predictor, "__class__", _Predictor),
    "another network": lambda predictor: setattr(predictor.network, "__class__", _Network),
    "another label manager": lambda predictor: setattr(predictor.label_manager, "__class__", _Labels),
    "a cascade": lambda predictor: _other_plans(predictor, previous_stage="3d_lowres"),
    "another resampling": lambda predictor: _other_plans(predictor, resampling_fn_probabilities="no_resampling_hack"),
    "another order": lambda predictor: _other_plans(
        predictor, resampling_fn_probabilities_kwargs={**RESAMPLING, "order_z": 1}
    ),
    "a GPU": lambda predictor: setattr(predictor, "device", torch.device("meta")),
    "no weights": lambda predictor: setattr(predictor, "list_of_parameters", None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_left_to_nnunet(name: str) -> None:
    predictor = make_predictor(make_plans())
    assert why_nnunet(predictor) is None
    OTHERS[name](predictor)
    assert why_nnunet(predictor) is not None


def test_an_unknown_nnunet_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make_predictor(make_plans())
    monkeypatch.setattr(known, "KNOWN", dict.fromkeys(known.KNOWN, "0" * 64))
    assert "or it was changed" in str(why_nnunet(predictor))
    assert why_never() == why_nnunet(predictor)


def test_a_changed_nnunet_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions are changed, and one after the other removed."""
    names = [name for name in known.REPRODUCED if "nnUNetPredictor" not in name]  # whose methods are replaced in this process
    before = known.digest(names)
    assert before is not None
    module = "nnunetv2.inference.sliding_window_prediction.compute_gaussian"
    with monkeypatch.context() as patch:
        patch.setattr(module, make_plans)
        assert known.digest(names) not in (None, before)
        patch.delattr(module)
        assert known.digest(names) is None
    assert known.digest(names) == before


def test_probabilities_are_nnunets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make_predictor(make_plans())
    called: list[bool] = []
    original = predict_from_raw_data.convert_predicted_logits_to_segmentation_with_correct_shape

    def notice(*arguments: Any, **options: Any) -> Any:
        called.append(True)
        return original(*arguments, **options)

    name = "convert_predicted_logits_to_segmentation_with_correct_shape"
    monkeypatch.setattr(predict_from_raw_data, name, notice)
    segmentation, probabilities = predictor.predict_single_npy_array(
        image((8, 16, 16)), {"spacing": [1, 1, 1]}, save_or_return_probabilities=True
    )
    assert called
    np.testing.assert_array_equal(probabilities.argmax(0), segmentation)


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make_predictor(make_plans())
    monkeypatch.setattr(scans, "free_bytes", lambda: 1e4)
    with pytest.raises(E2ENetError, match=r"4 classes of 8 x 16 x 16 voxels need 0\.0 GB of memory, 0\.0 GB are free: close"):
        predictor.predict_single_npy_array(image((8, 16, 16), 0), {"spacing": [1, 1, 1]})
    monkeypatch.setattr(scans, "free_bytes", lambda: 1.2e5)  # enough but for the engine's feature maps
    with override(engine="on"), pytest.raises(E2ENetError, match=r"need .* GB of memory, .* GB are free"):
        predictor.predict_single_npy_array(image((8, 16, 16), 0), {"spacing": [1, 1, 1]})
    predictor.predict_single_npy_array(image((8, 16, 16), 0), {"spacing": [1, 1, 1]})
    monkeypatch.setattr(scans, "free_bytes", lambda: 1e4)
    case = {"data": torch.zeros(1, 8, 16, 16), "data_properties": {"shape_before_cropping": (8, 16, 16)}, "ofile": None}
    with pytest.raises(E2ENetError, match=r"^4 classes of"):
        predictor.predict_from_data_iterator([case])


def test_a_scan_larger_than_memory_is_one_line() -> None:
    """Compared with what the machine really has. The image itself is one voxel, seen many times."""
    side = 64 * (int((free_bytes() / 64) ** 0.5) // 64 + 1)  # 4 classes of 9 slices in float16 are 72 bytes a pixel
    predictor = make_predictor(make_plans(patch_size=[8, 1024, 1024]), tile_step_size=1.0)
    data = torch.zeros(1, 1, 1, 1).expand(1, 16, side, side)
    case = {"data": data, "data_properties": {"shape_before_cropping": (16, side, side)}, "ofile": None}
    with pytest.raises(E2ENetError) as error:
        predictor.predict_from_data_iterator([case])
    assert re.fullmatch(rf"4 classes of 16 x {side} x {side} voxels need .* GB of memory, .* close .*", str(error.value))


# name -> target spacing, folds, image without its margin of zeros, spacing, size at the target spacing
TOO_THIN: dict[str, tuple[list[float], int, np.ndarray, list[float], str]] = {
    "one slice": ([2.5, 0.8, 0.8], 1, image((1, 30, 31), 0), [1, 0.9, 0.7], "0 x 34 x 27"),
    "one slice, two folds": ([2.5, 0.8, 0.8], 2, image((1, 30, 31), 0), [1, 0.9, 0.7], "0 x 34 x 27"),
    "one row": ([1, 0.8, 0.8], 1, image((20, 1, 31), 0), [1, 0.3, 0.7], "20 x 0 x 27"),
    "one column": ([1, 0.8, 0.8], 1, image((20, 31, 1), 0), [1, 0.7, 0.3], "20 x 27 x 0"),
    "one slice that is not zero": ([2.5, 0.8, 0.8], 1, image((20, 30, 31), 19), [1, 0.9, 0.7], "0 x 12 x 27"),
}


@pytest.mark.parametrize("name", TOO_THIN)
def test_an_image_too_thin_for_the_models_voxels(name: str, tmp_path: Path, setting: Callable[..., None]) -> None:
    """Nothing is left of it when it is resampled, where nnU-Net stops with a ValueError."""
    target, folds, voxels, spacing, size = TOO_THIN[name]
    predictor = make_predictor(make_plans(spacing=target), folds=folds)
    setting(predictor="off")
    with pytest.raises(ValueError, match="zero-size array"):
        predictor.predict_single_npy_array(voxels, {"spacing": spacing})
    setting(predictor="on")
    message = f"has .* voxels .* which are {size} at the model's spacing of {times(target)} mm: expected at least one"
    with pytest.raises(E2ENetError, match=f"^the image {message}"):
        predictor.predict_single_npy_array(voxels, {"spacing": spacing})
    file = tmp_path / "a_0000.nii.gz"
    scan = SimpleITK.GetImageFromArray(voxels[0])
    scan.SetSpacing(spacing[::-1])
    SimpleITK.WriteImage(scan, file)
    with pytest.raises(E2ENetError, match=f"^the case of {file} {message}"):
        predictor.predict_from_files([[str(file)]], [str(tmp_path / "a")])
    assert not (tmp_path / "a.nii.gz").exists()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_logits_without_voxels_are_never_read(shape: tuple[int, ...]) -> None:
    axes = export.resampled_axes(shape, (2, 3, 4), [1, 1, 1], [1, 1, 1])
    with pytest.raises(AssertionError):
        scan_core().labeler(axes, Rule(np.arange(4, dtype=np.uint16)), (12, 4), 4, np.zeros((2, 3, 4), np.uint8))


def test_files_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose names have no folder go to the current one; a folder that is gone is one line."""
    predictor = make_predictor(make_plans())
    monkeypatch.chdir(tmp_path)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 16, 16))[0]), "a_0000.nii.gz")
    assert predictor.predict_from_files_sequential([["a_0000.nii.gz"]], ["a"]) == []
    expected = predictor.predict_single_npy_array(image((8, 16, 16)), {"spacing": [1, 1, 1]})
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("a.nii.gz")), expected)
    data, _, properties = DefaultPreprocessor(verbose=False).run_case(
        ["a_0000.nii.gz"], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    case = {"data": torch.from_numpy(data), "data_properties": properties, "ofile": str(tmp_path / "gone" / "a")}
    with pytest.raises(E2ENetError, match=r"^cannot write .*gone/a\.nii\.gz \(.*\): expected a folder with room"):
        predictor.predict_from_data_iterator([case])


def test_the_end_waits_for_no_scan_that_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a command that is terminated removes its temporary files at once."""
    predictor, go_on = make_predictor(make_plans()), threading.Event()
    files = [tmp_path / f"{case}_0000.nii.gz" for case in "ab"]
    for file in files:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 16, 16))[0]), file)
    read: list[Path] = []

    def slowly(file: Path) -> None:
        if file == files[1]:
            go_on.wait(20)
        read.append(file)

    monkeypatch.setattr(scans, "check_whole", slowly)
    cases = scans.preprocessed_ahead(predictor, [[str(file)] for file in files], [None, None])
    assert isinstance(cases, Generator)
    next(cases)
    cases.close()
    assert read == files[:1]
    go_on.set()


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd"])
def test_a_full_disk_leaves_the_former_segmentation(tmp_path: Path, ending: str) -> None:
    """SimpleITK ends such files early, and says nothing."""
    predictor = make_predictor(make_plans())
    predictor.dataset_json = {**predictor.dataset_json, "file_ending": ending}
    noise = np.random.default_rng(0).integers(0, 3, (20, 64, 64), np.uint8)
    spacing = {"sitk_stuff": {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}}
    scans.write(predictor, noise, str(tmp_path / "a"), spacing)
    (file,) = tmp_path.iterdir()
    former = file.read_bytes()
    unwritten = pytest.raises(E2ENetError, match=rf"^cannot write {file} \(.*\): expected a folder with room")
    with full_disk(len(former) // 2), unwritten:
        scans.write(predictor, noise[::-1], str(tmp_path / "a"), spacing)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [former]


def test_a_case_of_other_channels(tmp_path: Path) -> None:
    predictor = make_predictor(make_plans())
    files = [str(tmp_path / f"a_000{i}.nii.gz") for i in range(2)]
    for file in files:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 16, 16))[0]), file)

    def predict(channels: int) -> None:
        predictor.predict_from_files_sequential([files[:channels]], [str(tmp_path / "a")])

    with pytest.raises(E2ENetError, match=r"a_0000\.nii\.gz has 2 channels, but the model has 1 \(CT\): expected an image"):
        predict(2)
    predictor.dataset_json = {**predictor.dataset_json, "channel_names": {"0": "T1", "1": "T2"}}
    with pytest.raises(E2ENetError, match=r"has 1 channels, but the model has 2 \(T1, T2\)"):
        predict(1)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 16, 8))[0]), files[1])
    with pytest.raises(E2ENetError, match=r"a_0000\.nii\.gz, .*a_0001\.nii\.gz cannot be read .*its reader's reason is above"):
        predict(2)


def test_voxels_that_are_no_numbers_are_not_predicted(tmp_path: Path) -> None:
    """nnU-Net normalizes by mean and deviation, which are none then."""
    voxels = image((8, 16, 16))[0]
    voxels[4, 5, 6] = np.nan
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), tmp_path / "a_0000.nrrd")
    predictor = make_predictor(make_plans())
    predictor.dataset_json = {**predictor.dataset_json, "file_ending": ".nrrd"}
    with pytest.raises(E2ENetError, match=r"the preprocessed case of .*a_0000\.nrrd has .* voxels that are not finite"):
        predictor.predict_from_files_sequential([[str(tmp_path / "a_0000.nrrd")]], [str(tmp_path / "a")])
    assert not (tmp_path / "a.nrrd").exists()


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_methods_take_what_nnunets_take(name: str) -> None:
    original = inspect.unwrap(getattr(nnUNetPredictor, name))
    theirs = [(p.name, p.default) for p in inspect.signature(original).parameters.values()][1:]
    ours = [(p.name, p.default) for p in inspect.signature(REPLACEMENTS[name]).parameters.values()][2:]
    assert [parameter for parameter, _ in ours] == [parameter for parameter, _ in theirs]
    assert [default is inspect.Parameter.empty for _, default in ours] == [
        default is inspect.Parameter.empty for _, default in theirs
    ]


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    predictor = make_predictor(make_plans())
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 16, 16))[0]), tmp_path / "a_0000.nii.gz")
    (tmp_path / "b_0000.nii.gz").write_text("no image")
    with pytest.raises(
        E2ENetError, match=r"b_0000\.nii\.gz cannot be read as an image \(ValueError: the header is none of NIfTI"
    ):
        predictor.predict_from_files_sequential(
            list_of_lists_or_source_folder=[[str(tmp_path / "a_0000.nii.gz")], [str(tmp_path / "b_0000.nii.gz")]],
            output_folder_or_list_of_truncated_output_files=[str(tmp_path / "a"), str(tmp_path / "b")],
        )


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_a_name_that_is_no_utf_8(tmp_path: Path, ending: str) -> None:
    """SimpleITK would end the process, here in a thread that reads ahead."""
    predictor = make_predictor(make_plans())
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 16, 16))[0]), tmp_path / f"a_0000{ending}")
    file = (tmp_path / f"a_0000{ending}").rename(tmp_path / os.fsdecode(b"M\xfcller_0000" + ending.encode()))
    with pytest.raises(E2ENetError, match=r"M\\xfcller_0000.* is no UTF-8, .*: rename"):
        predictor.predict_from_files([[str(file)]], [str(tmp_path / "a")])


@pytest.mark.parametrize("engine", ["off", "on"])
def test_memory_that_runs_out_is_one_line(engine: str) -> None:
    """A limit that the check before the first window does not know of: of the sums, or of the engine's feature maps."""
    patch, voxels, room = (
        ("[8, 16, 16]", "8, 3000, 3000", 2**28) if engine == "off" else ("[8, 1024, 1024]", "8, 8, 8", 3 * 2**28)
    )
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, TESTS)
import torch
import test_prediction
predictor = test_prediction.make_predictor(test_prediction.make_plans(patch_size=PATCH))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
data = torch.zeros(1, 1, 1, 1).expand(1, VOXELS)
resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
shape = tuple(data.shape[1:])
properties = {"spacing": [1, 1, 1], "shape_before_cropping": shape, "shape_after_cropping_and_before_resampling": shape}
properties["bbox_used_for_cropping"] = [[0, n] for n in shape]
case = {"data": data, "data_properties": properties, "ofile": None}
predictor.predict_from_data_iterator([case])
"""
    for name, value in {
        "TESTS": repr(str(Path(__file__).parent)),
        "PATCH": patch,
        "VOXELS": voxels,
        "ROOM": str(room),
    }.items():
        code = code.replace(name, value)
    result = run_python(code, {"nnUNet_e2enet_engine": engine})
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("E2ENet: out of memory: close other programs")
    assert "Traceback" not in result.stderr
