"""Makes nnU-Net's commands find our trainers and planners.

nnU-Net looks for classes by name in the modules of its own folders. Registration puts one small module into each of the two
folders, which imports our classes and nothing else. Only files that start with our first line are ever replaced or removed.

A class whose base has moved in a newer nnU-Net is left out. All other classes stay available.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import write_atomically

OLDEST_NNUNET = (2, 8)
NEWEST_NNUNET = (3,)
REQUIREMENT = "nnunetv2>=2.8,<3"
KNOWN_NNUNETS = "2.8.0 and 2.8.1"
ADVICE = f"nnunetv2-e2enet was made for nnU-Net {KNOWN_NNUNETS}: install one of these, or update nnunetv2-e2enet"

FIRST_LINE = "# Written by `e2enet register` (nnunetv2-e2enet); `e2enet unregister` removes it."
TRAINER_FOLDER = Path("training", "nnUNetTrainer")
PLANNER_FOLDER = Path("experiment_planning")
TRAINER_MODULE = TRAINER_FOLDER / "nnUNetTrainerE2ENet.py"
PLANNER_MODULE = PLANNER_FOLDER / "nnUNetPlannerE2ENet.py"
MODULES = {
    TRAINER_MODULE: (
        "trainers.e2enet_trainers",
        "trainers.e2enet_combined_trainers",
        "trainers.e2enet_demo_trainers",
    ),
    PLANNER_MODULE: ("planners.e2enet_planners",),
}
EXPERIMENTS = "trainers.e2enet_experiment_trainers"  # registered on request
REGISTER_EXPERIMENTS = "e2enet register --experiments"


@dataclass(frozen=True)
class NnUNet:
    """An nnU-Net.

    Attributes:
        folder: that of its package.
        version: as installed.
        problem: why this package does not work with it, and what to do; empty if it does.
    """

    folder: Path
    version: str
    problem: str = ""


def find_nnunet() -> NnUNet:
    """The nnU-Net of this Python environment, in site-packages or an editable checkout.

    Raises:
        E2ENetError: nnU-Net is missing, or of a version that this package does not work with.
    """
    nnunet = find_any_nnunet()
    if nnunet.problem:
        raise E2ENetError(nnunet.problem)
    return nnunet


def find_any_nnunet() -> NnUNet:
    """The nnU-Net of this Python environment, of any version, or what is left of one.

    pip leaves our modules behind when it removes nnU-Net. Python takes their folder for a package without ``__init__.py``, and
    does not look for a checkout that is installed in editable mode.

    Raises:
        E2ENetError: there is none.
    """
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise E2ENetError(f"nnU-Net v2 is not installed in this Python environment: pip install '{REQUIREMENT}'")
    folder = Path(next(iter(spec.submodule_search_locations)))
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        found = "not installed"
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    problem = ""
    if spec.origin is None:
        problem = f"{folder} is what is left of an nnU-Net that was removed, and hides any other one: run e2enet unregister"
    elif not numbers:
        problem = f"nnU-Net lies in {folder} but is not installed: pip install -e its checkout"
    elif not OLDEST_NNUNET <= numbers < NEWEST_NNUNET:
        problem = f"nnU-Net {found} is installed, but {REQUIREMENT} is needed: pip install '{REQUIREMENT}'"
    return NnUNet(folder, found, problem)


def _content(modules: tuple[str, ...]) -> str:
    return (
        f"{FIRST_LINE}\n"
        "try:\n"
        "    from nnunetv2_e2enet.registration import classes_for_nnunet, unregistered\n"
        "except (ModuleNotFoundError, PermissionError):\n"
        "    pass  # nnunetv2-e2enet was uninstalled, or lies where this user may not read: nnU-Net goes on without it.\n"
        "else:\n"
        f"    globals().update(classes_for_nnunet({', '.join(map(repr, modules))}))\n"
        "    __getattr__ = unregistered\n"
    )


@dataclass(frozen=True)
class Classes:
    """Our classes for nnU-Net.

    Attributes:
        found: classes by name.
        missing: why a class is missing, by its name, or by the name of its module if that cannot be imported at all.
    """

    found: dict[str, type] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def class_names(module: str) -> list[str]:
    """Names of the classes for nnU-Net in one of our modules (``trainers.…``, ``planners.…``).

    Raises:
        E2ENetError: there is no such module, or the installed nnU-Net lacks something that all of them are made of.
    """
    return list(_import(module).__all__)


def find_class(name: str, modules: Iterable[str]) -> type | None:
    """The class of that name in our modules, None if no module has it.

    Raises:
        E2ENetError: there is no such module, or the installed nnU-Net lacks something that the class is made of.
    """
    for module in modules:
        if name in class_names(module):
            found: type = getattr(_import(module), name)
            return found
    return None


def load_classes(modules: Iterable[str]) -> Classes:
    """Our classes whose modules are there and whose bases the installed nnU-Net has, and why the others are missing."""
    classes = Classes()
    for module in modules:
        try:
            names = class_names(module)
        except E2ENetError as error:
            classes.missing[module] = str(error)
            continue
        for name in names:
            try:
                classes.found[name] = getattr(_import(module), name)
            except E2ENetError as error:
                classes.missing[name] = str(error)
    return classes


def _import(module: str) -> ModuleType:
    name = f"nnunetv2_e2enet.{module}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:  # it was called so when it was registered
            raise E2ENetError(f"{error}: run e2enet register again") from error
        if (error.name or "").split(".")[0] != "nnunetv2":
            raise
        raise E2ENetError(f"{error}: {ADVICE}") from error


def classes_for_nnunet(*modules: str) -> dict[str, type]:
    """The classes that nnU-Net finds; each reason for which others are missing is one line on standard error.

    nnU-Net imports all modules in search of a class, so an error would end its other trainings as well.
    """
    classes = load_classes(modules)
    names: dict[str, list[str]] = {}
    for name, reason in classes.missing.items():
        names.setdefault(reason, []).append(name)
    for reason, affected in names.items():
        print(f"E2ENet goes on without {', '.join(affected)}: {reason}", file=sys.stderr)
    return classes.found


def unregistered(name: str) -> NoReturn:
    """``__getattr__`` of a registered module, for names that are not in it.

    An experiment trainer that is not registered is named on standard error, with the command that registers it. nnU-Net's
    search goes on, as there may be a class of that name elsewhere.
    """
    if name.startswith("nnUNetTrainer") and name in load_classes([EXPERIMENTS]).found:
        print(f"E2ENet: {name} is an experiment trainer, which is not registered: {REGISTER_EXPERIMENTS}", file=sys.stderr)
    raise AttributeError(name)


def registered_files(nnunet: NnUNet) -> dict[Path, str | None]:
    """Text of the files that registration writes, by path; None for a missing file."""
    files = {}
    for name in MODULES:
        path = nnunet.folder / name
        files[path] = path.read_text(encoding="utf-8") if path.exists() else None
    return files


def is_ours(text: str | None) -> bool:
    """Whether the text of a file is one that ``register`` writes; None stands for a file that is not there."""
    return text is not None and text.startswith(FIRST_LINE)


def is_registered(nnunet: NnUNet) -> bool:
    """Whether nnU-Net finds the trainers and planners of this package."""
    return all(is_ours(text) for text in registered_files(nnunet).values())


def has_experiments(nnunet: NnUNet) -> bool:
    """Whether the experiment trainers are registered."""
    text = registered_files(nnunet)[nnunet.folder / TRAINER_MODULE]
    return is_ours(text) and EXPERIMENTS in str(text)


def registered_modules(experiments: bool) -> dict[Path, tuple[str, ...]]:
    """Our modules by the file in nnU-Net that offers their classes, with or without the experiment trainers."""
    return {**MODULES, TRAINER_MODULE: (*MODULES[TRAINER_MODULE], EXPERIMENTS)} if experiments else MODULES


def register(nnunet: NnUNet, experiments: bool | None = None) -> list[Path]:
    """Write the two modules; those that are there already and up to date are left alone.

    Args:
        nnunet: the installation of nnU-Net.
        experiments: whether nnU-Net finds the experiment trainers; None leaves that as it is, which is no at first.

    Returns:
        The files that were written.

    Raises:
        E2ENetError: a folder is missing or read-only, or a file that is not ours is in the way; nothing has changed then.
    """
    files = registered_files(nnunet)
    _refuse_foreign(files)
    modules = registered_modules(has_experiments(nnunet) if experiments is None else experiments)
    wanted = {nnunet.folder / name: _content(names) for name, names in modules.items()}
    outdated = [path for path in wanted if files[path] != wanted[path]]
    written: list[Path] = []
    try:
        for path in outdated:
            write_atomically(path, wanted[path])
            written.append(path)
            path.chmod(path.parent.stat().st_mode & 0o666)  # all who use nnU-Net import it
    except OSError as error:
        for path in written:
            _restore(path, files[path])
        raise E2ENetError(_cannot_write(error)) from error
    return written


def unregister(nnunet: NnUNet) -> list[Path]:
    """Remove the modules that ``register`` wrote, and the folders of an nnU-Net of which nothing else is left.

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
        if nnunet.folder.is_dir() and not (nnunet.folder / "__init__.py").exists():
            _remove_empty(nnunet.folder)
    except OSError as error:
        raise E2ENetError(f"{error.filename}: {error.strerror}: run as a user who may write there") from error
    return ours


