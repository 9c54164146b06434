"""Registration writes into the installed nnU-Net, where other tests look for classes: here it writes into stand-ins of it."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support import run_command, run_python

from nnunetv2_e2enet import registration
from nnunetv2_e2enet.cli import info as info_command
from nnunetv2_e2enet.cli.main import COMMANDS, main
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import (
    EXPERIMENTS,
    FIRST_LINE,
    NnUNet,
    find_any_nnunet,
    find_nnunet,
    has_experiments,
    is_registered,
    register,
    unregister,
)


@pytest.fixture
def nnunet(tmp_path: Path) -> NnUNet:
    folder = tmp_path / "nnunetv2"
    for name in registration.MODULES:
        (folder / name).parent.mkdir(parents=True)
    return NnUNet(folder, "2.8.1")


def files(nnunet: NnUNet) -> set[str]:
    return {str(p.relative_to(nnunet.folder)) for p in nnunet.folder.rglob("*") if p.is_file()}


def test_register_twice_then_unregister_twice(nnunet: NnUNet) -> None:
    written = register(nnunet)
    assert files(nnunet) == {"training/nnUNetTrainer/nnUNetTrainerE2ENet.py", "experiment_planning/nnUNetPlannerE2ENet.py"}
    assert is_registered(nnunet)
    stamps = [p.stat().st_mtime_ns for p in written]
    assert register(nnunet) == []
    assert [p.stat().st_mtime_ns for p in written] == stamps
    assert sorted(unregister(nnunet)) == sorted(written)
    assert unregister(nnunet) == []
    assert files(nnunet) == set()


def test_an_older_version_of_ours_is_replaced(nnunet: NnUNet) -> None:
    path = nnunet.folder / next(iter(registration.MODULES))
    path.write_text(f"{FIRST_LINE}\nfrom nnunetv2_e2enet.old import *\n")
    assert path in register(nnunet)
    assert "old" not in path.read_text()


def test_experiments_are_registered_on_request_and_stay(nnunet: NnUNet) -> None:
    trainers = nnunet.folder / registration.TRAINER_MODULE
    register(nnunet)
    assert not has_experiments(nnunet)
    assert register(nnunet, experiments=True) == [trainers]
    assert has_experiments(nnunet)
    trainers.write_text(f"{trainers.read_text()}# of an older version\n")
    assert register(nnunet) == [trainers]
    assert has_experiments(nnunet)
    assert register(nnunet, experiments=False) == [trainers]
    assert not has_experiments(nnunet)


def test_an_experiment_that_is_not_registered_is_named(nnunet: NnUNet) -> None:
    """nnU-Net asks a module for a class with ``hasattr``, and goes on with its search."""
    asked = (
        "import sys\n"
        "here = sys.modules[__name__]\n"
        "print([hasattr(here, f'nnUNetTrainer{n}') for n in ('E2ENet_S90', 'E2ENet_static', 'DSFF', 'DA5')])\n"
    )
    register(nnunet)
    result = run_python((nnunet.folder / registration.TRAINER_MODULE).read_text() + asked)
    assert result.stdout == "[True, False, False, False]\n"
    note = "E2ENet: {} is an experiment trainer, which is not registered: e2enet register --experiments"
    assert result.stderr.splitlines() == [note.format(name) for name in ("nnUNetTrainerE2ENet_static", "nnUNetTrainerDSFF")]
    register(nnunet, experiments=True)
    result = run_python((nnunet.folder / registration.TRAINER_MODULE).read_text() + asked)
    assert result.stdout == "[True, True, True, False]\n"
    assert not result.stderr


def test_foreign_files_are_never_touched(nnunet: NnUNet) -> None:
    path = nnunet.folder / list(registration.MODULES)[1]
    path.write_text("class nnUNetPlannerE2ENet: ...\n")
    for action in (register, unregister):
        with pytest.raises(E2ENetError, match="left alone"):
            action(nnunet)
        assert path.read_text() == "class nnUNetPlannerE2ENet: ...\n"
        assert len(files(nnunet)) == 1


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failure_half_way_leaves_nothing_behind(nnunet: NnUNet, monkeypatch: pytest.MonkeyPatch, failing_call: int) -> None:
    calls = 0
    replace = Path.replace

    def full_disk(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(E2ENetError, match="No space left on device"):
        register(nnunet)
    assert files(nnunet) == set()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o755, 0o644), (0o775, 0o664), (0o700, 0o600)])
def test_all_who_may_use_nnunet_may_read_our_modules(nnunet: NnUNet, folder_mode: int, file_mode: int) -> None:
    """Or nnU-Net's search for any of its classes would end there."""
    for name in registration.MODULES:
        (nnunet.folder / name).parent.chmod(folder_mode)
    before = os.umask(0o077)
    try:
        written = register(nnunet)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [file_mode, file_mode]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("before", [None, "/home/ann/my trainers"])
