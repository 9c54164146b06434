"""Makes nnU-Net's commands find our trainers and planners.

nnU-Net looks for classes by name in the modules of its own folders. Registration puts one small module into each of the two
folders; it imports our classes and nothing else. Only files that start with our first line are ever replaced or removed.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import write_atomically

OLDEST_NNUNET = (2, 8)
NEWEST_NNUNET = (3,)
REQUIREMENT = "nnunetv2>=2.8,<3"
KNOWN_NNUNETS = "2.8.0 and 2.8.1"

FIRST_LINE = "# Written by `e2enet register` (nnunetv2-e2enet); `e2enet unregister` removes it."
TRAINER_FOLDER = Path("training", "nnUNetTrainer")
PLANNER_FOLDER = Path("experiment_planning")
MODULES = {
    TRAINER_FOLDER / "nnUNetTrainerE2ENet.py": (
        "trainers.e2enet_trainers",
        "trainers.e2enet_combined_trainers",
        "trainers.e2enet_experiment_trainers",
        "trainers.e2enet_demo_trainers",
    ),
    PLANNER_FOLDER / "nnUNetPlannerE2ENet.py": ("planners.e2enet_planners",),
}


@dataclass(frozen=True)
class NnUNet:
    """An installed nnU-Net: the folder of its package, and its version."""

    folder: Path
    version: str


def find_nnunet() -> NnUNet:
    """The nnU-Net of this Python environment, in site-packages or an editable checkout.

    Raises:
        E2ENetError: it is missing, or of a version that this package does not work with.
    """
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise E2ENetError(f"nnU-Net v2 is not installed in this Python environment: pip install '{REQUIREMENT}'")
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        raise E2ENetError(
            f"nnU-Net lies in {spec.submodule_search_locations[0]} but is not installed: pip install -e its checkout"
        ) from None
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not OLDEST_NNUNET <= numbers < NEWEST_NNUNET:
        raise E2ENetError(f"nnU-Net {found} is installed, but {REQUIREMENT} is needed: pip install '{REQUIREMENT}'")
    return NnUNet(Path(spec.submodule_search_locations[0]), found)


def _content(modules: tuple[str, ...]) -> str:
    return (
        f"{FIRST_LINE}\n"
        "try:\n"
        "    from nnunetv2_e2enet.registration import classes_for_nnunet\n"
        "except ModuleNotFoundError:\n"
        "    pass  # nnunetv2-e2enet was uninstalled: nnU-Net goes on without it.\n"
        "else:\n"
        f"    globals().update(classes_for_nnunet({', '.join(map(repr, modules))}))\n"
    )


def classes_of(module: str) -> dict[str, type]:
    """The classes for nnU-Net in one of our modules (``trainers.…``, ``planners.…``), by name.

    Raises:
        E2ENetError: the installed nnU-Net lacks something that they are made of.
    """
    try:
        content = importlib.import_module(f"nnunetv2_e2enet.{module}")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "nnunetv2":
            raise
        raise E2ENetError(
            f"{error}: nnunetv2-e2enet was made for nnU-Net {KNOWN_NNUNETS}: install one of these, or update nnunetv2-e2enet"
        ) from error
    return {name: getattr(content, name) for name in content.__all__}


def classes_for_nnunet(*modules: str) -> dict[str, type]:
    """What nnU-Net finds of ours: nothing, and a message on standard error, if it is not what these classes are made for.

    nnU-Net imports all modules in search of a class, so an error would end its other trainings as well.
    """
    try:
        return {name: cls for module in modules for name, cls in classes_of(module).items()}
    except E2ENetError as error:
        print(f"E2ENet is not available: {error}", file=sys.stderr)
        return {}


def registered_files(nnunet: NnUNet) -> dict[Path, str | None]:
    """What stands at each place that registration writes to: the path, and the file's text or None where there is none."""
    files = {}
    for name in MODULES:
        path = nnunet.folder / name
        files[path] = path.read_text(encoding="utf-8") if path.exists() else None
    return files


def is_ours(text: str | None) -> bool:
    return text is not None and text.startswith(FIRST_LINE)


def is_registered(nnunet: NnUNet) -> bool:
    return all(is_ours(text) for text in registered_files(nnunet).values())


def register(nnunet: NnUNet) -> list[Path]:
    """Write the two modules; those that are there already and up to date are left alone.

    Returns:
        The files that were written.

    Raises:
        E2ENetError: a folder is missing or read-only, or a file that is not ours is in the way; nothing has changed then.
    """
    files = registered_files(nnunet)
    _refuse_foreign(files)
    wanted = {nnunet.folder / name: _content(modules) for name, modules in MODULES.items()}
    outdated = [path for path in wanted if files[path] != wanted[path]]
    written: list[Path] = []
    try:
        for path in outdated:
            write_atomically(path, wanted[path])
            written.append(path)
    except OSError as error:
        for path in written:
            _restore(path, files[path])
        raise E2ENetError(_cannot_write(error)) from error
    return written


def unregister(nnunet: NnUNet) -> list[Path]:
    """Remove the modules that ``register`` wrote.

    Returns:
        The files that were removed.

    Raises:
        E2ENetError: a file cannot be removed, or it is not ours.
    """
    files = registered_files(nnunet)
    _refuse_foreign(files)
    ours = [path for path, text in files.items() if text is not None]
    try:
        for path in ours:
            path.unlink()
    except OSError as error:
        raise E2ENetError(f"{error.filename}: {error.strerror}: run as a user who may write there") from error
    return ours


def console_command(name: str) -> str:
    """Path of a console command of this Python environment, nnU-Net's or ours."""
    return str(Path(sys.executable).with_name(name))


def trainers_folder() -> Path:
    """The installed folder of our trainers, for ``nnUNet_extTrainer``."""
    spec = importlib.util.find_spec("nnunetv2_e2enet.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise E2ENetError("nnunetv2-e2enet is not installed as a package: pip install it")
    return Path(spec.submodule_search_locations[0])


def _refuse_foreign(files: dict[Path, str | None]) -> None:
    for path, text in files.items():
        if text is not None and not is_ours(text):
            raise E2ENetError(f"{path} was not written by e2enet and is left alone: move it away and try again")


def _cannot_write(error: OSError) -> str:
    return (
        f"{error.filename}: {error.strerror}. Nothing was registered. Without registration, this line serves the trainers:\n"
        f"export nnUNet_extTrainer={trainers_folder()}\n"
        "and `e2enet plan` plans with nnUNetPlannerE2ENet."
    )


def _restore(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        write_atomically(path, text)
