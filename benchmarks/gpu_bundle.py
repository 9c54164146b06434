"""What benchmarks/gpu_session.py needs on a machine without a network, in one folder: wheels, repository, data, installer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import contestants
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
PART_BYTES = 60 * 10**6
OURS = "nnunetv2-e2enet"
WANTED = (OURS, "pytest", "hypothesis", "setuptools")
TORCH = ("torch", "triton")
THERE = (*TORCH, "nvidia", "cuda")
"""How names of distributions begin that a machine with a GPU has already."""
PLATFORMS = [*(f"manylinux_2_{n}_x86_64" for n in (35, 34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64", "manylinux1_x86_64"]

ENVIRONMENT = """#!/bin/sh
# Makes the environment beside this file, from it alone. PYTHON: the interpreter that has torch, python3 unless given.
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
ours="$here/environment/bin/python"
if "$python" -m venv "$here/environment"; then
    pip="$ours -m pip"
else # without ensurepip, which some distributions leave out
    "$python" -m venv --without-pip "$here/environment"
    pip="$python -m pip --python $ours"
fi
"""
INSTALL = """pip="$pip --disable-pip-version-check install --quiet --no-index --no-deps --no-cache-dir"
$pip "$here"/wheels*/*.whl
CC=false CXX=false $pip --no-build-isolation "$here/repository"  # without the core, which is for CPUs
"""
THEIR_PACKAGES = """# After our packages PYTHON's; --system-site-packages would not show those of a virtual environment.
packages=$("$ours" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\\n")' > "$packages/of_python.pth"
"""
CHECK = """if ! "$ours" -c 'import torch, triton'; then
    echo "torch and Triton cannot be imported: give the interpreter that has them, as in PYTHON=/path/to/python3 $0" >&2
    exit 1
fi
"""


def installer(with_torch: bool) -> str:
    """A shell script. Torch and Triton come from the bundle, or are those of the machine's Python."""
    return ENVIRONMENT + ("" if with_torch else THEIR_PACKAGES) + INSTALL + CHECK


def bundle(folder: Path, preprocessed: Path, python: str, with_torch: bool, installed: Mapping[str, str]) -> None:
    """Write the folder; wheels that are there are not fetched again.

    Args:
        folder: to write.
        preprocessed: the data set's folder in nnUNet_preprocessed.
        python: version of the machine's Python, such as "3.12".
        with_torch: whether torch and Triton go along, in the versions that are installed here.
        installed: see ``needed``.

    Raises:
        SystemExit: the data set's folder is not there, or something is not installed here.
    """
    if not preprocessed.is_dir():
        raise SystemExit(f"no folder {preprocessed}: give the data set's folder in nnUNet_preprocessed")
    there = {wheel.name for wheel in folder.glob("wheels*/*.whl")}
    there_too = {name: number for name, number in installed.items() if name != "setuptools"}  # a venv may have an old one
    names = sorted(needed([*WANTED, *(TORCH if with_torch else ())], python, () if with_torch else THERE, there_too))
    new = folder / "new"
    new.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: fetch(name, new, python, there), names))
    sort_into_parts(folder, new.glob("*.whl"))
    shutil.rmtree(new)
    shutil.rmtree(folder / "repository", ignore_errors=True)
    (folder / "repository").mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=REPOSITORY, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder / "repository")], input=archive, check=True)
    (folder / "repository" / "benchmarks" / contestants.COMMIT_FILE).write_text(contestants.COMMIT + "\n")
    target = folder / "nnUNet_preprocessed" / preprocessed.name
    shutil.copytree(preprocessed, target, dirs_exist_ok=True)
    (target / "prepared").touch()  # which benchmarks/hippocampus.py looks for
    install = folder / "install.sh"
    install.write_text(installer(with_torch))
    install.chmod(0o755)


def read_installed(file: Path) -> dict[str, str]:
    """Name and version of each distribution in what ``pip list --format freeze`` wrote; a name alone has an empty version.

    Raises:
        SystemExit: a line is something else.
    """
    installed = {}
    for line in filter(None, map(str.strip, file.read_text().splitlines())):
        name, _, number = line.partition("==")
        try:
            canonical = canonicalize_name(name, validate=True)
            installed[canonical] = str(Version(number)) if number else ""
        except ValueError:
            raise SystemExit(f"{file}: {line!r} is not NAME==VERSION, as `pip list --format freeze` writes it") from None
    return installed


def needed(names: Sequence[str], python: str, there: tuple[str, ...], installed: Mapping[str, str]) -> set[str]:
    """Distributions that these ones need, directly or not, but for ours and for those that the machine has.

    Args:
        names: of the distributions.
        python: the machine's version.
        there: how names of distributions begin that the machine has, in whatever version.
        installed: versions of other distributions that it has, by canonical name; an empty one suits every need.

    Raises:
        SystemExit: one of them is not installed here.
    """
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name.startswith(there) or suits(installed.get(name), requirement):
            continue
        found.add(name)
        try:
            dependencies = requires(metadata(name)["Name"]) or []
        except PackageNotFoundError:
            raise SystemExit(
                f"{name} is not installed here, and a bundle has the versions that are: pip install {name}"
            ) from None
        for text in dependencies:
            other = Requirement(text)
            extras = requirement.extras or {""}
            if other.marker is None or any(other.marker.evaluate({**environment, "extra": extra}) for extra in extras):
                todo.append(other)
    return found - {OURS}


def suits(number: str | None, requirement: Requirement) -> bool:
    return number is not None and (not number or requirement.specifier.contains(number, prereleases=True))


def fetch(name: str, target: Path, python: str, there: Iterable[str]) -> None:
    """A wheel of the version that is installed here; built here where only its source is distributed.

    Raises:
        SystemExit: pip finds none.
    """
    wanted = f"{name}=={version(name)}"
    if any(wheel.lower().startswith(wanted.lower().replace("-", "_").replace("==", "-") + "-") for wheel in there):
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    binary = [
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        *(f"--platform={p}" for p in PLATFORMS),
    ]
    download = subprocess.run(
        [*pip, "download", "--no-deps", *binary, "-d", str(target), wanted], check=False, capture_output=True
    )
    if download.returncode:
        built = subprocess.run(
            [*pip, "wheel", "--no-deps", "-w", str(target), wanted], check=False, capture_output=True, text=True
        )
        if built.returncode:
            raise SystemExit(
                f"there is no wheel of {wanted} for Python {python}, and none can be built:\n{built.stderr[-2000:]}"
            )


def sort_into_parts(folder: Path, wheels: Iterable[Path]) -> None:
    """Folders ``wheels0``, ``wheels1`` … of at most PART_BYTES each; a wheel that is larger has one of its own."""
    for wheel in sorted(wheels, key=lambda w: -w.stat().st_size):
        number = 0
        while (part := folder / f"wheels{number}").is_dir():
            if sum(w.stat().st_size for w in part.iterdir()) + wheel.stat().st_size <= PART_BYTES:
                break
            number += 1
        part.mkdir(exist_ok=True)
        wheel.rename(part / wheel.name)
