"""Registration writes into the installed nnU-Net, so all but the console commands are tried on a stand-in folder."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from support import program, run_command, run_python

from nnunetv2_e2enet import registration
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.registration import FIRST_LINE, NnUNet, find_nnunet, is_registered, register, unregister


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
    broken = text.replace("trainers.e2enet_trainers", "trainers.no_such_module")
    assert run_python(broken).returncode == 1


@pytest.mark.parametrize("found", ["2.7.0", "3.0.0", "1.7.1"])
def test_other_versions_of_nnunet_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(registration, "version", lambda _name: found)
    with pytest.raises(E2ENetError, match=f"{found} is installed"):
        find_nnunet()


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
    output = run_command("e2enet", "info").stdout
    found = re.search(r"nnU-Net finds (\d+) of (\d+) trainers", output)
    assert found is not None
    assert int(found[1]) == int(found[2]) > 20
    assert "nnU-Net finds 1 of 1 planners" in output
    for name in ("nnUNetTrainerE2ENet", "nnUNetTrainerE2ENet_S90_50epochs", "nnUNetTrainerE2ENet_DA5", "nnUNetPlannerE2ENet"):
        assert f"  {name}\n" in output


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


def test_console_commands_are_idempotent() -> None:
    before = is_registered(find_nnunet())
    try:
        assert run_command("e2enet", "register").stdout
        assert "already registered" in run_command("e2enet", "register").stdout
        assert run_command("e2enet", "unregister").stdout.count("removed ") == 2
        assert "not registered" in run_command("e2enet", "unregister").stdout
    finally:
        subprocess.run([program("e2enet"), "register" if before else "unregister"], check=True, stdout=subprocess.DEVNULL)
