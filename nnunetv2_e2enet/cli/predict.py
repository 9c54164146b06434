"""``e2enet predict``: nnU-Net's prediction from a packed model, with the options of nnUNetv2_predict."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_e2enet.cli.termination import cleaned_up_when_terminated
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import make_writable
from nnunetv2_e2enet.registration import find_nnunet
from nnunetv2_e2enet.settings import STORAGE_16_BIT, override

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunetv2_e2enet.deployment import PackedModel
    from nnunetv2_e2enet.deployment.dicom import Series

HELP = "predict with a file that e2enet export wrote, as nnUNetv2_predict does with a model folder"

EXAMPLES = """examples:
  e2enet predict -m abdomen.e2enet -i imagesTs -o segmentations -device cpu
  e2enet predict -m abdomen.e2enet -i imagesTs -o segmentations \\
      --save_probabilities --continue_prediction
  e2enet predict -m abdomen.e2enet -i scan.nii.gz -o segmentations
  e2enet predict -m abdomen.e2enet -i DICOM_FOLDER -o segmentations --dicom_seg
  e2enet predict -m brain.e2enet \\
      -i t1.nii.gz t1c.nii.gz t2.nii.gz flair.nii.gz -o segmentations

Of a folder with several DICOM series, one is chosen by naming any of its files.
Options of nnUNetv2_predict mean the same here, and so do the results. No
trainer has to be registered, and nnUNet_results is not used.

-npp 0 -nps 0 predicts without processes for preprocessing and export. Where
e2enet computes these steps (on a CPU), it has no such processes, whatever -npp
and -nps are.
"""


STEP_SIZE, FAST_STEP_SIZE = 0.5, 0.75
POSTPROCESSED = "postprocessed"
"""Folder in that of the segmentations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("-m", type=Path, required=True, metavar="FILE", help="packed model")
    parser.add_argument(
        "-i",
        type=Path,
        required=True,
        nargs="+",
        metavar="PATH",
        help="a folder of images named as nnU-Net wants them, or one image: a file or a DICOM series for each channel",
    )
    parser.add_argument("-o", type=Path, required=True, metavar="DIR", help="segmentations; made if it is not there")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to predict with (default: all in the file)")
    parser.add_argument(
        "-step_size", type=float, help=f"step of the sliding window (default: 0.5; --fast: {FAST_STEP_SIZE})", metavar="S"
    )
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    parser.add_argument(
        "--fast", action="store_true", help="no mirroring, larger steps, on a CPU feature maps in 16 bits: less accurate"
    )
    parser.add_argument("--save_probabilities", action="store_true", help="write class probabilities as well")
    parser.add_argument("--continue_prediction", "--c", action="store_true", help="skip cases that have a segmentation in DIR")
    parser.add_argument("--postprocess", action="store_true", help="also write DIR/postprocessed, by the steps in FILE")
    parser.add_argument(
        "--volumes",
        action="store_true",
        help="also write DIR/volumes.csv: millilitres by case and label; with -num_parts a file each",
    )
    parser.add_argument("--dicom_seg", action="store_true", help="also write DIR/CASE.dcm, DICOM SEG, of a DICOM series")
    parser.add_argument("--preview", action="store_true", help="also write DIR/CASE.png: contours in three planes, volumes")
    parser.add_argument("-npp", type=int, default=_number("nnUNet_npp"), help="preprocessing processes (default: 3; below)")
    parser.add_argument("-nps", type=int, default=_number("nnUNet_nps"), help="export processes (default: 3; below)")
    parser.add_argument("-prev_stage_predictions", metavar="DIR", help="segmentations of the cascade's first stage")
    parser.add_argument("-num_parts", type=int, default=1, help="number of commands that share the cases (default: 1)")
    parser.add_argument("-part_id", type=int, default=0, help="number of this command, from 0 (default: 0)")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="device (default: %(default)s)")
    parser.add_argument("--not_on_device", action="store_true", help="keep logits out of GPU memory")
    parser.add_argument("--verbose", action="store_true", help="print nnU-Net's steps")
    parser.add_argument("--disable_progress_bar", action="store_true", help="draw no progress bar, for logs")


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 3


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    import torch

    from nnunetv2_e2enet.deployment import read_packed
    from nnunetv2_e2enet.deployment.dicom_seg import check_dicom_seg, series_to_refer_to
    from nnunetv2_e2enet.deployment.images import check_channels, check_replaceable, check_segmentations, folder_of_images
    from nnunetv2_e2enet.deployment.previews import check_previews
    from nnunetv2_e2enet.deployment.segmenter import failures_in_one_line, make_predictor
    from nnunetv2_e2enet.deployment.volumes import check_volumes

    model = read_packed(args.m)
    model = model if args.f is None else model.with_folds(args.f)
    _check(args, model)
    _set_threads(args.device)
    step_size = (FAST_STEP_SIZE if args.fast else STEP_SIZE) if args.step_size is None else args.step_size
    series = series_to_refer_to(args.i, args.o) if args.dicom_seg else None
    changes = {"engine_storage": STORAGE_16_BIT} if args.fast else {}
    with cleaned_up_when_terminated(), override(**changes), failures_in_one_line(), folder_of_images(args.i, model) as images:
        predictor = make_predictor(
            model,
            torch.device(args.device),
            step_size=step_size,
            mirroring=not (args.disable_tta or args.fast),
            on_device=not args.not_on_device,
            verbose=args.verbose,
            progress=not args.disable_progress_bar,
        )
        cases = _first_channels(images, model)[args.part_id :: args.num_parts]
        _check_places(args, cases, images, model)
        check_channels(cases, model)
        if images != args.i[0]:  # of another folder, or of another patient, a case may have the same name
            for image in cases:
                check_replaceable(_segmentation(args.o, image, model), image, model)
        _check_first_stage(args, cases, model)
        if args.volumes:
            check_volumes(cases, model)
        if args.preview:
            check_previews(cases, model)
        if series is not None:
            if images == args.i[0]:
                raise E2ENetError(
                    f"--dicom_seg: {images} holds images for nnU-Net; expected a DICOM series alone, or leave it out"
                )
            for image in cases:  # one, or none of this part
                check_dicom_seg(image, series, model)
        make_writable(args.o)
        segmented = [_segmentation(args.o, image, model) for image in cases]
        if args.continue_prediction:
            check_segmentations(segmented, model)
        former = {path: path.stat().st_mtime_ns for path in segmented if path.is_file()}
        _predict(args, predictor, images)
        check_segmentations(segmented, model)
        _finish(args, model, cases, segmented, series)
        _name_what_is_old(args, model, former)
    return 0


