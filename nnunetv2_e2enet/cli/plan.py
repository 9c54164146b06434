"""``e2enet plan``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from nnunetv2_e2enet.cli.nnunet import PREPROCESSED, RAW, dataset_name, nnunet_folder
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import read_json
from nnunetv2_e2enet.registration import find_in_nnunet, find_nnunet

FINGERPRINT_KEYS = (  # that planning reads
    *("spacings", "shapes_after_crop", "median_relative_size_after_cropping"),
    "foreground_intensity_properties_per_channel",
)
HELP = "plan with nnUNetPlannerE2ENet, registered or not (as nnUNetv2_plan_experiment does)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example:\n"
        "  nnUNetv2_extract_fingerprint -d 4\n"
        "  e2enet plan -d 4 -gpu_memory_target 16 \\\n"
        "    -overwrite_plans_name nnUNetE2ENetPlans_16G\n"
        "  nnUNetv2_preprocess -d 4 -plans_name nnUNetE2ENetPlans_16G -c 3d_fullres\n"
    )
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="data set ids")
    parser.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory to plan for (default: 8)")
    parser.add_argument("-preprocessor_name", default="DefaultPreprocessor", help="its name (default: DefaultPreprocessor)")
    parser.add_argument(
        "-overwrite_target_spacing", nargs=3, type=float, metavar="MM", help="target spacing of 3d_fullres, in mm"
    )
    parser.add_argument("-overwrite_plans_name", metavar="NAME", help="name of the plans (default: nnUNetE2ENetPlans)")


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    from nnunetv2_e2enet.planners.e2enet_planners import nnUNetPlannerE2ENet

    if args.gpu_memory_target is not None and not 0 < args.gpu_memory_target < math.inf:
        raise E2ENetError(f"-gpu_memory_target {args.gpu_memory_target:g}: expected GB above 0")
    spacing = args.overwrite_target_spacing or []
    if not all(0 < mm < math.inf for mm in spacing):
        raise E2ENetError(f"-overwrite_target_spacing {' '.join(f'{mm:g}' for mm in spacing)}: expected mm above 0")
    _check_preprocessor(args.preprocessor_name)
    raw, preprocessed = nnunet_folder(RAW), nnunet_folder(PREPROCESSED)
    for dataset_id in args.d:
        name = dataset_name(str(dataset_id))
        read_json(raw / name / "dataset.json")
        if args.overwrite_plans_name is not None:
            _check_plans_name(args.overwrite_plans_name, preprocessed / name, nnUNetPlannerE2ENet.__name__)
        fingerprint = preprocessed / name / "dataset_fingerprint.json"
        if fingerprint.exists():  # nnU-Net says what to do where it is missing
            found = read_json(fingerprint)
            missing = [key for key in FINGERPRINT_KEYS if key not in found]
            if missing:
                again = f"write it again with `nnUNetv2_extract_fingerprint -d {dataset_id}`"
                raise E2ENetError(f"{fingerprint} lacks {', '.join(missing)}: {again}")
    for dataset_id in args.d:
        try:
            plan_experiment_dataset(
                dataset_id,
                nnUNetPlannerE2ENet,
                args.gpu_memory_target,
                args.preprocessor_name,
                args.overwrite_target_spacing,
                args.overwrite_plans_name,
            )
        except (RuntimeError, OSError) as error:  # nnU-Net: a fingerprint is missing, plans cannot be written
            reason = str(error).splitlines()[0]
            raise E2ENetError(f"data set {dataset_id} cannot be planned: {reason}") from error
    return 0


def _check_preprocessor(name: str) -> None:
    """Raises E2ENetError unless nnU-Net finds a preprocessor."""
    if find_in_nnunet("preprocessing", name) is None:
        raise E2ENetError(
            f"-preprocessor_name {name}: nnU-Net has no such class in nnunetv2.preprocessing; its own is DefaultPreprocessor"
        )


def _check_plans_name(name: str, folder: Path, planner: str) -> None:
    """Raises E2ENetError unless plans may be written under a name: no path, nor the plans of another planner."""
    if not name or "/" in name or "\\" in name:
        raise E2ENetError(f"-overwrite_plans_name {name}: expected a name without a folder, such as nnUNetE2ENetPlans_16G")
    file = folder / f"{name}.json"
    found = read_json(file).get("experiment_planner_used", planner) if file.is_file() else planner
    if found != planner:
        raise E2ENetError(f"-overwrite_plans_name {name}: {file} has the plans of {found}, which stay; choose another name")
