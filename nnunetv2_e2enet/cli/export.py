"""``e2enet export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_e2enet.cli.nnunet import model_folder
from nnunetv2_e2enet.cli.output import check_folder_of, plain_console
from nnunetv2_e2enet.errors import E2ENetError, check_extra
from nnunetv2_e2enet.registration import find_nnunet

HELP = "write a trained model as one file for e2enet predict and Python, or as ONNX for other runtimes"

EXAMPLES = """examples:
  e2enet export nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres hippocampus.e2enet
  e2enet export hippocampus.e2enet -d 4 -c 3d_fullres -tr nnUNetTrainerE2ENet \\
    -f 0 1 2 3 4
  e2enet export nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres \\
    hippocampus_onnx --onnx

The file holds all chosen folds, active weights only, plans and labels. --onnx
writes a folder: one file a fold, and model.json with what a runtime has to do
before and after the network.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.usage = "e2enet export [-h] [MODEL_FOLDER] OUT [-d DATASET -c CONFIGURATION]\n                     [options]"
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="nnU-Net model folder (not with -d), and the file to write"
    )
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: all that are there)")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint (default: %(default)s)")
    model = parser.add_argument_group("model in nnUNet_results, in the place of MODEL_FOLDER")
    model.add_argument("-d", metavar="DATASET", help="name or id of the data set")
    model.add_argument("-c", metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    model.add_argument("-tr", default="nnUNetTrainerE2ENet", metavar="TRAINER", help="trainer (default: %(default)s)")
    model.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default: %(default)s)")
    parser.add_argument("--onnx", action="store_true", help="write a folder of ONNX files")


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    from nnunetv2_e2enet.deployment import pack_model, write_packed
    from nnunetv2_e2enet.deployment.packed import is_packed

    folder, out = _paths(args)
    console = plain_console(soft_wrap=True)
    if args.onnx:
        from nnunetv2_e2enet.deployment.onnx import write_onnx

        check_extra("ONNX", "onnx", "onnx", "onnxscript")
        files = write_onnx(out, pack_model(folder, args.f, args.chk))
        console.print(f"Wrote {', '.join(path.name for path in files)} to {out}")
        return 0
    check_folder_of(out)
    if out.exists() and not is_packed(out):
        raise E2ENetError(f"{out} is there, and no packed model: name another file, or remove it")
    model = pack_model(folder, args.f, args.chk)
    size = write_packed(out, model)
    folds = model.description.folds
    which = f"fold{'s' if len(folds) > 1 else ''} {', '.join(folds)}"
    console.print(f"Wrote {out}: {which}, {model.active_weights} active weights a fold, {size / 1e6:.2f} MB")
    return 0


def _paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """The model folder and what to write."""
    found = " ".join(map(str, args.paths))
    if args.d is None:
        if args.c is not None:
            raise E2ENetError(f"-c {args.c} without -d: name the data set of the model too, or leave -c out")
        if len(args.paths) != 2:
            raise E2ENetError(f"{found}: expected two paths, MODEL_FOLDER and OUT, or one, OUT, with -d and -c")
        return args.paths[0], args.paths[1]
    if args.c is None:
        raise E2ENetError(f"-d {args.d} without -c: name the configuration of the model too, such as -c 3d_fullres")
    if len(args.paths) != 1:
        raise E2ENetError(f"{found}: expected one path, OUT, as -d and -c name the model")
    return model_folder(args.d, args.tr, args.p, args.c), args.paths[0]
