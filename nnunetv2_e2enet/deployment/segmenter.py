"""Prediction with a packed model: nnU-Net's own predictor on the network in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from io import StringIO
from math import isfinite
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import SimpleITK
import torch
from numpy.typing import NDArray

from nnunetv2_e2enet.deployment.dicom import choose_series
from nnunetv2_e2enet.deployment.images import WRITTEN, check_images, folder_of_images, temporary_folder
from nnunetv2_e2enet.deployment.packed import PackedModel, read_packed
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import SAME_SPACING, WITHOUT_SPACING, Geometry, check_finite, read_image, readable
from nnunetv2_e2enet.machine import check_device, out_of_memory_in_one_line
from nnunetv2_e2enet.prediction.writing import write_segmentation

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

INFINITE_LOGITS = "Encountered inf in predicted array"
"""How nnU-Net's error about them begins."""
REORIENTS = "WithReorient"
"""How the names of nnU-Net's readers end that turn images to axes of their own."""
DEAD_WORKERS = ("Background workers died", "Segmentation export worker died")
"""How nnU-Net's errors about its own processes begin."""

Properties = Mapping[str, Any]
Segmentation = NDArray[Any]


def make_predictor(
    model: PackedModel,
    device: torch.device,
    step_size: float = 0.5,
    mirroring: bool = True,
    on_device: bool = True,
    verbose: bool = False,
    progress: bool = True,
) -> nnUNetPredictor:
    """nnU-Net's predictor, ready to predict with all folds of a model; the trainer need not be known to nnU-Net.

    Args:
        model: a packed model.
        device: to predict on.
        step_size: of the sliding window, relative to the patch.
        mirroring: average over mirrored images, where the training mirrored them.
        on_device: keep the logits of a whole image on a GPU.
        verbose: let nnU-Net print the steps of a prediction.
        progress: let nnU-Net draw a bar over the windows.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunetv2_e2enet.prediction import install

    if not 0 < step_size <= 1:
        raise E2ENetError(f"the step size is {step_size}: expected more than 0 and at most 1, nnU-Net's is 0.5")
    check_device(device.type, "-device")
    description = model.description
    install()
    with redirect_stdout(StringIO()):  # it says that CPUs have no GPU memory
        predictor = nnUNetPredictor(
            tile_step_size=step_size,
            use_mirroring=mirroring,
            perform_everything_on_device=on_device,
            device=device,
            verbose=verbose,
            verbose_preprocessing=verbose,
            allow_tqdm=progress,
        )
    plans, settings = description.managers()
    folds = list(model.states())
    network = description.network().to_empty(device="cpu")
    network.predicts_only = True
    network.load_state_dict(folds[0])  # for what is asked of the network before the first window, as in nnU-Net
    predictor.manual_initialization(
        network,
        plans,
        settings,
        folds,
        description.dataset,
        description.trainer,
        None if description.mirroring_axes is None else tuple(description.mirroring_axes),
    )
    return predictor


def postprocessing_steps(model: PackedModel) -> tuple[list[Any], list[dict[str, Any]]]:
    """Functions and their arguments, as nnU-Net's ``apply_postprocessing`` takes them."""
    from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

    steps = model.description.postprocessing
    return [remove_all_but_largest_component_from_segmentation] * len(steps), [{"labels_or_regions": s} for s in steps]


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Too little memory, logits that float16 cannot hold, and the end of nnU-Net's processes become an E2ENetError."""
    with out_of_memory_in_one_line():
        try:
            yield
        except RuntimeError as error:
            if any(words in str(error) for words in DEAD_WORKERS):
                raise E2ENetError(
                    "a process of nnU-Net for preprocessing or export has ended, for the reason above or for want of memory: "
                    "close other programs, or use fewer processes (-npp 1 -nps 1)"
                ) from error
            if INFINITE_LOGITS not in str(error):
                raise
            raise E2ENetError(
                "the network's logits are too large for float16, in which nnU-Net sums them: check that the image is of the "
                "kind that the model was trained with, and the model on other images"
            ) from error


def _device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise E2ENetError(f"device is {name!r}: expected cpu, cuda, cuda:NUMBER or mps") from error


