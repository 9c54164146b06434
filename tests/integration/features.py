"""What nnU-Net can do, and which step of the workflow or which test shows that E2ENet can do it."""

from __future__ import annotations

from dataclasses import dataclass

from integration.plans import CONFIGURATIONS
from integration.schemes import SCHEMES


@dataclass(frozen=True)
class Feature:
    """One row of the page. It works if all of its evidence does.

    Attributes:
        name: of the feature, in Markdown.
        steps: of the workflow, in all cells.
        configuration, scheme: all steps of the workflow in the cells of that column.
        tests: ``FILE::FUNCTION`` below ``tests/``, with all of their parameters, or ``FILE::FUNCTION[PARAMETERS]``.
        remark: what else is to be said, such as why there is no evidence.
    """

    name: str
    steps: tuple[str, ...] = ()
    configuration: str = ""
    scheme: str = ""
    tests: tuple[str, ...] = ()
    remark: str = ""


NETWORKS = "test_configurations.py::test_train_and_predict"
VERSIONS = "test_versions.py::test_install_train_and_predict"
FAULTS = "test_checkpoints.py::"

FEATURES: dict[str, tuple[Feature, ...]] = {
    "Configurations": (
        *(Feature(f"`{name}`", configuration=name) for name in CONFIGURATIONS),
        Feature("anisotropic plans, 8 slices, 4 input channels", tests=(f"{NETWORKS}[as planned]",)),
        Feature("4 slices, 7 levels", tests=(f"{NETWORKS}[4 slices, 7 levels]",)),
        Feature("2 and 3 levels", tests=(f"{NETWORKS}[2 levels]", f"{NETWORKS}[3 levels]")),
        Feature(
            "ResEnc presets and planners",
            tests=("test_trainer.py::test_resenc_plans_give_their_strides_and_e2enet_its_own_channels",),
        ),
    ),
    "Labels": tuple(Feature(scheme.name, scheme=scheme.name) for scheme in SCHEMES),
    "Data and plans": (
        Feature("`nnUNetv2_convert_MSD_dataset`", tests=("test_hippocampus.py::test_the_whole_way",)),
        Feature("`nnUNetv2_plan_and_preprocess`, `nnUNetv2_preprocess`", steps=("plan and preprocess",)),
        Feature(
            "`nnUNetv2_plan_experiment -pl nnUNetPlannerE2ENet`",
            tests=("test_planner.py::test_registered_planner_gives_the_same_plans",),
        ),
        Feature(
            "E2ENet's plans with stock trainers",
            tests=("test_trainer.py::test_stock_trainer_trains_the_dense_network_of_e2enet_plans",),
        ),
        Feature(
            "`nnUNetv2_extract_fingerprint`, `nnUNetv2_move_plans_between_datasets`, `nnUNetv2_convert_old_nnUNet_dataset`, "
            "`nnUNetv2_plot_overlay_pngs`",
            remark="no network takes part in them",
        ),
    ),
    "Training": (
        Feature("`nnUNetv2_train` for folds, with `--npz`", steps=("train folds",)),
        Feature("fold `all`", steps=("train fold all",)),
        Feature("`-pretrained_weights`: topology included, exact sparsity", steps=("-pretrained_weights",)),
        Feature("`--c` after the training was killed", steps=("--c",)),
        Feature("`--val_best`", steps=("--val_best",)),
        Feature("`--val`: the same as after training", steps=("--val",)),
        Feature(
            "progress plot; DSFF's values in the checkpointed log, which a stock trainer can open",
            steps=("train folds",),
            tests=(
                "test_history.py::test_checkpointed_log_has_dsffs_values",
                "test_history.py::test_stock_trainer_goes_on_from_the_checkpoint",
            ),
        ),
        Feature("Weights & Biases", tests=("test_history.py::test_weights_and_biases_gets_dsffs_values",)),
        Feature(
            "nnU-Net's trainer variants (`NoMirroring`, `onlyMirror01`, `DA5`, `CELoss`, `DiceLoss`, `Adam3en4`)",
            tests=(
                "test_trainer.py::test_combinations_with_nnunets_variants",
                "test_trainer.py::test_combinations_keep_what_the_variants_do",
            ),
        ),
        Feature(
            "several GPUs (`-num_gpus`): one topology on all ranks",
            tests=("test_distributed.py::test_all_ranks_have_the_same_topology",),
            remark="two processes on a CPU (gloo)",
        ),
        Feature(
            "`torch.compile`: topology updates compile nothing",
            tests=("test_compile.py::test_topology_updates_compile_nothing",),
        ),
        Feature(
            "external trainers (`nnUNet_extTrainer`)",
            tests=("test_registration.py::test_external_trainer_folder_serves_the_trainers",),
        ),
    ),
    "Cross-validation": (
        Feature("`nnUNetv2_accumulate_crossval_results`", steps=("accumulate_crossval_results",)),
        Feature(
            "`nnUNetv2_find_best_configuration` with E2ENet beside stock nnU-Net",
            steps=("train stock nnU-Net", "find_best_configuration"),
        ),
        Feature("`nnUNetv2_ensemble` of E2ENet and stock nnU-Net", steps=("ensemble",)),
        Feature(
            "`nnUNetv2_determine_postprocessing`, `nnUNetv2_apply_postprocessing`",
            steps=("determine_postprocessing", "apply_postprocessing"),
        ),
        Feature(
            "`nnUNetv2_evaluate_folder`, `nnUNetv2_evaluate_simple`",
            steps=("evaluate",),
            remark="`evaluate_simple` without regions, which it does not know",
        ),
        Feature(
            "five folds as one command (`e2enet crossval`)",
            tests=(
                "test_crossval.py::test_finished_folds_are_skipped_and_accumulated",
                "test_crossval.py::test_unfinished_folds_go_on_from_where_they_are",
                "test_crossval.py::test_jobs_are_submitted_for_what_is_not_done",
            ),
        ),
    ),
    "Prediction": (
        Feature("`nnUNetv2_predict` with one fold, `--save_probabilities`", steps=("predict, one fold",)),
        Feature("several folds", steps=("predict, several folds",)),
        Feature("fold `all`", steps=("predict, fold all",)),
        Feature("another checkpoint (`-chk`)", steps=("predict, best checkpoint",)),
        Feature("without mirroring (`--disable_tta`)", steps=("predict, no mirroring",)),
        Feature("in parts (`-num_parts`, `-part_id`): the same segmentation", steps=("predict, in parts",)),
        Feature("`nnUNetv2_predict_from_modelfolder`: the same segmentation", steps=("predict_from_modelfolder",)),
        Feature(
            "`nnUNetPredictor` from Python; each fold of an ensemble with its own topology",
            tests=("test_trainer.py::test_every_fold_of_an_ensemble_predicts_with_its_own_topology",),
        ),
    ),
    "Sharing models": (
        Feature(
            "`nnUNetv2_export_model_to_zip`, `nnUNetv2_install_pretrained_model_from_zip`: the same segmentation",
            steps=("export, install, predict",),
        ),
        Feature("`nnUNetv2_download_pretrained_model_by_url`", remark="needs a server; it installs as the command above"),
        Feature("no code in a checkpoint is executed", tests=(f"{FAULTS}test_hostile_checkpoint_is_not_executed",)),
    ),
    "When something goes wrong": (
        Feature(
            "truncated, foreign and other files that are no checkpoints",
            tests=(f"{FAULTS}test_files_that_are_no_checkpoints", f"{FAULTS}test_checkpoints_of_another_network_are_refused"),
        ),
        Feature(
            "killed at any moment, resumed: exact sparsity, history and schedule of an uninterrupted training",
            tests=(
                "test_faults.py::test_killed_training_ends_as_an_uninterrupted_one",
                "test_faults.py::test_killed_at_any_moment",
            ),
        ),
        Feature("full disk", tests=(f"{FAULTS}test_full_disk_leaves_the_former_checkpoint",)),
        Feature("diverged training", tests=(f"{FAULTS}test_diverged_training_stops_before_it_is_saved",)),
        Feature(
            "weights of another sparsity or shift size",
            tests=(
                "test_trainer.py::test_pretrained_weights_of_another_sparsity_are_refused",
                f"{FAULTS}test_weights_of_another_shift_size_are_refused",
            ),
        ),
        Feature(
            "nnU-Net whose interface has moved: a message, and its own trainers go on",
            tests=(
                "test_interface.py::test_a_hook_that_is_gone_or_takes_something_else",
                "test_interface.py::test_trainer_attributes_that_are_gone",
                "test_interface.py::test_planner_attributes_that_are_gone",
                "test_interface.py::test_a_hook_with_a_parameter_more",
                "test_interface.py::test_a_variant_that_has_moved",
                "test_interface.py::test_a_module_of_variants_that_has_moved",
                "test_registration.py::test_other_versions_of_nnunet_are_refused",
            ),
        ),
    ),
    "Versions": (
        *(
            Feature(f"Python {python}, nnU-Net {nnunet}", tests=(f"{VERSIONS}[{python}-{nnunet}]",))
            for python, nnunet in (
                ("3.10", "2.8.1"),
                ("3.11", "2.8.0"),
                ("3.11", "2.8.1"),
                ("3.12", "2.8.1"),
                ("3.13", "2.8.1"),
            )
        ),
        Feature(
            "Python 3.10, nnU-Net 2.8.0 and all dependencies at their lower bounds (torch 2.5, scipy 1.10)",
            tests=("test_versions.py::test_lower_bounds_of_dependencies",),
        ),
    ),
}
