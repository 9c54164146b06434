"""A small synthetic data set: four organs in a torso, or fifteen structures, imaged with the flaws of a real scan.

A case is made in three steps. A *pose* bends and moves the coordinate system, so that no two anatomies are alike. The
*anatomy* is written down once, as simple shapes in these coordinates. The *acquisition* turns tissues into intensities:
texture, partial volume, bias field, noise. The intensities of organs and unlabelled tissue overlap, so that a threshold
cannot tell them apart, but shape and place can.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from nnunetv2_e2enet.errors import E2ENetError

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]


class Tissue(IntEnum):
    """The tissue of a voxel. The first five are the labels of the segmentation, the others are its background."""

    AIR = 0
    LARGE_ORGAN = 1
    BENT_ORGAN = 2
    PAIRED_VESSELS = 3
    LESION = 4
    TORSO = 5
    BOWEL = 6
    SPINE = 7


LABELS: Mapping[str, int] = MappingProxyType(
    {
        "background": 0,
        "large organ": int(Tissue.LARGE_ORGAN),
        "bent organ": int(Tissue.BENT_ORGAN),
        "paired vessels": int(Tissue.PAIRED_VESSELS),
        "lesion": int(Tissue.LESION),
    }
)
"""Name to value, in descending order of volume. The lesion lies inside the large organ."""


@dataclass(frozen=True)
class SmallOrgan:
    """An ellipsoid of the anatomy with many structures, along depth, height and width in units of the anatomy."""

    name: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    mean_intensity: float


SMALL_ORGANS = (
    SmallOrgan("dome", (-0.74, -0.3, 0.18), (0.2, 0.26, 0.26), 175.0),
    SmallOrgan("pouch", (0.05, -0.56, 0.1), (0.3, 0.14, 0.2), 105.0),
    SmallOrgan("left bean", (0.3, 0.2, 0.68), (0.3, 0.15, 0.13), 165.0),
    SmallOrgan("right bean", (0.3, 0.2, -0.68), (0.3, 0.15, 0.13), 165.0),
    SmallOrgan("left cap", (-0.2, 0.22, 0.55), (0.12, 0.09, 0.09), 185.0),
    SmallOrgan("right cap", (-0.2, 0.22, -0.55), (0.12, 0.09, 0.09), 185.0),
    SmallOrgan("sac", (-0.4, -0.4, -0.4), (0.16, 0.1, 0.1), 95.0),
    SmallOrgan("bladder", (0.78, -0.1, 0.05), (0.14, 0.2, 0.2), 100.0),
    SmallOrgan("canal", (0.0, 0.67, 0.0), (1.2, 0.08, 0.08), 125.0),
    SmallOrgan("node", (0.5, -0.3, 0.1), (0.12, 0.09, 0.09), 190.0),
)
MANY_LABELS: Mapping[str, int] = MappingProxyType(
    {**LABELS, "spine": len(LABELS), **{organ.name: len(LABELS) + 1 + i for i, organ in enumerate(SMALL_ORGANS)}}
)
"""The same of the anatomy with many structures, in no order of volume."""

MEAN_INTENSITY: Mapping[Tissue, float] = MappingProxyType(
    {
        Tissue.AIR: 5.0,
        Tissue.LARGE_ORGAN: 145.0,
        Tissue.BENT_ORGAN: 120.0,
        Tissue.PAIRED_VESSELS: 205.0,
        Tissue.LESION: 245.0,
        Tissue.TORSO: 80.0,
        Tissue.BOWEL: 120.0,
        Tissue.SPINE: 160.0,
    }
)
INTENSITY_DEVIATION_BETWEEN_CASES = 4.0
TEXTURE_DEVIATION = 7.0
NOISE_DEVIATION = 8.0
BIAS_DEVIATION = 0.12
BLUR_VOXELS = 0.6

NOMINAL_SPACING: Spacing = (2.5, 1.0, 1.0)
SPACING_VARIATION = 0.1
SMALLEST_SIDE, SMALLEST_SIDE_OF_MANY = 16, 20


def phantom_case(
    rng: np.random.Generator, size: Size, spacing: Spacing, many: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One image and its segmentation; all axes in the order depth, height, width.

    The anatomy scales with the shortest side of the field of view, so that it fits at any size.

    Args:
        rng: source of all variation between cases; the same state gives the same case.
        size: voxels along each axis.
        spacing: voxel size in mm along each axis.
        many: fifteen structures whose volumes differ by a factor of 150 to 250, instead of four.

    Returns:
        The image, float32 of shape ``size`` in arbitrary non-negative units (air about 10, organs 95 to 245), and the
        segmentation, uint8 of shape ``size`` with the values of ``LABELS``, or of ``MANY_LABELS``.

    Raises:
        E2ENetError: a number is not positive, or the shortest side of the field of view is under 16 times (with many
            structures 20 times) the largest side of a voxel.
    """
    _check_field_of_view(size, spacing, SMALLEST_SIDE_OF_MANY if many else SMALLEST_SIDE)
    voxels_per_unit = _voxels_per_unit(size, spacing)
    position = _posed_coordinates(rng, size, voxels_per_unit)
    tissue = _anatomy(rng, position)
    intensities, labels = [MEAN_INTENSITY[t] for t in Tissue], [t if t <= Tissue.LESION else 0 for t in Tissue]
    if many:
        _paint_small_organs(rng, position, tissue)
        intensities += [organ.mean_intensity for organ in SMALL_ORGANS]
        labels[Tissue.SPINE] = MANY_LABELS["spine"]
        labels += [MANY_LABELS[organ.name] for organ in SMALL_ORGANS]
    image = _acquired(rng, tissue, intensities, voxels_per_unit)
    return image, np.array(labels, np.uint8)[tissue]


