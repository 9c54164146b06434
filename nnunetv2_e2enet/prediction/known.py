"""Whether nnU-Net's prediction is the one whose results are reproduced here. Nothing else of nnU-Net is imported for that."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from functools import cache, reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PREDICTOR = "nnunetv2.inference.predict_from_raw_data:nnUNetPredictor"
_PREPROCESSOR = "nnunetv2.preprocessing.preprocessors.default_preprocessor:DefaultPreprocessor"
_EXPORT = "nnunetv2.inference.export_prediction"
REPRODUCED = (
    f"{_PREDICTOR}._internal_get_data_iterator_from_lists_of_filenames",
    f"{_PREDICTOR}.predict_from_data_iterator",
    f"{_PREDICTOR}.predict_from_files",
    f"{_PREDICTOR}.predict_from_files_sequential",
    f"{_PREDICTOR}.predict_single_npy_array",
    f"{_PREDICTOR}.predict_logits_from_preprocessed_data",
    f"{_PREDICTOR}.predict_sliding_window_return_logits",
    f"{_PREDICTOR}._internal_get_sliding_window_slicers",
    f"{_PREDICTOR}._internal_maybe_mirror_and_predict",
    f"{_PREDICTOR}._internal_predict_sliding_window_return_logits",
    "nnunetv2.inference.data_iterators:preprocess_fromfiles_save_to_queue",
    "nnunetv2.inference.data_iterators:PreprocessAdapterFromNpy",
    "nnunetv2.inference.sliding_window_prediction:compute_gaussian",
    f"{_EXPORT}:convert_predicted_logits_to_segmentation_with_correct_shape",
    f"{_EXPORT}:export_prediction_from_logits",
    "nnunetv2.preprocessing.resampling.default_resampling",
    "nnunetv2.utilities.label_handling.label_handling:LabelManager",
    f"{_PREPROCESSOR}.run_case",
    f"{_PREPROCESSOR}.run_case_npy",
)
"""Modules, and functions and classes in them."""

# SHA-256 of their source texts
KNOWN = {
    "2.8.0": "abed2605ee04683cb37e5432174929b2b78ab2962439b1b35871223487713c81",
    "2.8.1": "d6146e99318bd5d3cd60da011368e15edba59bc5706941ef49efddc419776593",
}


def digest(reproduced: Sequence[str] = REPRODUCED) -> str | None:
    """SHA-256 of the source texts; None if one is missing or cannot be read. Call it before anything is replaced."""
    try:
        texts = [inspect.getsource(_found(name)) for name in reproduced]
    except (ImportError, AttributeError, OSError):
        return None
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    return inspect.unwrap(reduce(getattr, path.split("."), found)) if path else found


_digest = cache(digest)


def why_unknown() -> str | None:
    """Why the installed nnU-Net may give other results; None if it is known. Asked first before anything is replaced."""
    try:
        installed = version("nnunetv2")
    except PackageNotFoundError:  # it lies on the path, and is not installed
        installed = "of an unknown version"
    if installed in KNOWN and _digest() == KNOWN[installed]:
        return None
    return f"nnU-Net {installed} is not one that is known here ({', '.join(KNOWN)}), or it was changed"
