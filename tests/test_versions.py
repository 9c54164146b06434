"""Other versions of nnU-Net and Python, each in an environment of its own: ``make test-versions``.

uv makes the environments; it looks for Python on the PATH and downloads what is not there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import nnunet_environment

from nnunetv2_e2enet.training.checkpoints import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0").split()
TRAINER = "nnUNetTrainerE2ENet_smoke"


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "nnunet"), [("3.10", "2.8.1"), ("3.11", "2.8.0"), ("3.11", "2.8.1"), ("3.12", "2.8.1"), ("3.13", "2.8.1")]
)
def test_install_train_and_predict(python: str, nnunet: str, tmp_path: Path) -> None:
    environment = Environment(tmp_path, python)
    environment.create()
    environment.install(*TORCH)
    # the torch that is there must not be replaced by what torchvision wants
    torch = environment.program(
        "python", "-c", "from importlib.metadata import version; print(f'torch=={version(\"torch\")}')"
    )
    (tmp_path / "torch.txt").write_text(torch)
    environment.install("--constraint", "torch.txt", f"nnunetv2=={nnunet}", str(REPOSITORY))
    environment.program("e2enet", "register")
    info = environment.program("e2enet", "info")
    assert f"{nnunet} in " in info
    assert f"{python}." in info
    assert "nnU-Net finds 1 of 1 planners" in info

    environment.program("e2enet", "phantom", "1", "--cases", "5", "--test-cases", "1", "--size", "20", "56", "56")
    environment.program("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    environment.program("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu")
    dataset = "Dataset001_Phantom"
    model = tmp_path / "nnUNet_results" / dataset / f"{TRAINER}__nnUNetPlans__3d_fullres"
    weights = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    masks = [value for name, value in weights.items() if name.endswith(".mask")]
    assert masks
    assert all(int(mask.sum()) == round(0.2 * mask.numel()) for mask in masks)
    images, output = tmp_path / "nnUNet_raw" / dataset / "imagesTs", tmp_path / "predictions"
    options = ("-d", "1", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1")
    environment.program("nnUNetv2_predict", "-i", str(images), "-o", str(output), *options)
    assert len(list(output.glob("*.nii.gz"))) == 1