def write_phantom_dataset(
    folder: Path, n_train: int, n_test: int, seed: int = 0, size: Size = (24, 64, 64), many: bool = False
) -> None:
    """Write a data set in nnU-Net's raw format, all of it or nothing.

    Training cases go to ``imagesTr`` and ``labelsTr``, held-out cases to ``imagesTs`` and ``labelsTs``. A case depends on
    the seed, its split and its number alone: more cases leave the others as they are. The spacing is about 2.5 x 1 x 1 mm
    and varies by up to 10 % from case to case.

    Args:
        folder: the data set's folder, ``DatasetXXX_Name`` for nnU-Net; absent or empty. Missing parents are created.
        n_train: number of training cases, at least 1 (nnU-Net's five folds need 5).
        n_test: number of held-out cases, 0 or more.
        seed: a non-negative number.
        size: voxels of each case along depth, height and width.
        many: see ``phantom_case``.

    Raises:
        E2ENetError: a number is out of range (see also ``phantom_case``), the folder holds something, or it cannot be created.
    """
    folder = Path(folder)
    _check_counts(n_train, n_test, seed)
    _check_vacant(folder)
    with _staging_folder(folder) as staging:
        dataset = Path(staging) / folder.name
        _write_split(dataset, "Tr", n_train, [seed, 0], size, many)
        _write_split(dataset, "Ts", n_test, [seed, 1], size, many)
        _write_dataset_json(dataset, n_train, seed, MANY_LABELS if many else LABELS)
        if folder.exists():
            folder.rmdir()
        dataset.rename(folder)


def _voxels_per_unit(size: Size, spacing: Spacing) -> NDArray[np.float64]:
    """The unit of length of the anatomy, half the shortest side of the field of view, in voxels along each axis."""
    unit_in_mm = min(n * mm for n, mm in zip(size, spacing, strict=True)) / 2
    return unit_in_mm / np.array(spacing)


def _smooth_noise(rng: np.random.Generator, size: Size, sigma_voxels: NDArray[np.float64]) -> NDArray[np.float64]:
    """A random field of zero mean and unit deviation that varies over about ``sigma_voxels``."""
    field: NDArray[np.float64] = gaussian_filter(rng.standard_normal(size), sigma_voxels)
    standard: NDArray[np.float64] = (field - field.mean()) / field.std()
    return standard


