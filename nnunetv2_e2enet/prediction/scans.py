"""Scans from files to segmentations, with the network of one of nnU-Net's predictors: reading, windows, export, writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from nnunetv2_e2enet.engine import bytes_to_take
from nnunetv2_e2enet.engine.scan import ScanCore
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import check_finite, check_whole, readable, times
from nnunetv2_e2enet.machine import free_bytes
from nnunetv2_e2enet.prediction.export import Export, label_dtype
from nnunetv2_e2enet.prediction.windows import Slicer, SlidingSums, as_window, predict_mirrored, slide
from nnunetv2_e2enet.prediction.writing import write_segmentation

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

Segmentation = NDArray[Any]


class Preprocessed(TypedDict):
    """What nnU-Net's iterators over preprocessed cases give."""

    data: Tensor
    data_properties: dict[str, Any]
    ofile: str | None


class _WithoutSegmentation(ConfigurationManager):
    """A configuration for preprocessing whose segmentation, which nobody looks at, is not resampled."""

    @property
    def resampling_fn_seg(self) -> Any:
        return lambda segmentation, *_: segmentation[:, :1, :1, :1]


def preprocessing(predictor: nnUNetPredictor) -> tuple[Any, ConfigurationManager]:
    """nnU-Net's preprocessor for images without segmentation, and the configuration to call it with."""
    configuration = predictor.configuration_manager
    cls = configuration.preprocessor_class
    if cls is DefaultPreprocessor:
        configuration = _WithoutSegmentation(configuration.configuration)
    return cls(verbose=predictor.verbose_preprocessing), configuration


def preprocessed_ahead(
    predictor: nnUNetPredictor, images: Sequence[Sequence[str]], outputs: Sequence[str | None]
) -> Iterator[Preprocessed]:
    """Preprocessed cases, each read while the one before is looked at."""
    preprocessor, configuration = preprocessing(predictor)
    channels = predictor.dataset_json.get("channel_names") or predictor.dataset_json["modality"]

    def wrong_channels(files: Sequence[str], number: int) -> E2ENetError:
        return E2ENetError(
            f"the case of {files[0]} has {number} channels, but the model has {len(channels)} "
            f"({', '.join(map(str, channels.values()))}): expected an image for each, named as nnU-Net wants them"
        )

    def read(files: Sequence[str], output: str | None) -> Preprocessed:
        if len(files) > len(channels):  # fewer may hold several each
            raise wrong_channels(files, len(files))
        for file in files:
            check_whole(Path(file))
        with readable(", ".join(files)):
            data, _, properties = preprocessor.run_case(
                list(files), None, predictor.plans_manager, configuration, predictor.dataset_json
            )
        if len(data) != len(channels):
            raise wrong_channels(files, len(data))
        _check_size(predictor, data.shape[1:], properties, f"the case of {files[0]}")
        check_finite(data, f"the preprocessed case of {files[0]}")
        tensor = torch.from_numpy(data).to(dtype=torch.float32, memory_format=torch.contiguous_format)
        return {"data": tensor, "data_properties": properties, "ofile": output}

    reader = ThreadPoolExecutor(1)
    ahead: Future[Preprocessed] | None = None
    try:
        for case in zip(images, outputs, strict=True):
            following = reader.submit(read, *case)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
    finally:
        reader.shutdown(wait=False, cancel_futures=True)  # where the command ends early, nobody wants the next one


@torch.inference_mode()
def segment(predictor: nnUNetPredictor, core: ScanCore, data: Tensor, properties: Mapping[str, Any]) -> Segmentation:
    """The segmentation of a preprocessed image, in the axes and the size of the image that was read.

    Each fold's logits are summed over its windows as nnU-Net sums them. Of one fold, slices become labels as soon as the last
    window has left them; of several, the mean has to be known.

    Args:
        predictor: nnU-Net's predictor with the weights of all folds.
        core: the compiled functions.
        data: float32, ``(channels, depth, height, width)``.
        properties: of the preprocessed image, as nnU-Net's preprocessor gives them.

    Raises:
        E2ENetError: nothing is left of the image at the model's spacing, or there is too little memory.
        RuntimeError: logits are too large for float16.
    """
    _check_size(predictor, data.shape[1:], properties, "the image")
    configuration, labels = predictor.configuration_manager, predictor.label_manager
    padded, inside = pad_nd_image(data, tuple(configuration.patch_size), "constant", {"value": 0}, True, None)
    _, depths, rows, columns = inside
    slicers = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
    classes, size, shape = labels.num_segmentation_heads, tuple(padded.shape[1:]), tuple(data.shape[1:])
    folds = len(predictor.list_of_parameters)
    sums = SlidingSums.shape(classes, size, [as_window(slicer) for slicer in slicers])
    _check_memory(predictor, padded.shape[0], classes, size, sums, properties)
    total = torch.empty((shape[0], classes, *size[1:]), dtype=torch.half) if folds > 1 else None
    strides = (prod(size[1:]), size[2])
    result = Export(core, predictor.plans_manager, configuration, labels, properties, shape, strides)

    def take(fold: int, first: int, slices: Sequence[Tensor]) -> None:
        first -= depths.start
        wanted = [(place, logits) for place, logits in enumerate(slices, first) if 0 <= place < shape[0]]
        if total is None and wanted:
            result.take(wanted[0][0], [logits[:, rows, columns] for _, logits in wanted])
        elif total is not None:
            for place, logits in wanted:
                if fold == 0:
                    total[place] = logits
                else:
                    total[place] += logits

    with _threads():
        _predict_folds(predictor, core, padded, slicers, take)
        if total is not None:
            total /= folds
            result.take(0, list(total[:, :, rows, columns]))
    return result.result


