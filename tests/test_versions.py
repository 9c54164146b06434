"""Other versions of nnU-Net, Python and dependencies, each in an environment of its own: ``make test-versions``.

uv makes the environments; it looks for Python on the PATH and downloads what is not there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import nnunet_environment

from nnunetv2_e2enet.training.checkpoints import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0").split()
TRAINER = "nnUNetTrainerE2ENet_smoke"
RAISED_BY_NNUNET = {"numpy"}  # what it stores data with needs a newer one


class Environment:
    """A Python environment that uv makes in a folder."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("nnUNet_", "PYTHON", "VIRTUAL_ENV"))
        }
        self.variables = {**clean, **nnunet_environment(folder), "UV_PROJECT_ENVIRONMENT": str(folder / "venv")}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        result = subprocess.run(command, env=self.variables, cwd=self.folder, text=True, check=False, **pipe)  # type: ignore[call-overload]
        if check and result.returncode:
            pytest.fail(f"{' '.join(command)} ended with exit code {result.returncode}:\n{result.stdout[-6000:]}")
        return result

    def create(self) -> None:
        """Skips the test where there is no such Python."""
        result = self.uv("venv", "--python", self.python, str(self.folder / "venv"), check=False)
        if result.returncode:
            pytest.skip(f"Python {self.python} cannot be had: {result.stdout.strip()[-300:]}")

    def uv(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(str(Path(sys.executable).with_name("uv")), "--quiet", *arguments, check=check)

    def install(self, *packages: str) -> None:
        self.uv("pip", "install", "--python", str(self.folder / "venv"), *packages)

    def program(self, name: str, *arguments: str) -> str:
        return self.run(str(self.folder / "venv" / "bin" / name), *arguments).stdout

    def version_of(self, package: str) -> str:
        return self.program("python", "-c", f"from importlib.metadata import version; print(version({package!r}))").strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "nnunet"), [("3.10", "2.8.1"), ("3.11", "2.8.0"), ("3.11", "2.8.1"), ("3.12", "2.8.1"), ("3.13", "2.8.1")]
)
def test_install_train_and_predict(python: str, nnunet: str, tmp_path: Path) -> None:
    environment = Environment(tmp_path, python)
    environment.create()
    environment.install(*TORCH)
    # the torch that is there must not be replaced by what torchvision wants
    (tmp_path / "torch.txt").write_text(f"torch=={environment.version_of('torch')}")
    environment.install("--constraint", "torch.txt", f"nnunetv2=={nnunet}", str(REPOSITORY))
    assert environment.version_of("nnunetv2") == nnunet
    registers_trains_and_predicts(environment)


@pytest.mark.slow
def test_lower_bounds_of_dependencies(tmp_path: Path) -> None:
    """Each direct dependency as old as pyproject.toml and the others allow, with the oldest Python."""
    environment = Environment(tmp_path, "3.10")
    environment.create()
    environment.install("--resolution", "lowest-direct", str(REPOSITORY))
    bounds = dict(
        re.findall(r'"([\w-]+)>=([\d.]+)', (REPOSITORY / "pyproject.toml").read_text().split("[project.optional")[0])
    )
    assert bounds["torch"] == "2.5"
    assert bounds["scipy"] == "1.10"
    for name in bounds.keys() - RAISED_BY_NNUNET - {"setuptools"}:
        found = environment.version_of(name).split("+")[0]
        assert f"{found}.0".startswith(f"{bounds[name]}."), f"{name} {found} is not {bounds[name]}"
    registers_trains_and_predicts(environment)


def registers_trains_and_predicts(environment: Environment) -> None:
    environment.program("e2enet", "register")
    info = json.loads(environment.program("e2enet", "info", "--json"))
    assert info["versions"]["nnunetv2"] == environment.version_of("nnunetv2")
    assert info["versions"]["python"].startswith(f"{environment.python}.")
    assert info["classes"]["planner"]["found"] == ["nnUNetPlannerE2ENet"]
    assert info["classes"]["trainer"]["missing"] == {}

    folder = environment.folder
    environment.program("e2enet", "phantom", "1", "--cases", "5", "--test-cases", "1", "--size", "20", "56", "56")
    environment.program("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    environment.program("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu")
    dataset = "Dataset001_Phantom"
    model = folder / "nnUNet_results" / dataset / f"{TRAINER}__nnUNetPlans__3d_fullres"
    weights = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    masks = [value for name, value in weights.items() if name.endswith(".mask")]
    assert masks
    assert all(int(mask.sum()) == round(0.2 * mask.numel()) for mask in masks)
    images, output = folder / "nnUNet_raw" / dataset / "imagesTs", folder / "predictions"
    options = ("-d", "1", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1")
    environment.program("nnUNetv2_predict", "-i", str(images), "-o", str(output), *options)
    assert len(list(output.glob("*.nii.gz"))) == 1
