"""New environments, from nothing: the package installs, registers, and nnU-Net's own commands find it."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0").split()


NO_COMPILER = {"CC": "false", "CXX": "false"}
BUILT = shutil.ignore_patterns(".venv*", ".git", "build", "*.so", "*.egg-info")


def test_all_files_are_named() -> None:
    """A file of the core that is not named is missing in installations, or its changes do not compile the core again."""
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python does from 3.11")
    (extension,) = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    native = REPOSITORY / "nnunetv2_e2enet" / "engine" / "native"
    files = sorted(str(path.relative_to(REPOSITORY)) for path in native.iterdir())
    assert sorted(extension["sources"]) == [name for name in files if name.endswith(".cpp")]
    assert sorted(extension["depends"]) == [name for name in files if not name.endswith(".cpp")]

    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    elsewhere = dict(line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line)
    folders = {path.parent for path in (REPOSITORY / "nnunetv2_e2enet").rglob("*.py")}
    packages = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders} | elsewhere.keys()
    assert sorted(setup["options"]["packages"].split()) == sorted(packages)
    assert all(list((REPOSITORY / folder).glob("*.py")) for folder in elsewhere.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "compiler"),
    [([], {}), (["--editable"], {}), ([], NO_COMPILER)],
    ids=["pip install .", "pip install -e .", "without a compiler"],
)
def test_new_environment(tmp_path: Path, how: list[str], compiler: dict[str, str]) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "PYTHON"))} | compiler
    repository = shutil.copytree(REPOSITORY, tmp_path / "repository", ignore=BUILT) if compiler else REPOSITORY

    def run(*command: str) -> str:
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}: {result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    run(sys.executable, "-m", "venv", "venv")
    programs = tmp_path / "venv" / "bin"
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    run(*pip, *TORCH)
    installed = run(str(programs / "python"), "-c", "import torch; print(f'torch=={torch.__version__}')")
    (tmp_path / "torch.txt").write_text(installed)  # the rest must not replace it
    run(*pip, "--constraint", "torch.txt", *how, str(repository))
    run(str(programs / "e2enet"), "register")
    info = run(str(programs / "e2enet"), "info")
    found = re.search(r"nnU-Net finds (\d+) of (\d+) trainers", info)
    assert found is not None
    assert int(found[1]) == int(found[2]) > 20
    assert "nnU-Net finds 1 of 1 planners" in info
    assert ("in nnU-Net's own way: the compiled core was not built: install a C++ compiler" in info) == bool(compiler)
    find = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "cls = find('nnUNetTrainerE2ENet_S90_20epochs')\n"
        "print(cls.__name__)\n"
    )
    assert run(str(programs / "python"), "-c", find).endswith("nnUNetTrainerE2ENet_S90_20epochs\n")
    run(str(programs / "e2enet"), "unregister")
    assert "nnU-Net finds 0 of 1 planners" in run(str(programs / "e2enet"), "info")