def _first_channels(images: Path, model: PackedModel) -> list[Path]:
    """The first channel of each case, in nnU-Net's order."""
    ending = f"_0000{model.description.dataset['file_ending']}"
    return sorted(images.glob(f"*{ending}"), key=lambda path: path.name.removesuffix(ending))


def _segmentation(folder: Path, image: Path, model: PackedModel) -> Path:
    """The segmentation of the case whose first channel is ``image``."""
    ending = model.description.dataset["file_ending"]
    return folder / f"{image.name.removesuffix(f'_0000{ending}')}{ending}"


def _check_places(args: argparse.Namespace, cases: Sequence[Path], images: Path, model: PackedModel) -> None:
    """Raises E2ENetError where a segmentation would take the place of an image, or would be taken for one the next time.

    Also where it would take the place of the first stage's, or could not be written because of the folder's name.
    """
    from nnunetv2_e2enet.imaging import check_name

    check_name(args.o)
    if args.o.resolve() == images.resolve():
        raise E2ENetError(
            f"{args.o} holds the images, and nnU-Net would take segmentations there for images: name another folder with -o"
        )
    given = {path.resolve() for path in (*args.i, *images.iterdir())}
    previous = args.prev_stage_predictions
    first_stage = set() if previous is None else {_segmentation(Path(previous), image, model).resolve() for image in cases}
    for folder in (args.o, args.o / POSTPROCESSED) if args.postprocess else (args.o,):
        for target in (_segmentation(folder, image, model) for image in cases):
            if target.resolve() in given:
                raise E2ENetError(
                    f"the segmentation {target} would replace an image of that name: name another folder with -o"
                )
            if target.resolve() in first_stage:
                raise E2ENetError(
                    f"the segmentation {target} would replace the first stage's (-prev_stage_predictions): name another "
                    "folder with -o"
                )


def _check_first_stage(args: argparse.Namespace, cases: Sequence[Path], model: PackedModel) -> None:
    """Raises E2ENetError where a case has no whole segmentation of the cascade's first stage, as large as its image."""
    from nnunetv2_e2enet.imaging import check_whole, read_header

    if args.prev_stage_predictions is None:
        return
    for image in cases:
        file = _segmentation(Path(args.prev_stage_predictions), image, model)
        if not file.is_file():
            raise E2ENetError(f"{file} is missing: expected the first stage's segmentation of {image}")
        check_whole(file)
        found, expected = (read_header(path).GetSize() for path in (file, image))
        if found != expected:
            raise E2ENetError(
                f"{file} has {found} voxels: expected {expected}, the size of {image}; predict it with the first stage"
            )


def _predict(args: argparse.Namespace, predictor: nnUNetPredictor, images: Path) -> None:
    """Files are listed here: nnU-Net would fork a pool for it, see ``cleaned_up_when_terminated``."""
    from nnunetv2_e2enet.deployment.images import channels_by_case

    cases = sorted(channels_by_case(images, predictor.dataset_json["file_ending"]).items())  # in nnU-Net's order
    files = [[str(file) for file in channels] for _, channels in cases]
    options: dict[str, Any] = {
        "save_probabilities": args.save_probabilities,
        "overwrite": not args.continue_prediction,
        "folder_with_segs_from_prev_stage": args.prev_stage_predictions,
    }
    if args.npp == args.nps == 0:
        predictor.predict_from_files_sequential(files, str(args.o), **options)
    else:
        options |= {"num_processes_preprocessing": args.npp, "num_processes_segmentation_export": args.nps}
        predictor.predict_from_files(files, str(args.o), num_parts=args.num_parts, part_id=args.part_id, **options)


