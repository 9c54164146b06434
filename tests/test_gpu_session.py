"""benchmarks/gpu_session.py: what becomes of measurements that end, fail, hang or go on; and what a bundle holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import contestants
import gpu_bundle
import gpu_session
import gpu_stages
import pytest
from support import Project

PROGRAM = """
import argparse, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("measure", "device", "folder", "preprocessed", "seconds"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
folder, key = pathlib.Path(given.folder), given.measure
with (folder / "calls").open("a") as calls:
    calls.write(key[2:] + chr(10))
if "hangs" in key:
    time.sleep(60)
if "fails" in key:
    sys.exit("something is wrong")
if "goes on" not in key:
    (folder / f"{key}.json").write_text("{}")
"""
"""A measurement that does what its name says."""


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_stages.Session:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(gpu_session, "__file__", str(program))
    monkeypatch.setattr(gpu_session, "LEAST_SECONDS", 0.1)
    return gpu_stages.Session("cpu", tmp_path / "session", tmp_path, 30)


def stage_of(*names: str, monkeypatch: pytest.MonkeyPatch, at_once: bool = False) -> None:
    def stage(_: gpu_stages.Session) -> dict[str, gpu_stages.Measurement]:
        return {f"1 {name}": gpu_stages.Measurement(lambda _: None) for name in names}

    monkeypatch.setattr(gpu_session, "STAGES", (stage,))
    monkeypatch.setattr(gpu_session, "AT_ONCE", (stage,) if at_once else ())


def calls(session: gpu_stages.Session) -> list[str]:
    return (session.folder / "calls").read_text().splitlines()


def test_a_stage_goes_on_where_it_ended(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_of("fails", "a", "goes on", "b", monkeypatch=monkeypatch)
    assert gpu_session.run_stage(1, session) == gpu_session.FAILED
    assert calls(session) == ["fails", "a", "goes on", "b"]
    error = json.loads((session.folder / "1 fails.error.json").read_text())
    assert error["what"] == "1 fails"
    assert "something is wrong" in error["end"]
    assert gpu_session.run_stage(1, session) == gpu_session.FAILED
    assert calls(session)[4:] == ["goes on", "fails"]  # nothing again that has a record, what failed last
    stage_of("a", "goes on", monkeypatch=monkeypatch)
    assert gpu_session.run_stage(1, session) == gpu_session.UNFINISHED
    stage_of("a", "b", monkeypatch=monkeypatch)
    assert gpu_session.run_stage(1, session) == gpu_session.DONE


@pytest.mark.parametrize("at_once", [False, True])
def test_what_hangs_is_stopped(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    short = gpu_stages.Session(session.device, session.folder, session.preprocessed, 1.5)
    stage_of("hangs", "hangs too", monkeypatch=monkeypatch, at_once=at_once)
    assert gpu_session.run_stage(1, short) == gpu_session.FAILED
    assert sorted(calls(session)) == (["hangs", "hangs too"] if at_once else ["hangs"])  # there is no time for the second
    assert json.loads((session.folder / "1 hangs.error.json").read_text())["error"].startswith("stopped after 1")


def test_every_measurement_has_a_name_of_its_own() -> None:
    for device in ("cpu", "cuda"):
        session = gpu_stages.Session(device, Path(), Path(), 1)
        for number, stage in enumerate(gpu_stages.STAGES, 1):
            measurements = stage(session)
            assert measurements
            assert all(key.startswith(f"{number} ") and "/" not in key for key in measurements)
    assert len({step.name for step in gpu_stages.STEPS}) == len(gpu_stages.STEPS)


@pytest.mark.slow
def test_trainings_beside_each_other_go_on_until_they_are_done(in_process: Project, tmp_path: Path) -> None:
    """Stages 4 and 6 as a dry run has them, on phantoms in the place of the scans."""
    target = tmp_path / "nnUNet_preprocessed" / "Dataset004_Hippocampus"
    shutil.copytree(in_process.preprocessed, target)
    plans = {**in_process.plans(), "dataset_name": target.name}
    (target / "nnUNetPlans.json").write_text(json.dumps(plans))
    (target / "prepared").touch()
    folder = tmp_path / "session"
    options = ["--device", "cpu", "--folder", str(folder), "--preprocessed", str(target.parent)]
    gpu_session.main([*options, "--stage", "4"])
    assert len(list(folder.glob("4 *.json"))) == 4
    gpu_session.main([*options, "--stage", "6"])  # an epoch of each
    assert not list(folder.glob("6 *.json"))
    assert len(list(folder.rglob("checkpoint_latest.pth"))) == 2
    gpu_session.main([*options, "--stage", "6"])
    records = [json.loads(file.read_text()) for file in folder.glob("6 *.json")]
    assert {record["what"] for record in records} == {"6 nnU-Net", "6 E2ENet 0.8"}
    for record in records:
        assert record["machine"]["warning"] == contestants.WITHOUT_GPU
        (result,) = record["result"].values()
        assert result["epochs"] == 2
        assert 0 <= result["dice"] <= 1


# --- the bundle ---------------------------------------------------------------------------------------------------------


def test_what_a_bundle_needs() -> None:
    without = gpu_bundle.needed(gpu_bundle.WANTED, "3.12", gpu_bundle.THERE)
    assert {"nnunetv2", "pytest", "simpleitk", "scipy"} <= without
    assert not [name for name in without if name.startswith(("torch", "triton", "nvidia"))]
    whole = gpu_bundle.needed([*gpu_bundle.WANTED, "torch"], "3.12", ())
    assert whole - without >= {"torch", "sympy"}
    assert gpu_bundle.OURS not in whole


def test_wheels_lie_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bundle, "PART_BYTES", 100)
    new = tmp_path / "new"
    new.mkdir()
    for name, size in {"a": 300, "b": 60, "c": 50, "d": 40, "e": 30}.items():
        (new / f"{name}-1-py3-none-any.whl").write_bytes(bytes(size))
    gpu_bundle.sort_into_parts(tmp_path, new.glob("*.whl"))
    parts = [sorted(w.name[0] for w in part.iterdir()) for part in sorted(tmp_path.glob("wheels*"))]
    assert parts == [["a"], ["b", "d"], ["c", "e"]]


def test_wheels_that_are_there_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(gpu_bundle.subprocess, "run", lambda command, **_: asked.append(command[-1]) or Done())
    monkeypatch.setattr(gpu_bundle, "version", lambda _: "1.2")
    there = ["Scikit_Image-1.2-cp312-cp312-manylinux_2_28_x86_64.whl"]
    gpu_bundle.fetch("scikit-image", tmp_path, "3.12", there)
    gpu_bundle.fetch("scikit-learn", tmp_path, "3.12", there)
    assert asked == ["scikit-learn==1.2"]