def test_the_line_that_serves_instead_may_have_any_folder(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """Folders that the variable has already stay in it."""
    monkeypatch.setattr(registration, "trainers_folder", lambda: Path("/home/ann/it's a venv/trainers"))
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    if before:
        monkeypatch.setenv("nnUNet_extTrainer", before)
    line = registration.line_that_serves_the_trainers()
    shell = ["sh", "-c", f'{line}; printf %s "$nnUNet_extTrainer"']
    found = subprocess.run(shell, capture_output=True, text=True, check=True, env={}).stdout
    assert found == ":".join(filter(None, (before, "/home/ann/it's a venv/trainers")))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_read_only_folder_gives_the_line_that_serves_instead() -> None:
    """In a process without root's power to write anywhere."""
    code = (
        "import os, sys, tempfile; from pathlib import Path\n"
        "from nnunetv2_e2enet import registration as r\n"
        "trainers = r.trainers_folder(); r.trainers_folder = lambda: trainers\n"  # the other user may not see it
        "folder = Path(tempfile.mkdtemp())\n"
        "for name in r.MODULES: (folder / name).parent.mkdir(parents=True); (folder / name).parent.chmod(0o555)\n"
        "folder.chmod(0o755)\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: r.register(r.NnUNet(folder, '2.8.1'))\n"
        "except r.E2ENetError as error: print(error); sys.exit(1 if list(folder.rglob('*.*')) else 0)\n"
        "sys.exit(2)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "Permission denied" in result.stdout
    export = next(line for line in result.stdout.splitlines() if line.startswith("export nnUNet_extTrainer="))
    assert list(Path(export.split("=")[1]).glob("e2enet_trainers.py"))


def test_nnunet_goes_on_without_an_uninstalled_package(nnunet: NnUNet) -> None:
    """The module that stays behind after `pip uninstall` must not break nnU-Net's search; other failures must be seen."""
    path = register(nnunet)[0]
    text = path.read_text()
    gone = text.replace("nnunetv2_e2enet.registration", "nnunetv2_e2enet_gone.registration")
    assert run_python(gone).returncode == 0
    not_readable = (
        "import sys\n"
        "class NotReadable:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'nnunetv2_e2enet': raise PermissionError(13, 'Permission denied', '/home/another')\n"
        "sys.meta_path.insert(0, NotReadable)\n"
    )
    assert run_python(not_readable + text).returncode == 0
    broken = "import sys\nsys.modules['nnunetv2_e2enet.training.trainer'] = None\n" + text
    assert run_python(broken).returncode == 1


def test_nnunet_goes_on_where_a_module_of_ours_has_another_name_than_when_it_was_registered(nnunet: NnUNet) -> None:
    text = register(nnunet)[0].read_text()
    stale = text.replace("trainers.e2enet_trainers", "trainers.former_trainers")
    result = run_python(f"{stale}print(nnUNetTrainerE2ENet_smoke)")
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "E2ENet goes on without trainers.former_trainers: No module named 'nnunetv2_e2enet.trainers.former_trainers': run "
        "e2enet register again\n"
    )


@pytest.mark.parametrize("found", ["2.7.0", "3.0.0", "1.7.1"])
def test_other_versions_of_nnunet_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(registration, "version", lambda _name: found)
    with pytest.raises(E2ENetError, match=f"{found} is installed"):
        find_nnunet()


@pytest.mark.parametrize("found", ["2.7.0", "3.0.0"])
def test_another_version_of_nnunet_is_described_and_can_be_left(
    nnunet: NnUNet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str
) -> None:
    """pip keeps our modules when it replaces nnU-Net."""
    register(nnunet)
    (nnunet.folder / "__init__.py").touch()
    monkeypatch.setattr(registration, "version", lambda _name: found)
    problem = find_any_nnunet().problem
    assert problem == f"nnU-Net {found} is installed, but nnunetv2>=2.8,<3 is needed: pip install 'nnunetv2>=2.8,<3'"
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["nnunetv2"] == found
    assert report["nnunet_problem"] == problem
    assert main(["info"]) == 0
    assert problem in capsys.readouterr().out
    monkeypatch.setattr(registration, "find_any_nnunet", lambda: NnUNet(nnunet.folder, found, problem))
    assert main(["unregister"]) == 0
    assert files(nnunet) == {"__init__.py"}
    assert main(["register"]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("others", [False, True])
def test_what_is_left_of_a_removed_nnunet(nnunet: NnUNet, others: bool) -> None:
    """pip leaves our modules in folders that hide a checkout, which is found once they are gone."""
    register(nnunet)
    compiled = nnunet.folder / registration.TRAINER_FOLDER / "__pycache__"
    compiled.mkdir()
    (compiled / "nnUNetTrainerE2ENet.cpython-311.pyc").touch()
    if others:
        (nnunet.folder / "training" / "mine.py").touch()
    checkout = nnunet.folder.parent / "checkout" / "nnunetv2"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    places = [str(nnunet.folder.parent), str(checkout.parent)]

    def e2enet(command: str) -> tuple[int, str, str]:
        """In a process whose nnU-Net these folders are, and then the checkout."""
        code = (
            "import sys\n"
            "import importlib\n"
            "from importlib.machinery import PathFinder\n"
            "class Hidden(PathFinder):\n"
            "    @classmethod\n"
            "    def find_spec(cls, name, path=None, target=None):\n"
            "        if name != 'nnunetv2': return PathFinder.find_spec(name, path, target)\n"
            f"        found = [PathFinder.find_spec(name, [p]) for p in {places!r}]\n"
            "        return found[0] or found[1]\n"
            "sys.meta_path = [Hidden if f is PathFinder else f for f in sys.meta_path]\n"
            "from nnunetv2_e2enet.registration import find_any_nnunet\n"
            "from nnunetv2_e2enet.cli.main import main\n"
            f"code = main([{command!r}])\n"
            "importlib.invalidate_caches()\n"
            "print(find_any_nnunet().folder)\n"
            "sys.exit(code)\n"
        )
        result = run_python(code)
        return result.returncode, result.stdout, result.stderr

    message = f"{nnunet.folder} is what is left of an nnU-Net that was removed, and hides any other one: run e2enet unregister"
    code, _, errors = e2enet("register")
    assert (code, errors) == (1, f"e2enet register: {message}\n")
    code, output, errors = e2enet("info")
    assert code == 0, errors
    assert message in output
    code, output, errors = e2enet("unregister")
    assert code == 0, errors
    assert output.count("removed ") == 2
    assert output.splitlines()[-1] == str(nnunet.folder if others else checkout)
    assert files(nnunet) == ({"training/mine.py"} if others else set())
    assert nnunet.folder.exists() == others


@pytest.mark.parametrize("command", [["register"], ["unregister"], ["info"], ["plan", "-d", "1"], ["phantom", "1"], ["demo"]])
def test_missing_nnunet_is_said_in_one_line(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class WithoutNnUNet(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] == 'nnunetv2' else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [WithoutNnUNet if f is PathFinder else f for f in sys.meta_path]\n"
        "from nnunetv2_e2enet.cli.main import main\n"
        f"sys.exit(main({command!r}))\n"
    )
    result = run_python(code)
    assert result.returncode == 1
    assert result.stderr == (
        f"e2enet {command[0]}: nnU-Net v2 is not installed in this Python environment: pip install 'nnunetv2>=2.8,<3'\n"
    )


def test_nnunet_finds_every_class(registered: None) -> None:  # noqa: ARG001
    report = json.loads(run_command("e2enet", "info", "--json").stdout)
    trainers = report["classes"]["trainer"]
    assert trainers["missing"] == {}
    assert len(trainers["found"]) == len(set(trainers["found"])) > 60
    some = {"nnUNetTrainerE2ENet_S90_50epochs", "nnUNetTrainerE2ENet_DA5", "nnUNetTrainerE2ENet_static", "nnUNetTrainerDSFF"}
    assert some < set(trainers["found"])
    assert report["classes"]["planner"] == {"found": ["nnUNetPlannerE2ENet"], "missing": {}, "ended": None}
    assert report["experiments_registered"]
    assert set(report["registration"].values()) == {"registered"}
    assert report["versions"]["nnunetv2"] == find_nnunet().version
    assert report["engine"].keys() >= {"used", "kernels", "reason"}


MAIN = ("", "_S70", "_S90", "_NoMirroring", "_onlyMirror01", "_DA5", "_CELoss", "_DiceLoss", "_Adam3en4")


@pytest.mark.usefixtures("registered")
def test_info_lists_the_main_trainers_and_counts_the_others(
    nnunet: NnUNet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info_command, "find_any_nnunet", lambda: nnunet)  # whose modules no other test reads

    def info(*options: str) -> str:
        assert main(["info", *options]) == 0
        return capsys.readouterr().out

    for experiments in (True, False):
        register(nnunet, experiments)
        brief, full = info(), info("--all")
        names = re.findall(r"^  (nnUNetTrainer\w*)$", brief, re.MULTILINE)
        assert names == [f"nnUNetTrainerE2ENet{suffix}" for suffix in MAIN]
        everything = re.findall(r"^  (nnUNetTrainer\w*)$", full, re.MULTILINE)
        assert f"nnU-Net finds {len(everything)} of {len(everything)} trainers\n" in brief
        assert f"  and {len(everything) - len(names)} more: e2enet info --all\n" in brief
        assert " more: " not in full
        assert ("nnUNetTrainerE2ENet_static" in everything) == experiments
        hint = re.search(r"(\d+) experiment trainers are not registered: e2enet register --experiments\n", brief)
        assert (hint is None) == experiments
    assert hint is not None
    register(nnunet, experiments=True)
    assert len(re.findall(r"^  nnUNetTrainer", info("--all"), re.MULTILINE)) == len(everything) + int(hint[1])


def test_a_class_that_is_missing_is_named_with_the_reason(
    registered: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "nnunetv2_e2enet.trainers.e2enet_combined_trainers", raising=False)
    monkeypatch.setitem(sys.modules, "nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerCELoss", None)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    counts = re.search(r"nnU-Net finds (\d+) of (\d+) trainers", output)
    assert counts is not None
    assert int(counts[1]) == int(counts[2]) - 1
    assert re.search(r"^  not nnUNetTrainerE2ENet_CELoss: .* nnunetv2-e2enet was made for nnU-Net", output, re.MULTILINE)
    assert "  nnUNetTrainerE2ENet_DiceLoss\n" in output


class Moved:
    """Finds no module of experiment trainers, as where a newer nnU-Net lacks something that they are made of."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.endswith(EXPERIMENTS):
            raise ImportError("cannot import name 'x' from 'nnunetv2.y'", name="nnunetv2.y")


@pytest.mark.parametrize("experiments", [True, False])
@pytest.mark.usefixtures("registered")
def test_info_goes_on_without_the_experiments(
    experiments: bool, nnunet: NnUNet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info_command, "find_any_nnunet", lambda: nnunet)
    monkeypatch.delitem(sys.modules, f"nnunetv2_e2enet.{EXPERIMENTS}", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Moved(), *sys.meta_path])
    register(nnunet, experiments)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert output.count(f"  not {EXPERIMENTS}: cannot import name 'x' from 'nnunetv2.y': nnunetv2-e2enet was made for") == 1
    assert "  nnUNetTrainerE2ENet_S90\n" in output


def test_classes_are_imported_by_name() -> None:
    """From the packages themselves, without nnU-Net until one is asked for."""
    code = (
        "import sys\n"
        "import nnunetv2_e2enet, nnunetv2_e2enet.trainers, nnunetv2_e2enet.planners\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('nnunetv2', 'torch')]\n"
        "from nnunetv2_e2enet.registration import EXPERIMENTS, class_names, registered_modules\n"
        "for target, modules in registered_modules(experiments=True).items():\n"
        "    package = sys.modules['nnunetv2_e2enet.planners' if 'Planner' in target.name else 'nnunetv2_e2enet.trainers']\n"
        "    for module in modules:\n"
        "        for name in class_names(module):\n"
        "            assert getattr(package, name).__name__ == name\n"
        "from nnunetv2_e2enet.trainers import nnUNetTrainerE2ENet, nnUNetTrainerE2ENet_static, nnUNetTrainerE2ENet_DA5\n"
        "from nnunetv2_e2enet.trainers import e2enet_trainers\n"
        "assert nnUNetTrainerE2ENet is e2enet_trainers.nnUNetTrainerE2ENet\n"
        "try: from nnunetv2_e2enet.trainers import nnUNetTrainerE2ENet_nosuch\n"
        "except ImportError as error: print(error)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cannot import name 'nnUNetTrainerE2ENet_nosuch' from 'nnunetv2_e2enet.trainers'")


def test_the_command_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("usage: e2enet ")
    assert all(command in output.out for command in COMMANDS)
    assert not output.err


# Where torchvision's binary does not fit torch, its import asks for operators that nobody has declared. Trainers of nnU-Net
# import it without using it, so declaring them is enough.
MAKE_TORCHVISION_IMPORTABLE = """
import re, sys, torch
while True:
    try:
        import torchvision
        break
    except RuntimeError as error:
        torch.library.define(re.search(r"torchvision::\\w+", str(error))[0], "(Tensor x) -> Tensor")
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
"""


def test_external_trainer_folder_serves_the_trainers(tmp_path: Path) -> None:
    """nnU-Net's own look-up, in an nnU-Net that is not registered; all of nnU-Net's trainers must be importable for it."""
    (tmp_path / "sitecustomize.py").write_text(MAKE_TORCHVISION_IMPORTABLE)
    code = (
        "import sys\n"
        "from nnunetv2_e2enet import registration as r\n"
        "nnunet = r.find_nnunet()\n"
        "print(r.trainers_folder())\n"
        "if r.is_registered(nnunet):\n"  # look past the registered module, as if it were not there
        "    import types\n"
        "    sys.modules['nnunetv2.training.nnUNetTrainer.nnUNetTrainerE2ENet'] = types.ModuleType('hidden')\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "for name in ('nnUNetTrainerE2ENet', 'nnUNetTrainerE2ENet_S70_5epochs'):\n"
        "    cls = find(name)\n"
        "    print(cls.__name__, [b.__name__ for b in cls.__mro__])\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "nnUNet_extTrainer": str(registration.trainers_folder())}
    result = run_python(code, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Using trainer 'nnUNetTrainerE2ENet' from" in result.stdout
    assert "nnUNetTrainerE2ENet_S70_5epochs ['nnUNetTrainerE2ENet_S70_5epochs', 'nnUNetTrainerE2ENet_S70'" in result.stdout


def test_console_commands_are_idempotent(tmp_path: Path) -> None:
    """On a copy of nnU-Net, since other tests look for classes in the installed one."""
    installed = find_nnunet()
    copy = NnUNet(tmp_path / "nnunetv2", installed.version)
    shutil.copytree(installed.folder, copy.folder, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = Path(str(distribution("nnunetv2").locate_file(f"nnunetv2-{installed.version}.dist-info")))
    shutil.copytree(metadata, tmp_path / metadata.name)
    unregister(copy)

    def e2enet(command: str, *options: str) -> str:
        return run_command("e2enet", command, *options, env={"PYTHONPATH": str(tmp_path)}).stdout

    assert e2enet("register", "--experiments").count(str(copy.folder)) >= 2
    assert is_registered(copy)
    assert has_experiments(copy)
    assert "already registered" in e2enet("register")
    assert e2enet("unregister").count("removed ") == 2
    assert not is_registered(copy)
    assert "not registered" in e2enet("unregister")