class Segmenter:
    """Segments images with a packed model.

    ``Segmenter.load("model.e2enet")(image)`` takes

    - a SimpleITK image, or a list of them, one a channel: gives a SimpleITK image of the same geometry;
    - the path of an image or of a folder with one DICOM series, or a list of paths, one a channel: gives an array
      ``(depth, height, width)`` on the axes of the file;
    - ``(array, properties)`` as nnU-Net's readers give them, the array ``(channels, depth, height, width)`` and
      ``properties["spacing"]`` in mm in the same order of axes: gives an array ``(depth, height, width)``.

    The segmentation is that of ``nnUNetv2_predict`` with the same folds. Threads are torch's. Two threads that call one
    Segmenter take turns.
    """

    def __init__(
        self,
        model: PackedModel,
        device: torch.device | str = "cpu",
        step_size: float = 0.5,
        mirroring: bool = True,
        postprocess: bool = False,
    ) -> None:
        """As ``load``, of a model that was read already."""
        previous = model.description.managers()[1].previous_stage_name
        if previous is not None:
            raise E2ENetError(
                f"the model is the second stage of a cascade and needs the segmentations of {previous}: use "
                "e2enet predict with -prev_stage_predictions"
            )
        self.model = model
        self._predictor = make_predictor(model, _device(device), step_size, mirroring, progress=False)
        self._postprocessing = postprocessing_steps(model) if postprocess else ([], [])
        self._lock = Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        step_size: float = 0.5,
        mirroring: bool = True,
        postprocess: bool = False,
        folds: Sequence[str | int] | str | int | None = None,
    ) -> Segmenter:
        """Open a file that ``e2enet export`` wrote. Nothing in it is executed.

        Args:
            path: of the file.
            device: to predict on.
            step_size: of the sliding window, relative to the patch.
            mirroring: average over mirrored images, where the training mirrored them; 8 times the work in 3D.
            postprocess: keep the largest components that nnU-Net's cross-validation found to help, if the file names any.
            folds: one or several, whose predictions are averaged; all in the file unless given.

        Raises:
            E2ENetError: the file cannot be used, has not these folds or no postprocessing of them alone, or is of a cascade's
                second stage.
        """
        whole = read_packed(Path(path))
        model = whole if folds is None else whole.with_folds(folds)
        if postprocess and whole.description.postprocessing and not model.description.postprocessing:
            raise E2ENetError(f"{path} holds postprocessing for all of its folds together: leave out postprocess, or folds")
        return cls(model, device, step_size, mirroring, postprocess)

    @property
    def labels(self) -> dict[str, Any]:
        """Name to number, or numbers of a region, as in nnU-Net's dataset.json."""
        return dict(self.model.description.dataset["labels"])

    @overload
    def __call__(self, image: SimpleITK.Image | Sequence[SimpleITK.Image]) -> SimpleITK.Image: ...

    @overload
    def __call__(
        self, image: str | Path | Sequence[str] | Sequence[Path] | tuple[Segmentation, Properties]
    ) -> Segmentation: ...

    def __call__(self, image: Any) -> SimpleITK.Image | Segmentation:
        """The segmentation of an image.

        Raises:
            E2ENetError: the image cannot be read, has other channels than the model was trained with or voxels that are not
                finite, needs more memory than there is, or leads to logits that float16 cannot hold.
        """
        with failures_in_one_line():
            return self._segmented(image)

    def _segmented(self, image: Any) -> SimpleITK.Image | Segmentation:
        if isinstance(image, tuple) and len(image) == 2 and isinstance(image[0], np.ndarray):
            return self._segment(*image)
        channels: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        if channels and all(isinstance(channel, (str, Path)) for channel in channels):
            array, properties = self._read(channels)
            return self._as_in_file(self._segment(array, properties, called=", ".join(map(str, channels))), properties)
        if channels and all(isinstance(channel, SimpleITK.Image) for channel in channels):
            array, properties = self._from_simpleitk(channels)
            segmentation = self._segment(array, properties)
            result = SimpleITK.GetImageFromArray(segmentation[0] if channels[0].GetDimension() == 2 else segmentation)
            result.CopyInformation(channels[0])
            return result
        raise E2ENetError(f"the image is {type(image).__name__}: expected a path, a SimpleITK image, or (array, properties)")

    def _read(self, paths: Sequence[str | Path]) -> tuple[Segmentation, Properties]:
        files = [Path(path) for path in paths]
        series = [choose_series(file) for file in files]
        for file, found in zip(files, series, strict=True):
            if found is None and not file.is_file():
                raise E2ENetError(f"{file} is not a file: expected an image, or a folder with a DICOM series")
        ending = self.model.description.dataset["file_ending"]
        converted = any(series) or (ending in WRITTEN and not all(file.name.endswith(ending) for file in files))
        numbered = all(file.name.endswith(f"_{i:04d}{ending}") for i, file in enumerate(files))
        # nnU-Net's reader of 3D TIFF files cuts the number of a channel from a name, and looks for the spacing under the rest
        if converted or (ending in WITHOUT_SPACING and not numbered):
            with folder_of_images(files, self.model) as folder:
                return self._read(sorted(folder.glob(f"*{ending}")))
        check_images(files)
        with readable(files[0]):
            array, properties = self._predictor.plans_manager.image_reader_writer_class().read_images([*map(str, files)])
        return array, properties

    def _as_in_file(self, segmentation: Segmentation, properties: Properties) -> Segmentation:
        """A segmentation on the axes of the file that was read, which are those of the file that nnU-Net writes."""
        reader = self._predictor.plans_manager.image_reader_writer_class
        if not reader.__name__.endswith(REORIENTS):
            return segmentation
        with temporary_folder() as folder:
            file = Path(folder) / f"segmentation{self.model.description.dataset['file_ending']}"
            write_segmentation(file, segmentation, properties, reader())
            written: NDArray[Any] = SimpleITK.GetArrayFromImage(read_image(file))
            return written

    def _from_simpleitk(self, images: Sequence[SimpleITK.Image]) -> tuple[Segmentation, Properties]:
        """Array and spacing as nnU-Net's SimpleITKIO reads them from files."""
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        reader = self._predictor.plans_manager.image_reader_writer_class
        if reader is not SimpleITKIO:
            raise E2ENetError(
                f"the model was trained on images read by {reader.__name__}, whose axes may be others than SimpleITK's: give "
                "the path of the image"
            )
        first = images[0]
        for number, image in enumerate(images):
            if image.GetDimension() not in (2, 3) or image.GetNumberOfComponentsPerPixel() != 1:
                raise E2ENetError("a SimpleITK image has more than three axes or several components: give one image a channel")
            difference = Geometry.of(image).difference(Geometry.of(first), "channel 0", SAME_SPACING)
            if difference is not None:
                raise E2ENetError(f"channel {number} has {difference}: resample the channels to one grid")
        spacing = [abs(s) for s in reversed(first.GetSpacing())]
        array = np.stack([SimpleITK.GetArrayFromImage(image).astype(np.float32) for image in images])
        if first.GetDimension() == 2:  # one slice, thick enough that nothing is resampled across it
            return array[:, None], {"spacing": [999 * max(spacing), *spacing]}
        return array, {"spacing": spacing}

    def _segment(self, array: Segmentation, properties: Properties, called: str = "the image") -> Segmentation:
        from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing

        channels = self.model.channels
        if array.ndim != 4 or array.shape[0] != len(channels) or 0 in array.shape:
            raise E2ENetError(
                f"the image has the shape {list(array.shape)}, but (channels, depth, height, width) with the channels "
                f"{', '.join(channels)} is expected"
            )
        spacing = properties.get("spacing", ())
        if len(spacing) != 3 or not all(isfinite(s) and s > 0 for s in spacing):
            raise E2ENetError(f"the image's spacing is {spacing}, but three positive numbers in mm are expected")
        check_finite(array, called)
        with self._lock:
            segmentation: NDArray[Any] = self._predictor.predict_single_npy_array(array, deepcopy(dict(properties)))
        processed: NDArray[Any] = apply_postprocessing(segmentation, *self._postprocessing)
        return processed
