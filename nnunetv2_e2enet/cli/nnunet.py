"""nnU-Net's folders and data sets, as its environment variables name them."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2_e2enet.errors import E2ENetError

RAW, PREPROCESSED, RESULTS = FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        E2ENetError: the variable is not set.
    """
    folder = os.environ.get(variable)
    if not folder:
        raise E2ENetError(
            f"{variable} is not set: export {variable}=FOLDER, the folder where nnU-Net keeps its data (see its docs)"
        )
    return Path(folder)


def dataset_name(given: str) -> str:
    """nnU-Net's name of a data set, which is given by it or by its number.

    Raises:
        E2ENetError: nnU-Net's folders hold no data set of that number, or several.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    if given.startswith("Dataset"):
        return given
    if not given.isdecimal():
        raise E2ENetError(f"data set {given}: expected a number, or a name such as Dataset004_Hippocampus")
    found = [str(name) for name in find_candidate_datasets(int(given))]
    folders = ", ".join(f"{variable}={os.environ.get(variable, '')}" for variable in FOLDERS)
    if not found:
        raise E2ENetError(f"no data set {given} in {folders}: check the number and these folders")
    if len(found) > 1:
        raise E2ENetError(f"data set {given} is {' and '.join(found)} in {folders}: expected one name for a number")
    return found[0]


def model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """The folder in which nnU-Net keeps a model.

    Raises:
        E2ENetError: nnUNet_results is not set, or there is no such data set.
    """
    return nnunet_folder(RESULTS) / dataset_name(dataset) / f"{trainer}__{plans}__{configuration}"
