"""``e2enet plan``."""

from __future__ import annotations

import argparse

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import find_nnunet

HELP = "plan with nnUNetPlannerE2ENet, registered or not (as nnUNetv2_plan_experiment does)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example:\n"
        "  nnUNetv2_extract_fingerprint -d 4\n"
        "  e2enet plan -d 4 -gpu_memory_target 16 -overwrite_plans_name nnUNetE2ENetPlans_16G\n"
        "  nnUNetv2_preprocess -d 4 -plans_name nnUNetE2ENetPlans_16G -c 3d_fullres\n"
    )
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="data set ids")
    parser.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory to plan for (default: 8)")
    parser.add_argument("-preprocessor_name", default="DefaultPreprocessor", help="default: DefaultPreprocessor")
    parser.add_argument(
        "-overwrite_target_spacing", nargs=3, type=float, metavar="MM", help="target spacing of 3d_fullres, in mm"
    )
    parser.add_argument("-overwrite_plans_name", metavar="NAME", help="default: nnUNetE2ENetPlans")


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    from nnunetv2_e2enet.planners.e2enet_planners import nnUNetPlannerE2ENet

    for folder in (nnUNet_raw, nnUNet_preprocessed):
        if not folder.get():
            raise E2ENetError(f"{folder.env_var_name} is not set: export {folder.env_var_name}=FOLDER (see nnU-Net's docs)")
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
        except RuntimeError as error:  # nnU-Net: no such data set, or its fingerprint is missing
            reason = str(error).splitlines()[0]
            raise E2ENetError(f"data set {dataset_id} cannot be planned: {reason}") from error
    return 0