def _posed_coordinates(rng: np.random.Generator, size: Size, voxels_per_unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions of all voxels in the anatomy, (3, depth, height, width): rotated, shifted, scaled, smoothly bent."""
    grid = np.indices(size, dtype=np.float64)
    centre = (np.array(size) - 1) / 2
    position = (grid - centre[:, None, None, None]) / voxels_per_unit[:, None, None, None]
    bend = np.stack([_smooth_noise(rng, size, 0.35 * voxels_per_unit) for _ in range(3)])
    rotation = Rotation.from_euler("zyx", rng.uniform([-12, -6, -6], [12, 6, 6]), degrees=True).as_matrix()
    shift = rng.uniform(-0.06, 0.06, size=3)
    scale = rng.uniform(1.0, 1.14, size=3)
    posed: NDArray[np.float64] = np.einsum("ij,jdhw->idhw", rotation / scale[:, None], position)
    return posed + shift[:, None, None, None] + 0.035 * bend


def _anatomy(rng: np.random.Generator, position: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The tissue of each voxel; what is painted later lies on top."""
    depth, height, width = position
    tissue = np.full(depth.shape, Tissue.AIR, dtype=np.uint8)
    tissue[(height / 0.88) ** 2 + width**2 < 1] = Tissue.TORSO
    _paint_bowel(rng, position, tissue)
    tissue[(height - 0.67) ** 2 + width**2 < 0.19**2] = Tissue.SPINE
    _paint_large_organ_with_lesion(rng, position, tissue)
    _paint_bent_organ(rng, position, tissue)
    _paint_vessels(rng, position, tissue)
    return tissue


def _paint_bowel(rng: np.random.Generator, position: NDArray[np.float64], tissue: NDArray[np.uint8]) -> None:
    """Unlabelled round pieces in the torso, as bright as the bent organ."""
    for _ in range(5):
        centre = rng.uniform([-0.8, -0.45, -0.1], [0.8, 0.45, 0.6])
        piece = _in_ellipsoid(position, centre, rng.uniform(0.08, 0.17, size=3))
        tissue[piece & (tissue == Tissue.TORSO)] = Tissue.BOWEL


def _paint_large_organ_with_lesion(rng: np.random.Generator, position: NDArray[np.float64], tissue: NDArray[np.uint8]) -> None:
    centre = np.array([-0.05, -0.12, -0.38]) + rng.uniform(-0.05, 0.05, size=3)
    radii = np.array([0.78, 0.54, 0.45]) * rng.uniform(0.92, 1.08, size=3)
    tissue[_in_ellipsoid(position, centre, radii)] = Tissue.LARGE_ORGAN
    direction = rng.standard_normal(3)
    lesion_centre = centre + 0.25 * radii * rng.uniform(0, 1) * direction / np.linalg.norm(direction)
    lesion = _in_ellipsoid(position, lesion_centre, rng.uniform(0.24, 0.29) * rng.uniform(0.9, 1.1, size=3))
    tissue[lesion & (tissue == Tissue.LARGE_ORGAN)] = Tissue.LESION


def _paint_bent_organ(rng: np.random.Generator, position: NDArray[np.float64], tissue: NDArray[np.uint8]) -> None:
    """An ellipsoid along the depth whose ends bend inwards."""
    centre = np.array([0.05, 0.02, 0.52]) + rng.uniform(-0.05, 0.05, size=3)
    radii = np.array([0.76, 0.4, 0.3]) * rng.uniform(0.94, 1.06, size=3)
    straightened = position.copy()
    straightened[2] += rng.uniform(0.4, 0.7) * (position[0] - centre[0]) ** 2
    tissue[_in_ellipsoid(straightened, centre, radii)] = Tissue.BENT_ORGAN


def _paint_vessels(rng: np.random.Generator, position: NDArray[np.float64], tissue: NDArray[np.uint8]) -> None:
    """Two wavy tubes along the depth, on either side of the spine."""
    depth, height, width = position
    radius = rng.uniform(0.135, 0.15)
    phase = rng.uniform(0, 2 * np.pi)
    for side in (-1, 1):
        across = width - side * rng.uniform(0.27, 0.33) - 0.05 * np.sin(3 * depth + phase)
        upright = height - rng.uniform(0.44, 0.5) - 0.04 * np.cos(3 * depth + phase)
        tube = across**2 + upright**2 < radius**2
        tissue[tube & (np.abs(depth) < 0.85)] = Tissue.PAIRED_VESSELS


def _paint_small_organs(rng: np.random.Generator, position: NDArray[np.float64], tissue: NDArray[np.uint8]) -> None:
    """Small organs have the numbers after those of ``Tissue``, in the order of ``SMALL_ORGANS``."""
    for number, organ in enumerate(SMALL_ORGANS, start=len(Tissue)):
        centre = np.array(organ.centre) + rng.uniform(-0.03, 0.03, size=3)
        tissue[_in_ellipsoid(position, centre, np.array(organ.radii) * rng.uniform(0.94, 1.06, size=3))] = number


def _in_ellipsoid(position: NDArray[np.float64], centre: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = sum(((p - c) / r) ** 2 for p, c, r in zip(position, centre, radii, strict=True)) < 1
    return inside


def _acquired(
    rng: np.random.Generator, tissue: NDArray[np.uint8], intensities: Sequence[float], voxels_per_unit: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The scan of a tissue map: texture, partial volume, bias field and Rician noise, in this order."""
    size: Size = tissue.shape
    mean = np.array(intensities)
    mean += INTENSITY_DEVIATION_BETWEEN_CASES * rng.standard_normal(mean.size)
    texture = TEXTURE_DEVIATION * _smooth_noise(rng, size, 0.06 * voxels_per_unit)
    signal = mean[tissue] + np.where(tissue == Tissue.AIR, 0, texture)
    signal = gaussian_filter(signal, BLUR_VOXELS)
    signal *= np.exp(BIAS_DEVIATION * _smooth_noise(rng, size, 0.8 * voxels_per_unit))
    real, imaginary = NOISE_DEVIATION * rng.standard_normal((2, *size))
    scan: NDArray[np.float32] = np.hypot(signal + real, imaginary).astype(np.float32)
    return scan


def _check_field_of_view(size: Size, spacing: Spacing, smallest_side: int) -> None:
    """The smallest organ must show on a voxel, wherever the random pose puts it."""
    given = f"phantom of {' x '.join(map(str, size))} voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm"
    if min(size) < 1 or min(spacing) <= 0:
        raise E2ENetError(f"{given}: expected positive numbers; correct them")
    if 2 * _voxels_per_unit(size, spacing).min() < smallest_side:
        raise E2ENetError(
            f"{given}: too coarse for its smallest organ; expected the shortest side of the "
            f"field of view to be {smallest_side} times the largest voxel side or more; choose more or finer voxels"
        )


def _check_counts(n_train: int, n_test: int, seed: int) -> None:
    for what, value, smallest in (("training cases", n_train, 1), ("held-out cases", n_test, 0), ("the seed", seed, 0)):
        if value < smallest:
            raise E2ENetError(f"{value} given for {what} of the phantom data set: expected {smallest} or more")


def _check_vacant(folder: Path) -> None:
    advice = "expected no such folder, or an empty one; remove it or choose another name"
    if folder.is_dir():
        found = sorted(entry.name for entry in folder.iterdir())
        if found:
            raise E2ENetError(f"{folder} is not empty (found {found[0]}): {advice}")
    elif folder.exists() or folder.is_symlink():
        raise E2ENetError(f"{folder} is not a folder: {advice}")


def _staging_folder(target: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder beside the target, on its file system, that vanishes with all it holds unless moved away."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise E2ENetError(
            f"cannot write into {target.parent} ({error.strerror}): expected a folder with write permission; "
            "choose another place or change its permissions"
        ) from error


def _write_split(dataset: Path, split: str, n_cases: int, seed: Sequence[int], size: Size, many: bool) -> None:
    prefix = {"Tr": "phantom", "Ts": "phantom_test"}[split]
    images, labels = dataset / f"images{split}", dataset / f"labels{split}"
    images.mkdir(parents=True)
    labels.mkdir()
    for number in range(n_cases):
        rng = np.random.default_rng([*seed, number])
        spacing = _varied_spacing(rng)
        image, segmentation = phantom_case(rng, size, spacing, many)
        _write_volume(images / f"{prefix}_{number:03d}_0000.nii.gz", image, spacing)
        _write_volume(labels / f"{prefix}_{number:03d}.nii.gz", segmentation, spacing)


def _varied_spacing(rng: np.random.Generator) -> Spacing:
    between, within = rng.uniform(1 - SPACING_VARIATION, 1 + SPACING_VARIATION, size=2)
    depth, height, width = NOMINAL_SPACING
    return (depth * between, height * within, width * within)


def _write_volume(path: Path, voxels: NDArray[np.float32] | NDArray[np.uint8], spacing: Spacing) -> None:
    volume = sitk.GetImageFromArray(voxels)
    volume.SetSpacing(spacing[::-1])
    sitk.WriteImage(volume, str(path), useCompression=True)


def _write_dataset_json(folder: Path, n_train: int, seed: int, labels: Mapping[str, int]) -> None:
    generate_dataset_json(
        str(folder),
        channel_names={0: "synthetic"},
        labels=dict(labels),
        num_training_cases=n_train,
        file_ending=".nii.gz",
        dataset_name=re.sub(r"^Dataset\d+_", "", folder.name),
        description=f"{len(labels) - 1} synthetic structures, made by e2enet phantom with seed {seed}",
        license="CC0",
        converted_by="nnunetv2-e2enet",
    )
