"""Puts our way around the network in the place of nnU-Net's, where the result is known to be the same.

nnU-Net has no hook between its command and its predictor. Four methods of ``nnUNetPredictor`` are therefore replaced in the
running process, when an E2ENet is built to predict, unless ``nnUNet_e2enet_predictor`` is off. Each asks ``why_nnunet`` first,
and calls the method that it replaced unless the answer is None. Nothing of nnU-Net's files is changed. A scan that cannot be
predicted raises E2ENetError, of which nnU-Net's commands, like ours, show the message alone. Logits that float16 cannot hold
raise a RuntimeError, as in nnU-Net.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from nnunetv2_e2enet.engine.scan import Rule, ScanCore, load_scan_core
from nnunetv2_e2enet.errors import show_message_alone
from nnunetv2_e2enet.machine import out_of_memory_in_one_line
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.prediction import export
from nnunetv2_e2enet.prediction.known import why_unknown
from nnunetv2_e2enet.prediction.scans import Preprocessed, Segmentation, preprocessed_ahead, preprocessing, segment, write
from nnunetv2_e2enet.settings import settings, variable

PREDICTOR_VARIABLE = variable("predictor")

Method = Callable[..., Any]
_lock = Lock()
_installed = False


def install() -> None:
    """Replaces the methods once a process, unless that is switched off. Not to be called with an nnU-Net that is not known."""
    global _installed
    show_message_alone()
    with _lock:
        if not _installed and settings().predictor == "on":
            for name, replacement in REPLACEMENTS.items():
                _replace(name, replacement)
            _installed = True


def _replace(name: str, replacement: Callable[..., Any]) -> None:
    original: Method = getattr(nnUNetPredictor, name)

    @functools.wraps(original)
    def method(predictor: nnUNetPredictor, *arguments: Any, **options: Any) -> Any:
        return replacement(functools.partial(original, predictor), predictor, *arguments, **options)

    setattr(nnUNetPredictor, name, method)


def why_never() -> str | None:
    """See ``nnunetv2_e2enet.prediction.why_never``."""
    if settings().predictor == "off":
        return f"it is switched off ({PREDICTOR_VARIABLE})"
    core = load_scan_core()
    return core if isinstance(core, str) else why_unknown() or _why_different(core)


def why_nnunet(predictor: nnUNetPredictor) -> str | None:
    """See ``nnunetv2_e2enet.prediction.why_nnunet``."""
    if type(predictor) is not nnUNetPredictor:
        return f"the predictor is {type(predictor).__name__}"
    if predictor.device.type != "cpu":
        return f"the device is {predictor.device}"
    return why_never() or _why_model(predictor)


@functools.cache
def _why_different(core: ScanCore) -> str | None:
    """Why labels would be others than nnU-Net's: the libraries that it resamples with round in another way; None if not.

    A small example is resampled by both, where most results lie halfway between two numbers in float16.
    """
    generator = np.random.default_rng(0)
    shape, new_shape, classes = (5, 6, 7), (7, 18, 9), 4
    logits = (generator.integers(-3, 4, (classes, *shape)) + generator.integers(-1, 2, (classes, *shape)) * 2.0**-9).astype(
        np.float16
    )
    for spacing in ((1.0, 1.0, 1.0), (5.0, 1.0, 1.0)):
        options = {"force_separate_z": None}
        theirs = resample_data_or_seg_to_shape(
            logits, new_shape, spacing, spacing, is_seg=False, order=1, order_z=0, **options
        )
        slices = torch.from_numpy(logits.transpose(1, 0, 2, 3).copy())
        ours = np.zeros(new_shape, np.uint8)
        axes = export.resampled_axes(shape, new_shape, spacing, spacing, **options)
        rule = Rule(np.arange(classes, dtype=np.uint16))
        core.labeler(axes, rule, (slices.stride(1), slices.stride(2)), shape[2], ours).take(0, list(slices))
        if not np.array_equal(ours, theirs.argmax(0)):
            return "scipy or scikit-image interpolates in another way than is known here"
    return None


def _why_model(predictor: nnUNetPredictor) -> str | None:
    if type(predictor.network) is not E2ENet:
        return f"the network is {type(predictor.network).__name__}"
    if not predictor.list_of_parameters:
        return "the predictor has no weights of its own"
    if predictor.configuration_manager.previous_stage_name is not None:
        return "the model is a cascade's second stage"
    return export.why_not(predictor.plans_manager, predictor.configuration_manager, predictor.label_manager)


def _preprocess_files(
    original: Method,
    predictor: nnUNetPredictor,
    input_list_of_lists: Sequence[Sequence[str]],
    seg_from_prev_stage_files: Sequence[str | None] | None,
    output_filenames_truncated: Sequence[str] | None,
    num_processes: int,
) -> Iterable[Preprocessed]:
    """In a thread beside the network."""
    if not _reads_beside(predictor) or any(seg_from_prev_stage_files or ()) or why_nnunet(predictor) is not None:
        iterator: Iterable[Preprocessed] = original(
            input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_processes
        )
        return iterator
    outputs: Sequence[str | None] = output_filenames_truncated or [None] * len(input_list_of_lists)
    return preprocessed_ahead(predictor, input_list_of_lists, outputs)


def _reads_beside(predictor: nnUNetPredictor) -> bool:
    """Whether images can be preprocessed beside the network; some ways of resampling set its number of threads as well."""
    return bool(predictor.configuration_manager.configuration["resampling_fn_data"] == export.RESAMPLING)


def _predict_sequentially(
    original: Method,
    predictor: nnUNetPredictor,
    list_of_lists_or_source_folder: Any,
    output_folder_or_list_of_truncated_output_files: Any,
    save_probabilities: bool = False,
    overwrite: bool = True,
    folder_with_segs_from_prev_stage: str | None = None,
) -> list[Segmentation] | None:
    """Without other processes, as is asked for: there are none here anyway."""
    images, outputs = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
    given = save_probabilities or folder_with_segs_from_prev_stage is not None
    if given or not _reads_beside(predictor) or why_nnunet(predictor) is not None:
        own: list[Segmentation] | None = original(
            images, outputs, save_probabilities, overwrite, folder_with_segs_from_prev_stage
        )
        return own
    if isinstance(outputs, list):  # files without a folder are of the current one
        outputs = [f"./{output}" if Path(output).name == output else output for output in outputs]
    results = predictor.predict_from_files(images, outputs, save_probabilities, overwrite, 1, 1)
    return None if results is None else [segmentation for segmentation in results if segmentation is not None]


def _predict_cases(
    original: Method,
    predictor: nnUNetPredictor,
    data_iterator: Iterable[Any],
    save_probabilities: bool = False,
    num_processes_segmentation_export: int | None = None,
) -> list[Segmentation | None]:
    """What nnU-Net returns: a segmentation for each case without a file to write, else None."""
    core = load_scan_core()
    if save_probabilities or isinstance(core, str) or why_nnunet(predictor) is not None:
        processes = () if num_processes_segmentation_export is None else (num_processes_segmentation_export,)
        results: list[Segmentation | None] = original(data_iterator, save_probabilities, *processes)
        return results
    with _memory():
        try:
            return _segment_and_write(predictor, core, data_iterator)
        finally:
            if isinstance(data_iterator, MultiThreadedAugmenter):
                data_iterator._finish()


@contextmanager
def _memory() -> Iterator[None]:
    """Frees what nnU-Net caches. Too little memory is an E2ENetError."""
    try:
        with out_of_memory_in_one_line():
            yield
    finally:
        compute_gaussian.cache_clear()


def _segment_and_write(predictor: nnUNetPredictor, core: ScanCore, cases: Iterable[Any]) -> list[Segmentation | None]:
    results: list[Segmentation | None] = []
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for case in cases:
            target, properties = case["ofile"], case["data_properties"]
            name = f"image of shape {case['data'].shape}" if target is None else Path(target).name
            print(f"\nPredicting {name}:")
            segmentation = segment(predictor, core, _tensor(case["data"]), properties)
            if writing is not None:
                writing.result()  # no more than one segmentation waits
            writing = None if target is None else writer.submit(write, predictor, segmentation, target, properties)
            results.append(segmentation if target is None else None)
        if writing is not None:
            writing.result()
    return results


def _tensor(data: Any) -> torch.Tensor:
    """nnU-Net's iterators may give a file's name, of a file that is to be removed."""
    if not isinstance(data, str):
        tensor: torch.Tensor = data
        return tensor
    array = np.load(data)
    Path(data).unlink()
    return torch.from_numpy(array)


def _predict_array(
    original: Method,
    predictor: nnUNetPredictor,
    input_image: Segmentation,
    image_properties: dict[str, Any],
    segmentation_previous_stage: Segmentation | None = None,
    output_file_truncated: str | None = None,
    save_or_return_probabilities: bool = False,
) -> Any:
    core = load_scan_core()
    given = segmentation_previous_stage is not None or save_or_return_probabilities
    if given or isinstance(core, str) or why_nnunet(predictor) is not None:
        return original(
            input_image,
            image_properties,
            segmentation_previous_stage,
            output_file_truncated,
            save_or_return_probabilities,
        )
    preprocessor, configuration = preprocessing(predictor)
    with _memory():
        data, _, properties = preprocessor.run_case_npy(
            input_image, None, image_properties, predictor.plans_manager, configuration, predictor.dataset_json
        )
        segmentation = segment(predictor, core, torch.from_numpy(data), properties)
    if output_file_truncated is None:
        return segmentation
    write(predictor, segmentation, output_file_truncated, properties)
    return None


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "_internal_get_data_iterator_from_lists_of_filenames": _preprocess_files,
    "predict_from_data_iterator": _predict_cases,
    "predict_from_files_sequential": _predict_sequentially,
    "predict_single_npy_array": _predict_array,
}
"""Methods of ``nnUNetPredictor``. Each replacement takes the method first, then what the method takes, by the same names."""
