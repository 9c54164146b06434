"""benchmarks/gpu_session.py: what becomes of measurements that end, fail, hang or go on; and what a bundle holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contestants
import gpu_bundle
import gpu_results
import gpu_session
import gpu_stages
import pytest
import torch
from support import Project

from nnunetv2_e2enet.network.acceleration import prepare_kernels

PROGRAM = """
import argparse, os, pathlib, re, sys, time
parser = argparse.ArgumentParser()
for name in ("measure", "device", "folder", "preprocessed", "seconds"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
folder, key = pathlib.Path(given.folder), given.measure
with (folder / "calls").open("a") as calls:
    calls.write(key[2:] + chr(10))
if "forks" in key and [os.fork() for _ in range(3)]:
    memory = bytearray(os.urandom(1 << 16)) * (100 << 4)  # which takes a while to be given back
if "hangs" in key:
    time.sleep(60)
file = re.sub(r"[ ,]+", "-", key)
if "fails" in key:
    (folder / f"{file}.partial").write_text('{"results": {"a part": 1}}')
    sys.exit("something is wrong")
if "goes on" not in key:
    (folder / f"{file}.json").write_text('{"what": "%s", "result": 1}' % key)
"""
"""A measurement that does what its name says."""


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_stages.Session:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(gpu_session, "__file__", str(program))
    return gpu_stages.Session("cpu", tmp_path / "session", tmp_path, 30)


def stage_of(*names: str, monkeypatch: pytest.MonkeyPatch, at_once: bool = False, least_seconds: float = 10) -> None:
    def stage(_: gpu_stages.Session) -> dict[str, gpu_stages.Measurement]:
        return {f"1 {name}": gpu_stages.Measurement(lambda _: None, least_seconds=least_seconds) for name in names}

    monkeypatch.setattr(gpu_session, "STAGES", (stage,))
    monkeypatch.setattr(gpu_session, "AT_ONCE", (stage,) if at_once else ())


def calls(session: gpu_stages.Session) -> list[str]:
    return (session.folder / "calls").read_text().splitlines()


def test_a_stage_goes_on_where_it_ended(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_of("fails", "a", "goes on", "b", monkeypatch=monkeypatch)
    assert gpu_session.run_stage(1, session) == {gpu_session.FAILED, gpu_session.UNFINISHED, gpu_session.DONE}
    assert calls(session) == ["fails", "a", "goes on", "b"]
    error = json.loads((session.folder / "1-fails.error.json").read_text())
    assert error["what"] == "1 fails"
    assert error["partial"] == {"a part": 1}
    assert "something is wrong" in error["end"]
    assert gpu_session.run_stage(1, session) == {gpu_session.FAILED, gpu_session.UNFINISHED}
    assert calls(session)[4:] == ["goes on", "fails"]  # nothing again that has a record, what failed last
    stage_of("a", "goes on", monkeypatch=monkeypatch)
    assert gpu_session.run_stage(1, session) == {gpu_session.UNFINISHED}
    stage_of("a", "b", monkeypatch=monkeypatch)
    assert gpu_session.run_stage(1, session) == {gpu_session.DONE}
    assert gpu_session.run_stage(1, session) == {gpu_session.DONE}  # nothing is left


def test_what_fails_does_not_end_a_stage(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is called again until all its measurements have a record or have failed, each of which is begun."""
    names = ("fails", "hangs and fails", "a", "hangs", "b")
    stage_of(*names, monkeypatch=monkeypatch, least_seconds=4)
    short = ["--device", "cpu", "--folder", str(session.folder), "--preprocessed", str(session.preprocessed), "--seconds", "9"]
    with pytest.raises(SystemExit, match="what failed is in"):
        gpu_session.main(short)
    assert set(calls(session)) == set(names)
    assert {file.name for file in session.folder.glob("1-*.json") if "error" not in file.name} == {"1-a.json", "1-b.json"}


@pytest.mark.parametrize("at_once", [False, True])
def test_what_hangs_is_stopped(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    short = gpu_stages.Session(session.device, session.folder, session.preprocessed, 8)
    stage_of("hangs", "hangs too", monkeypatch=monkeypatch, at_once=at_once, least_seconds=6)
    left = set() if at_once else {gpu_session.UNFINISHED}
    assert gpu_session.run_stage(1, short) == {gpu_session.FAILED, *left}
    assert sorted(calls(session)) == (["hangs", "hangs too"] if at_once else ["hangs"])  # there is no time for the second
    assert json.loads((session.folder / "1-hangs.error.json").read_text())["error"] in (
        "stopped after 7 s",
        "stopped after 8 s",
    )


def test_what_a_measurement_forked_is_gone(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lock of the folder, so that the next stage can begin at once."""
    short = gpu_stages.Session(session.device, session.folder, session.preprocessed, 8)
    stage_of("forks and hangs", monkeypatch=monkeypatch, least_seconds=3)
    assert gpu_session.run_stage(1, short) == {gpu_session.FAILED}
    assert gpu_session.run_stage(1, short) == {gpu_session.FAILED}


def test_a_folder_is_of_one_device(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage_of("a", monkeypatch=monkeypatch)
    results = tmp_path / "results.json"
    gpu_session.run_stage(1, session, results)
    for folder in (session.folder, tmp_path / "elsewhere"):
        with pytest.raises(SystemExit, match="has measurements on cpu, not on cuda: give another --folder"):
            gpu_session.run_stage(1, gpu_stages.Session("cuda", folder, tmp_path, 30), results)


def test_all_results_come_in_one_file(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it holds is not measured again, in another folder either."""
    stage_of("a, b", "fails", monkeypatch=monkeypatch)
    results = tmp_path / "results.json"
    gpu_session.run_stage(1, session, results)
    records = json.loads(results.read_text())["records"]
    assert {record["what"]: "error" in record for record in records} == {"1 a, b": False, "1 fails": True}
    assert [file.name for file in session.folder.iterdir() if not re.fullmatch(r"[\w.-]+", file.name)] == []
    elsewhere = gpu_stages.Session("cpu", tmp_path / "elsewhere", tmp_path, 30)
    gpu_session.run_stage(1, elsewhere, results)
    assert calls(elsewhere) == ["fails"]
    assert json.loads(results.read_text())["records"][0] == records[0]


def test_nothing_begins_that_would_not_end(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what has a whole stage, as it never gets more."""

    def stage(_: gpu_stages.Session) -> dict[str, gpu_stages.Measurement]:
        least = {"1 longest": 1000, "1 long": 29, "1 short": 1}
        return {key: gpu_stages.Measurement(lambda _: None, least_seconds=seconds) for key, seconds in least.items()}

    monkeypatch.setattr(gpu_session, "STAGES", (stage,))
    begun: list[str] = []
    monkeypatch.setattr(gpu_session, "ended", lambda key, *_: begun.append(key) or time.sleep(3.5) or (0, ""))
    assert gpu_session.run_stage(1, session) == {gpu_session.UNFINISHED}
    assert begun == ["1 longest", "1 short"]


@pytest.mark.parametrize("at_once", [False, True])
def test_no_measurement_takes_the_time_of_the_others(
    session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """But what failed has all the time that is left, when it comes last; and what runs beside the others."""
    stage_of("a", "fails", "b", monkeypatch=monkeypatch, at_once=at_once, least_seconds=3)
    given: dict[str, float] = {}

    def ended(key: str, _: gpu_stages.Session, __: Any, seconds: float, ___: int) -> tuple[int, str]:
        given[key[2:]] = seconds
        gpu_session.log_of(key, session).touch()
        return int("fails" in key), ""

    monkeypatch.setattr(gpu_session, "ended", ended)
    monkeypatch.setattr(gpu_session.time, "monotonic", lambda: 0.0)
    gpu_session.run_stage(1, session)
    assert given == dict.fromkeys(("a", "fails", "b"), 30 if at_once else 6)
    gpu_session.run_stage(1, session)
    assert given == {"a": 30 if at_once else 6, "fails": 30, "b": 30 if at_once else 6}


SESSION = """
import subprocess, sys
sys.path.insert(0, {benchmarks!r})
import gpu_session, gpu_stages

def sleeps(session):
    print("asleep", flush=True)
    subprocess.run(["sh", "-c", "while date > beat; do sleep 0.1; done"], cwd=session.folder)

gpu_session.STAGES = (lambda _: {{"1 sleeps": gpu_stages.Measurement(sleeps)}},)
gpu_session.__file__ = __file__
gpu_session.main()
"""
"""A session whose only measurement waits for a process that goes on for ever."""


def until(there: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not (found := there()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_measurements_end_with_their_session(tmp_path: Path, how: signal.Signals) -> None:
    """With the processes that they started; and there is one session a folder."""
    program, folder = tmp_path / "program.py", tmp_path / "session"
    program.write_text(SESSION.format(benchmarks=str(Path(gpu_session.__file__).parent)))
    command = [sys.executable, str(program), "--device", "cpu", "--folder", str(folder), "--stage", "1"]
    beat = folder / "beat"
    with subprocess.Popen(command, start_new_session=True) as session:
        assert until(beat.is_file)
        with pytest.raises(SystemExit, match="another session measures in"):
            gpu_session.run_stage(1, gpu_stages.Session("cpu", folder, tmp_path, 30))
        session.send_signal(how)
        assert session.wait(20) == -how
    assert until(lambda: is_free(folder), 20)
    before = beat.stat().st_mtime_ns
    time.sleep(1)
    assert beat.stat().st_mtime_ns == before


def is_free(folder: Path) -> bool:
    try:
        with gpu_session.alone_in(folder):
            return True
    except SystemExit:
        return False


def test_what_is_worth_most_comes_first() -> None:
    session = gpu_stages.Session("cuda", Path(), Path(), 1)
    keys = gpu_stages.by_value(session)
    assert sorted(keys) == sorted(key for stage in gpu_stages.STAGES[:5] for key in stage(session))
    first = ["2 nnU-Net, compiled", "2 nnU-Net, eager", "2 blocks, eager", "3 patch", "4 48 maps of 64 x 160 x 160"]
    assert [key for key in keys if not key.startswith("1 check")][:6] == [*first, "2 blocks, compiled"]
    assert keys.index("3 patch") < keys.index("1 test_kernels.py")


@pytest.mark.parametrize("fails", [False, True])
def test_tests_that_fail_are_run_again(
    session: gpu_stages.Session, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record would say that they are done."""
    repository = tmp_path / "repository"
    (repository / "tests").mkdir(parents=True)
    (repository / "pyproject.toml").write_text("[tool.pytest.ini_options]")
    (repository / "tests" / "test_it.py").write_text(f"def test_it(): assert {not fails}")
    monkeypatch.setattr(gpu_stages, "REPOSITORY", repository)
    session.folder.mkdir()
    if fails:
        with pytest.raises(SystemExit, match="1 failed in"):
            gpu_stages.passed("test_it.py", session)
    else:
        assert gpu_stages.passed("test_it.py", session)["passed"]


def test_each_check_of_the_kernels_is_made(session: gpu_stages.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    from nnunetv2_e2enet import kernels

    monkeypatch.setattr(kernels, "wrong_kernel", lambda _: 1 / 0)
    monkeypatch.setattr(kernels, "wrong_convolution", lambda _: "convolve")
    with pytest.raises(SystemExit, match="not as PyTorch: one of the fused kernels, convolve"):
        gpu_stages.agreement(session)
    for check in ("wrong_kernel", "wrong_convolution"):
        monkeypatch.setattr(kernels, check, lambda _: None)
    assert len(gpu_stages.agreement(session)) == 2


def test_convolutions_are_timed_with_the_kernels(
    session: gpu_stages.Session, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network is made here, which would prepare them. What has been timed is there where a later way fails."""
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    session.folder.mkdir()
    key, measurement = next(iter(gpu_stages.stage_convolutions(session).items()))
    assert measurement.environment == {"nnUNet_e2enet_kernels": "on", "TRITON_INTERPRET": "1"}
    setting(kernels="off")
    prepare_kernels(torch.device("cpu"))
    setting(kernels="on")
    with monkeypatch.context() as broken:
        broken.setattr(gpu_stages, "sparse_convolution", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measurement.run(session)
    first = json.loads(session.file(key, gpu_stages.PARTIAL).read_text())["results"]
    assert set(first) == {"conv3d", "conv3d, channels last", "over slices, channels last"}
    found = measurement.run(session)
    setting(kernels="auto")
    prepare_kernels(torch.device("cpu"))
    parts = ("", ", forward", ", gradient of maps", ", gradient of weights", " after norm and shift", " with norm and shift")
    assert set(found) - set(first) == {f"sparse blocks{part}{last}" for part in parts for last in ("", ", channels last")}
    assert {name: found[name] for name in first} == first


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_says_what_it_computed(session: gpu_stages.Session, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same at every time and with every recomputation; also where it fails later; and the tables take it."""
    session.folder.mkdir()
    found: dict[str, Any] = {}
    for kind in ("blocks", "none"):
        step = gpu_stages.Step(kind, compiled=False)
        session.file(f"2 {step.name}", gpu_stages.PARTIAL).write_text('{"what": "another", "results": {}}')
        with monkeypatch.context() as broken:
            if fails:
                seen: list[str] = []
                broken.setattr(gpu_stages, "synchronize", lambda _, seen=seen: seen.append("") or 1 / (3 - len(seen)))
            try:
                gpu_stages.timed_step(step, session)
            except ZeroDivisionError:
                assert fails
        partial = json.loads(session.file(f"2 {step.name}", gpu_stages.PARTIAL).read_text())["results"]
        record = {"what": f"2 {step.name}", "device": "cuda", "error": "", "end": "", "partial": partial}
        assert len([line for line in gpu_results.section([record]) if kind in line]) == 2 - fails
        assert partial["without_kernels"] == ["fused kernels"]
        found[kind] = [partial[key] for key in ("function", "first_loss", "gradient_norm")]
    assert found["blocks"] == ["E2ENet", *map(pytest.approx, found["none"][1:])]
    assert found["blocks"][2] > 0


@pytest.mark.parametrize("slow_host", [False, True])
def test_the_time_of_the_device_is_of_queued_calls(slow_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are queued while the device waits, longer for a slow host, and the host's clock is not asked."""
    queue: list[str] = []
    waits: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0

        def record(self) -> None:
            self.at = len(queue)

        def query(self) -> bool:
            return slow_host and waits[-1] < 4 * gpu_stages.WAIT_CYCLES

        def elapsed_time(self, end: Event) -> float:
            assert queue[-1] == "synchronized"
            return 3.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (queue.append("waits"), waits.append(cycles)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("synchronized"))
    times = gpu_stages.milliseconds_of(lambda: queue.append("call"), "cuda")
    assert times["device"] == [3.0] * 5
    assert len(times["wall"]) == 20
    assert queue[-gpu_stages.QUEUED - 2 :] == ["waits", *["call"] * gpu_stages.QUEUED, "synchronized"]
    assert waits == 5 * [factor * gpu_stages.WAIT_CYCLES for factor in ([1, 2, 4] if slow_host else [1])]


def test_every_measurement_has_a_name_of_its_own() -> None:
    for device in ("cpu", "cuda"):
        session = gpu_stages.Session(device, Path(), Path(), 1)
        for number, stage in enumerate(gpu_stages.STAGES, 1):
            measurements = stage(session)
            assert measurements
            assert all(key.startswith(f"{number} ") and "/" not in key for key in measurements)
            assert len({session.file(key, ".json") for key in measurements}) == len(measurements)
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
    assert len(list(folder.glob("4-*.json"))) == 5
    gpu_session.main([*options, "--stage", "6"])  # an epoch of each
    assert not list(folder.glob("6-*.json"))
    assert len(list(folder.rglob("checkpoint_latest.pth"))) == 2
    gpu_session.main([*options, "--stage", "6"])
    records = [json.loads(file.read_text()) for file in folder.glob("6-*.json")]
    assert {record["what"] for record in records} == {"6 nnU-Net", "6 E2ENet 0.8"}
    for record in records:
        assert record["machine"]["warning"] == contestants.WITHOUT_GPU
        (result,) = record["result"].values()
        assert result["epochs"] == 2
        assert 0 <= result["dice"] <= 1


# --- the bundle ---------------------------------------------------------------------------------------------------------


def test_what_a_bundle_needs() -> None:
    without = gpu_bundle.needed(gpu_bundle.WANTED, "3.12", gpu_bundle.THERE, {})
    assert {"nnunetv2", "pytest", "simpleitk", "scipy"} <= without
    assert not [name for name in without if name.startswith(("torch", "triton", "nvidia"))]
    whole = gpu_bundle.needed([*gpu_bundle.WANTED, "torch"], "3.12", (), {})
    assert whole - without >= {"torch", "sympy"}
    assert gpu_bundle.OURS not in whole


def test_what_is_installed_there_stays_out_of_a_bundle(tmp_path: Path) -> None:
    """In a version that suits: acvl-utils must be older than 0.3, and nothing else needs connected-components-3d."""
    whole = gpu_bundle.needed(["nnunetv2"], "3.12", gpu_bundle.THERE, {})
    listed = tmp_path / "installed.txt"

    def with_list(text: str) -> set[str]:
        listed.write_text(text)
        return whole - gpu_bundle.needed(["nnunetv2"], "3.12", gpu_bundle.THERE, gpu_bundle.read_installed(listed))

    assert with_list("SimpleITK==2.5.3\nacvl_utils==0.2.7\n\nnumpy\n") == {
        "simpleitk",
        "acvl-utils",
        "connected-components-3d",
        "numpy",
    }
    assert with_list("acvl-utils==0.3\nanother==1\n") == set()
    for wrong in ("numpy 2.4.0", "numpy==new", "Package    Version"):
        with pytest.raises(SystemExit, match=r"is not NAME==VERSION, as `pip list --format freeze`"):
            with_list(wrong)


def test_a_bundle_builds_our_package_whatever_is_installed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment may have setuptools of its own, older than the one of the machine's Python."""
    fetched: list[str] = []
    monkeypatch.setattr(gpu_bundle, "fetch", lambda name, *_: fetched.append(name))
    (tmp_path / "data").mkdir()
    listed = {"setuptools": "999", "numpy": ""}
    gpu_bundle.bundle(tmp_path / "bundle", tmp_path / "data", "3.12", with_torch=False, installed=listed)
    assert "setuptools" in fetched
    assert "numpy" not in fetched


def test_a_bundle_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^no-such-package is not installed here.*pip install no-such-package$"):
        gpu_bundle.needed(["no-such-package"], "3.12", (), {})
    with pytest.raises(SystemExit, match=r"no folder .*data: give"):
        gpu_bundle.bundle(tmp_path / "bundle", tmp_path / "data", "3.12", with_torch=False, installed={})
    assert not list(tmp_path.iterdir())


def test_a_bundle_with_torch_is_whole(tmp_path: Path) -> None:
    options = ["--bundle", str(tmp_path), "--preprocessed", str(tmp_path), "--with-torch", "--installed", "list.txt"]
    with pytest.raises(SystemExit):
        gpu_session.main(options)
    assert not list(tmp_path.iterdir())


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


def test_torch_of_a_virtual_environment_is_found(tmp_path: Path) -> None:
    """The machine's Python may be one, and has what builds our package. Instead of pip, which needs the wheels, a program."""
    theirs, bundle = tmp_path / "theirs", tmp_path / "bundle"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(theirs)], check=True)
    (packages,) = theirs.glob("lib/python*/site-packages")
    (tmp_path / "pip.py").write_text("import sys\nif '--no-build-isolation' in sys.argv:\n    import builder")
    (packages / "builder.py").touch()
    bundle.mkdir()
    script = bundle / "install.sh"
    script.write_text(gpu_bundle.installer(with_torch=False))
    script.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(theirs / "bin" / "python"), "PYTHONPATH": str(tmp_path)}

    def install() -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=False)

    failed = install()
    assert failed.returncode == 1
    assert "give the interpreter that has them, as in PYTHON=" in failed.stderr
    for module in ("torch", "triton"):
        (packages / f"{module}.py").touch()
    assert install().returncode == 0
    where = [str(bundle / "environment" / "bin" / "python"), "-c", "import torch; print(torch.__file__)"]
    assert subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip() == str(packages / "torch.py")