def console_command(name: str) -> list[str]:
    """The arguments that start a console command of this Python environment, nnU-Net's or ours, wherever its script lies."""
    program = (  # as with a script, packages are not looked for in the current folder, which may be a clone of this one
        "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
        "from importlib.metadata import entry_points; name = sys.argv.pop(1); sys.argv[0] = name; "
        "(command,) = entry_points(group='console_scripts', name=name); sys.exit(command.load()())"
    )
    return [sys.executable, "-c", program, name]


def trainers_folder() -> Path:
    """The installed folder of our trainers, for ``nnUNet_extTrainer``."""
    spec = importlib.util.find_spec("nnunetv2_e2enet.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise E2ENetError("nnunetv2-e2enet is not installed as a package: pip install it")
    return Path(spec.submodule_search_locations[0])


def line_that_serves_the_trainers() -> str:
    """A line for the shell, with which nnU-Net finds our trainers without registration, and those of folders named before."""
    folders = os.pathsep.join(filter(None, (os.environ.get("nnUNet_extTrainer"), str(trainers_folder()))))
    if os.name == "nt":
        return f'set "nnUNet_extTrainer={folders}"'
    return f"export nnUNet_extTrainer={shlex.quote(folders)}"


def _remove_empty(folder: Path) -> None:
    """Remove a folder in which there are nothing but folders, and what Python compiled of modules that were there."""
    for path in folder.iterdir():
        if path.name == "__pycache__":
            shutil.rmtree(path)
        elif path.is_dir():
            _remove_empty(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def _refuse_foreign(files: dict[Path, str | None]) -> None:
    for path, text in files.items():
        if text is not None and not is_ours(text):
            raise E2ENetError(f"{path} was not written by e2enet and is left alone: move it away and try again")


def _cannot_write(error: OSError) -> str:
    return (
        f"{error.filename}: {error.strerror}. Nothing was registered. Without registration, this line serves the trainers:\n"
        f"{line_that_serves_the_trainers()}\n"
        "and `e2enet plan` plans with nnUNetPlannerE2ENet."
    )


def _restore(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        write_atomically(path, text)


def find_in_nnunet(package: str, name: str) -> Any:
    """A class in a subpackage of nnU-Net, such as ``preprocessing``, as nnU-Net finds it; None without one."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]).joinpath(*package.split("."))
    return recursive_find_python_class(str(folder), name, f"nnunetv2.{package}")


def find_trainer(name: str) -> Any:
    """The class of a trainer, as nnU-Net's commands find it.

    Raises:
        E2ENetError: nnU-Net does not find it, or its search breaks off at a module that cannot be imported.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    if name == nnUNetTrainer.__name__:  # no search, for which nnU-Net imports all of its trainers
        return nnUNetTrainer
    try:
        with redirect_stdout(StringIO()):  # nnU-Net narrates its search in nnUNet_extTrainer
            return recursive_find_trainer_class_by_name(name)
    except Exception as error:  # any of the modules that nnU-Net imports in search of a class may fail
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise E2ENetError(
            f"nnU-Net finds no trainer {name} ({reason}): run e2enet register, or see e2enet info --all"
        ) from error
