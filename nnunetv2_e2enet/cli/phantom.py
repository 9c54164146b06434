"""``e2enet phantom``: a small synthetic data set in nnU-Net's raw format."""

import argparse
import re

from nnunetv2_e2enet.cli.nnunet import RAW, nnunet_folder
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import find_nnunet

HELP = "write a small synthetic data set (four organs in a torso, or fifteen structures) into $nnUNet_raw"

EXAMPLE = """\
example:
  e2enet phantom 300 --cases 16 --test-cases 4
  nnUNetv2_plan_and_preprocess -d 300 -c 3d_fullres
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("dataset_id", metavar="DATASET_ID", type=int, help="a free number from 1 to 999")
    parser.add_argument("--name", default="Phantom", help="name of the data set: letters, digits, - and _ (default: Phantom)")
    parser.add_argument(
        "--cases", metavar="N", type=int, default=16, help="training cases; nnU-Net's five folds need 5 (default: %(default)s)"
    )
    parser.add_argument(
        "--test-cases", metavar="M", type=int, default=4, help="test cases, in imagesTs and labelsTs (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        metavar=("D", "H", "W"),
        type=int,
        nargs=3,
        default=(24, 64, 64),
        help="voxels along depth, height, width (default: 24 64 64)",
    )
    parser.add_argument(
        "--many", action="store_true", help="fifteen structures of very different size, instead of four organs"
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="same seed, same cases (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    from nnunetv2_e2enet.datasets import write_phantom_dataset

    folder = nnunet_folder(RAW) / _dataset_name(args.dataset_id, args.name)
    _check_id_is_free(args.dataset_id, folder.name)
    write_phantom_dataset(folder, args.cases, args.test_cases, args.seed, tuple(args.size), args.many)
    print(f"Wrote {args.cases} training and {args.test_cases} held-out cases to {folder}")
    return 0


def _dataset_name(dataset_id: int, name: str) -> str:
    if not 1 <= dataset_id <= 999:
        raise E2ENetError(f"data set number {dataset_id}: nnU-Net expects 1 to 999; choose a free one")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise E2ENetError(f"data set name {name!r}: expected letters, digits, - and _ only; choose such a name")
    return f"Dataset{dataset_id:03d}_{name}"


def _check_id_is_free(dataset_id: int, name: str) -> None:
    """nnU-Net refuses to work with a number that has two names."""
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    others = [str(other) for other in find_candidate_datasets(dataset_id) if other != name]
    if others:
        raise E2ENetError(f"data set number {dataset_id} is taken by {others[0]}: expected a free number; choose another")