def _predict_folds(
    predictor: nnUNetPredictor,
    core: ScanCore,
    padded: Tensor,
    slicers: Sequence[Slicer],
    take: Callable[[int, int, Sequence[Tensor]], None],
) -> None:
    """Calls ``take`` with the number of a fold, of the first of some slices, and their logits, as soon as they are known."""
    network, folds = predictor.network, len(predictor.list_of_parameters)
    classes, windows = predictor.label_manager.num_segmentation_heads, [as_window(slicer) for slicer in slicers]
    weights = _weights(predictor, tuple(predictor.configuration_manager.patch_size))
    mirrors = predictor.allowed_mirroring_axes if predictor.use_mirroring else None

    def predict(patch: Tensor) -> Tensor:
        return predict_mirrored(core, network, patch, mirrors)

    for fold, parameters in enumerate(predictor.list_of_parameters):
        network.load_state_dict(parameters)
        network.to(predictor.device).eval()
        sums = SlidingSums(core, classes, tuple(padded.shape[1:]), windows)
        name = f"fold {fold + 1} of {folds}" if folds > 1 else None
        with tqdm(total=len(slicers), desc=name, disable=not predictor.allow_tqdm) as bar:
            slide(sums, padded, slicers, predict, weights, partial(take, fold), bar.update)
        del sums


def _weights(predictor: nnUNetPredictor, patch: tuple[int, ...]) -> Tensor:
    if not predictor.use_gaussian:
        return torch.ones(patch, dtype=torch.half)
    gaussian: Tensor = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    return gaussian


@contextmanager
def _threads() -> Iterator[None]:
    """As many threads as nnU-Net predicts with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(default_num_processes, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_size(predictor: nnUNetPredictor, size: Sequence[int], properties: Mapping[str, Any], called: str) -> None:
    """Raises E2ENetError where an axis of a preprocessed image has no voxels: it was too thin for one of the model's.

    nnU-Net, which resamples a segmentation as well, stops at an empty one.
    """
    if 0 in size:
        before = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][i] for i in predictor.plans_manager.transpose_forward]
        wanted = predictor.configuration_manager.spacing
        raise E2ENetError(
            f"{called} has {times(before)} voxels of {times(spacing)} mm within its margin of zeros, which are {times(size)} "
            f"at the model's spacing of {times(wanted)} mm: expected at least one along each axis; check the spacing, or give "
            "a thicker image"
        )


def _check_memory(
    predictor: nnUNetPredictor,
    channels: int,
    classes: int,
    size: Sequence[int],
    sums: Sequence[int],
    properties: Mapping[str, Any],
) -> None:
    """Raises E2ENetError before hours of work end in a process that the system kills.

    What reading the next scan will take beside this one is not known yet, and not counted.
    """
    half, single = 2, 4
    patch = predictor.configuration_manager.patch_size
    needed = half * prod(sums) * (1 + 1 / classes)
    patch_and_mirror_image = 2 * prod(patch)
    needed += single * classes * patch_and_mirror_image
    needed += bytes_to_take(predictor.network.eval(), (1, channels, *patch))
    needed += prod(properties["shape_before_cropping"]) * np.dtype(label_dtype(predictor.label_manager)).itemsize
    if len(predictor.list_of_parameters) > 1:
        needed += half * classes * prod(size)
    free = free_bytes()
    if needed > free:
        voxels = " x ".join(map(str, size))
        raise E2ENetError(
            f"{classes} classes of {voxels} voxels need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: close "
            "other programs, predict fewer folds at once, or use a machine with more"
        )


def write(predictor: nnUNetPredictor, segmentation: Segmentation, target: str, properties: Mapping[str, Any]) -> None:
    """A file as nnU-Net writes it, which appears whole or not at all.

    Args:
        predictor: nnU-Net's predictor, which knows the format of the files.
        segmentation: of the image that was read.
        target: path without nnU-Net's file ending.
        properties: of the preprocessed image.

    Raises:
        E2ENetError: the file cannot be written.
    """
    file = Path(target + predictor.dataset_json["file_ending"])
    write_segmentation(file, segmentation, properties, predictor.plans_manager.image_reader_writer_class())