def _finish(
    args: argparse.Namespace, model: PackedModel, cases: Sequence[Path], segmented: Sequence[Path], series: Series | None
) -> None:
    """Writes all that is made of the segmentations of ``cases``; other parts, which run at the same time, write theirs."""
    from nnunetv2_e2enet.deployment.dicom_seg import write_dicom_seg
    from nnunetv2_e2enet.deployment.previews import write_previews
    from nnunetv2_e2enet.deployment.volumes import write_volumes

    progress = not args.disable_progress_bar
    folders = [args.o]
    if args.postprocess:
        folders.append(_postprocess(segmented, args.o / POSTPROCESSED, model, progress))
    for folder in folders:
        if args.volumes:
            write_volumes(folder / _table(args), [folder / path.name for path in segmented], model, progress)
        if args.preview:
            write_previews(folder, cases, model, progress)
        if series is not None:
            for path in (_segmentation(folder, image, model) for image in cases):
                case = path.name.removesuffix(model.description.dataset["file_ending"])
                write_dicom_seg(folder / f"{case}.dcm", path, series, model, folder != args.o)


def _table(args: argparse.Namespace) -> str:
    """Name of the file of volumes."""
    return "volumes.csv" if args.num_parts == 1 else f"volumes_{args.part_id}_of_{args.num_parts}.csv"


def _of_another_part(table: Path, args: argparse.Namespace) -> bool:
    return table.match(f"volumes_*_of_{args.num_parts}.csv") and table.name != _table(args)


def _name_what_is_old(args: argparse.Namespace, model: PackedModel, former: Mapping[Path, int]) -> None:
    """Prints which files were made of segmentations that have been replaced.

    Args:
        args: of the command.
        model: says how files are named.
        former: times at which earlier segmentations of these cases were written, ns.
    """
    ending, post = model.description.dataset["file_ending"], args.o / POSTPROCESSED
    tables = [file for folder in (args.o, post) for file in folder.glob("volumes*.csv") if not _of_another_part(file, args)]
    old: set[str] = set()
    for path, before in former.items():
        now = path.stat().st_mtime_ns
        if now == before:
            continue
        case = path.name.removesuffix(ending)
        files = [folder / f"{case}{made}" for folder in (args.o, post) for made in (".png", ".dcm")]
        files += [*tables, post / path.name]
        if not args.save_probabilities:  # with this option both are new, and older than the segmentation
            files += [path.with_name(f"{case}{made}") for made in (".npz", ".pkl")]
        old |= {str(file.relative_to(args.o)) for file in files if file.is_file() and file.stat().st_mtime_ns < now}
    if old:
        others = f" and {len(old) - 3} others" if len(old) > 3 else ""
        print(f"{', '.join(sorted(old)[:3])}{others}: made of former segmentations. Make them again, or take them away")


def _check(args: argparse.Namespace, model: PackedModel) -> None:
    """Before minutes of work are lost."""
    if not 0 <= args.part_id < args.num_parts:
        raise E2ENetError(f"-part_id {args.part_id} of -num_parts {args.num_parts}: parts are counted from 0")
    if args.npp < 0 or args.nps < 0 or (args.npp == 0) != (args.nps == 0):
        raise E2ENetError(f"-npp {args.npp} -nps {args.nps}: at least 1 process each, or 0 for both to work without")
    if args.npp == 0 and args.num_parts > 1:
        raise E2ENetError("-npp 0 -nps 0 predicts all parts in one process: leave -num_parts out, or use 1 process each")
    previous = model.description.managers()[1].previous_stage_name
    if (previous is None) != (args.prev_stage_predictions is None):
        needed = "is no cascade's second stage" if previous is None else f"needs the segmentations of {previous}"
        raise E2ENetError(f"{args.m} {needed}: see -prev_stage_predictions")
    if args.postprocess and not model.description.postprocessing:
        raise E2ENetError(
            f"{args.m} holds no postprocessing{'' if args.f is None else ' of these folds alone'}: run "
            "nnUNetv2_find_best_configuration for these folds and export again, or leave out --postprocess"
        )


def _set_threads(device: str) -> None:
    """As nnUNetv2_predict sets them, so that results are the same to the bit."""
    import torch

    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    elif device == "cuda":
        torch.set_num_threads(1)


def _postprocess(segmentations: Sequence[Path], target: Path, model: PackedModel, progress: bool) -> Path:
    """The folder ``target``, with what nnU-Net's postprocessing leaves of each segmentation."""
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing
    from tqdm import tqdm

    from nnunetv2_e2enet.deployment.segmenter import postprocessing_steps
    from nnunetv2_e2enet.prediction.writing import write_segmentation

    reader = model.description.managers()[0].image_reader_writer_class()
    make_writable(target)
    for path in tqdm(segmentations, desc="Postprocessing", disable=not progress):
        segmentation, properties = reader.read_seg(str(path))
        processed = apply_postprocessing(segmentation[0], *postprocessing_steps(model))
        write_segmentation(target / path.name, processed, properties, reader)
    return target
