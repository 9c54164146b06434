"""Time and memory of `e2enet compare`: 500 synthetic cases of 15 classes on 128 x 128 x 128 voxels, two models.

Each case has 15 ellipsoids, from small to large; a prediction has them a little moved and resized, and misses some. Files are
compressed NIfTI, as nnU-Net writes them. Nothing is cached.

    python benchmarks/compare_500_cases.py --folder /tmp/compare_500 --workers 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

CLASSES = 15
SIZE = 128
SPACING = (1.5, 1.0, 1.0)
ERRORS = {"model_a": 0.8, "model_b": 1.2}
"""Standard deviation of a centre in voxels, by model."""


def draw(ellipsoids: np.ndarray) -> np.ndarray:
    """Label map of (class, [centre of 3, radii of 3]); later classes cover earlier ones."""
    voxels = np.zeros((SIZE,) * 3, np.uint8)
    for label, (*centre, r0, r1, r2) in enumerate(ellipsoids, start=1):
        radii = np.array([r0, r1, r2])
        low = np.maximum(0, np.floor(centre - radii)).astype(int)
        high = np.minimum(SIZE, np.ceil(centre + radii) + 1).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        grids = np.ogrid[box]
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grids, centre, radii, strict=True)) <= 1
        voxels[box][inside] = label
    return voxels


def write_case(folder: Path, case: int) -> None:
    random = np.random.default_rng(case)
    ellipsoids = np.column_stack([random.uniform(20, SIZE - 20, (CLASSES, 3)), random.uniform(3, 24, (CLASSES, 3))])
    write(folder / "reference" / f"case_{case:03d}.nii.gz", draw(ellipsoids))
    for model, error in ERRORS.items():
        predicted = ellipsoids + random.normal(0, error, ellipsoids.shape) * [1, 1, 1, 0.5, 0.5, 0.5]
        predicted[:, 3:] = np.maximum(predicted[:, 3:], 1)
        missed = random.random(CLASSES) < 0.01
        predicted[missed, 3:] = 1e-3
        write(folder / model / f"case_{case:03d}.nii.gz", draw(predicted))


def write(file: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(file))


def generate(folder: Path, cases: int, workers: int) -> None:
    labels = {"background": 0, **{f"organ {i:02d}": i for i in range(1, CLASSES + 1)}}
    description = json.dumps({"labels": labels, "file_ending": ".nii.gz"})
    for name in ("reference", *ERRORS):
        (folder / name).mkdir(parents=True)
        (folder / name / "dataset.json").write_text(description)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(write_case, [folder] * cases, range(cases), chunksize=8))


def watch(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """Peak of the resident sets of a process and its children together, in bytes (Linux)."""
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [str(process.pid)]
        if children.exists():
            pids += children.read_text().split()
        total = 0
        for pid in pids:
            try:
                fields = Path(f"/proc/{pid}/statm").read_text().split()
            except OSError:  # it has just ended
                continue
            total += int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
        peaks.append(total)
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the cases; kept for the next run")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if not args.folder.exists():
        start = time.perf_counter()
        generate(args.folder, args.cases, args.workers)
        print(f"generated {args.cases} cases in {time.perf_counter() - start:.0f} s")
    outputs = ["--csv", str(args.folder / "cases.csv"), "--report", str(args.folder / "report.html")]
    program = shutil.which("e2enet") or str(Path(sys.executable).with_name("e2enet"))
    command = [program, "compare", *(str(args.folder / model) for model in ERRORS)]
    command += ["--reference", str(args.folder / "reference"), "--no-cache", "--workers", str(args.workers), *outputs]
    peaks: list[int] = [0]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    code = process.wait()
    watcher.join()
    seconds = time.perf_counter() - start
    peak = max(peaks) / 2**30
    print(f"exit code {code}, {seconds:.0f} s, {args.workers} workers, peak of all processes {peak:.2f} GiB")
    sys.exit(code)


if __name__ == "__main__":
    main()
