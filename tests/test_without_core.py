"""Whole scans where there is no compiled core, as on macOS, on Windows, and where no compiler was installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from test_prediction import image, make_plans, make_predictor

from nnunetv2_e2enet.prediction import takeover, why_never, why_nnunet

NO_CORE = "the compiled core was not built"


def test_nnunet_predicts_where_there_is_no_core(
    tmp_path: Path, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its segmentations are those of a process in which its methods are left alone, and the reason is given."""
    monkeypatch.chdir(tmp_path)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image((8, 20, 21))[0]), "a_0000.nii.gz")
    monkeypatch.setattr(takeover, "load_scan_core", lambda: NO_CORE)
    predictor = make_predictor(make_plans(spacing=[1.2, 0.9, 0.9]))
    found = {}
    for predicting in ("off", "on"):
        setting(predictor=predicting)
        reason = why_nnunet(predictor)
        assert reason == why_never() == (NO_CORE if predicting == "on" else "it is switched off (nnUNet_e2enet_predictor)")
        array = predictor.predict_single_npy_array(image((8, 20, 21)), {"spacing": [1, 1, 1]})
        predictor.predict_from_files_sequential([["a_0000.nii.gz"]], [predicting])
        file = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(f"{predicting}.nii.gz"))
        found[predicting] = (array, file)
    for ours, theirs in zip(found["on"], found["off"], strict=True):
        assert len(np.unique(theirs)) > 1
        np.testing.assert_array_equal(ours, theirs)
