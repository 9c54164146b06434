"""``e2enet predict``: nnU-Net's prediction from a packed model, with the options of nnUNetv2_predict."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import find_nnunet

if TYPE_CHECKING:
    from nnunetv2_e2enet.deployment import PackedModel

HELP = "predict with a file that e2enet export wrote, as nnUNetv2_predict does with a model folder"

EXAMPLES = """examples:
  e2enet predict -m hippocampus.e2enet -i imagesTs -o segmentations -device cpu
  e2enet predict -m hippocampus.e2enet -i imagesTs -o segmentations --save_probabilities --continue_prediction

Options are those of nnUNetv2_predict, and so are the results. No trainer has to be registered, and nnUNet_results is not used.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("-m", type=Path, required=True, metavar="FILE", help="packed model")
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="images, named as nnU-Net wants them")
    parser.add_argument("-o", type=Path, required=True, metavar="DIR", help="segmentations; made if it is not there")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the sliding window (default: 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    parser.add_argument("--save_probabilities", action="store_true", help="write class probabilities as well")
    parser.add_argument("--continue_prediction", action="store_true", help="leave cases that are predicted")
    parser.add_argument("--postprocess", action="store_true", help="also write OUT/postprocessed, with what nnU-Net found")
    parser.add_argument("--volumes", action="store_true", help="also write OUT/volumes.csv: millilitres by case and label")
    parser.add_argument("-npp", type=int, default=_number("nnUNet_npp"), help="preprocessing processes (default: 3)")
    parser.add_argument("-nps", type=int, default=_number("nnUNet_nps"), help="export processes (default: 3)")
    parser.add_argument("-prev_stage_predictions", metavar="DIR", help="segmentations of the cascade's first stage")
    parser.add_argument("-num_parts", type=int, default=1, help="of how many such commands (default: 1)")
    parser.add_argument("-part_id", type=int, default=0, help="which of them this is (default: 0)")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: %(default)s")
    parser.add_argument("--not_on_device", action="store_true", help="keep logits out of GPU memory")
    parser.add_argument("--verbose", action="store_true", help="say more")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs")


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 3


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    import torch

    from nnunetv2_e2enet.deployment import read_packed
    from nnunetv2_e2enet.deployment.segmenter import make_predictor

    model = read_packed(args.m)
    _check(args, model)
    _set_threads(args.device)
    predictor = make_predictor(
        model,
        torch.device(args.device),
        args.step_size,
        not args.disable_tta,
        not args.not_on_device,
        args.verbose,
        not args.disable_progress_bar,
    )
    options: dict[str, Any] = {
        "save_probabilities": args.save_probabilities,
        "overwrite": not args.continue_prediction,
        "folder_with_segs_from_prev_stage": args.prev_stage_predictions,
    }
    args.o.mkdir(parents=True, exist_ok=True)
    if args.npp == args.nps == 0:
        predictor.predict_from_files_sequential(str(args.i), str(args.o), **options)
    else:
        options |= {"num_processes_preprocessing": args.npp, "num_processes_segmentation_export": args.nps}
        predictor.predict_from_files(str(args.i), str(args.o), num_parts=args.num_parts, part_id=args.part_id, **options)
    if args.postprocess:
        _postprocess(args.o, model)
    if args.volumes:
        from nnunetv2_e2enet.deployment.volumes import write_volumes

        write_volumes(args.o, model)
        if args.postprocess:
            write_volumes(args.o / "postprocessed", model)
    return 0


def _check(args: argparse.Namespace, model: PackedModel) -> None:
    """Before minutes of work are lost."""
    ending = model.description.dataset["file_ending"]
    if not any(args.i.glob(f"*_0000{ending}")):
        raise E2ENetError(f"{args.i} holds no *_0000{ending}: expected a folder of images, named as nnU-Net wants them")
    if not 0 <= args.part_id < args.num_parts:
        raise E2ENetError(f"-part_id {args.part_id} of -num_parts {args.num_parts}: parts are counted from 0")
    if args.npp < 0 or args.nps < 0 or (args.npp == 0) != (args.nps == 0):
        raise E2ENetError(f"-npp {args.npp} -nps {args.nps}: at least 1 process each, or 0 for both to work without")
    previous = model.description.managers()[1].previous_stage_name
    if (previous is None) != (args.prev_stage_predictions is None):
        needed = "is no cascade's second stage" if previous is None else f"needs the segmentations of {previous}"
        raise E2ENetError(f"{args.m} {needed}: see -prev_stage_predictions")
    if args.postprocess and not model.description.postprocessing:
        raise E2ENetError(
            f"{args.m} holds no postprocessing: run nnUNetv2_find_best_configuration for these folds and export again, or "
            "leave out --postprocess"
        )


def _set_threads(device: str) -> None:
    """As nnUNetv2_predict sets them, so that results are the same to the bit."""
    import torch

    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    elif device == "cuda":
        torch.set_num_threads(1)


def _postprocess(folder: Path, model: PackedModel) -> None:
    from nnunetv2.postprocessing.remove_connected_components import load_postprocess_save

    from nnunetv2_e2enet.deployment.segmenter import postprocessing_steps

    reader = model.description.managers()[0].image_reader_writer_class()
    target = folder / "postprocessed"
    target.mkdir(exist_ok=True)
    for path in sorted(folder.glob(f"*{model.description.dataset['file_ending']}")):
        load_postprocess_save(str(path), str(target / path.name), reader, *postprocessing_steps(model))
