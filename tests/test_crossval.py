"""`e2enet crossval` on folds in every state, through its console command, with nnU-Net's in processes of their own."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import submitit
from batchgenerators.utilities.file_and_folder_operations import load_json
from integration.commands import Runner
from support import Project, run_command

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.training import crossval as jobs
from nnunetv2_e2enet.training.crossval import Fold, FoldState

TRAINER = "nnUNetTrainerE2ENet_smoke"


@pytest.fixture
def model(project: Project, trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model in results of its own; folds 0 and 1 are done."""
    target = tmp_path / "results" / project.dataset / trained.name
    shutil.copytree(trained, target)
    return target


COMMAND = ("crossval", "993", "3d_fullres", "-tr", TRAINER, "-device", "cpu")


def folders(project: Project, model: Path) -> dict[str, str]:
    """nnU-Net's, with as few processes of its own as it can do with: each imports PyTorch and nnU-Net anew."""
    few = {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
    return {**project.environment, **few, "nnUNet_results": str(model.parents[1])}


def crossval(project: Project, model: Path, *options: str, check: bool = True) -> str:
    return run_command("e2enet", *COMMAND, *options, env=folders(project, model), check=check).stdout


def run_in_forks(project: Project, model: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nnU-Net's commands run in forks of this process, for the sake of time."""
    for name, value in folders(project, model).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        jobs, "_run_logged", lambda command, log, given, *_: runner.exit_code(log, *command, environment=given)
    )


def fold(model: Path, number: int) -> Fold:
    return Fold(model, "993", number)


def test_finished_folds_are_skipped_and_accumulated(project: Project, model: Path) -> None:
    checkpoints = [path.stat().st_mtime_ns for path in sorted(model.glob("fold_*/checkpoint_final.pth"))]
    output = crossval(project, model, "--folds", "0", "1")
    assert [path.stat().st_mtime_ns for path in sorted(model.glob("fold_*/checkpoint_final.pth"))] == checkpoints
    summary = load_json(str(model / "crossval_results_folds_0_1" / "summary.json"))
    assert len(summary["metric_per_case"]) == 3  # of 6 cases in 5 folds
    assert f"{summary['foreground_mean']['Dice']:.4f}" in output


@pytest.mark.usefixtures("in_process", "registered")
def test_what_was_found_on_accumulated_folds_stays(
    project: Project, model: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net's accumulation empties its folder, where nnUNetv2_find_best_configuration leaves the postprocessing."""
    run_in_forks(project, model, runner, monkeypatch)
    command = [*COMMAND, "--folds", "0", "1"]
    summary = jobs.summary(model, [0, 1])
    found = summary.with_name("postprocessing.pkl")
    assert main(command) == 0
    shown = capsys.readouterr().out
    for kept in (True, False):
        found.touch()
        assert main(command) == 0
        assert capsys.readouterr().out == shown
        assert found.exists() == kept
        validated = model / "fold_1" / "validation" / "summary.json"
        os.utime(validated, (time.time() + 10,) * 2)  # fold 1 is validated once more
    found.touch()
    os.utime(summary, (time.time() + 20,) * 2)
    summary.write_text(summary.read_text()[:50])  # by a kill
    os.utime(summary, (time.time() + 20,) * 2)
    assert main(command) == 0
    assert capsys.readouterr().out == shown


def test_unfinished_folds_go_on_from_where_they_are(
    project: Project, model: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_forks(project, model, runner, monkeypatch)
    (model / "fold_0" / "validation" / "summary.json").unlink()
    final = model / "fold_1" / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_latest.pth"))
    assert [fold(model, n).state() for n in range(3)] == [FoldState.TRAINED, FoldState.STARTED, FoldState.NEW]
    assert main([*COMMAND, "--folds", "0", "1", "2", "--status"]) == 0
    status = capsys.readouterr().out
    assert [state.value in status for state in FoldState] == [True, True, True, False]
    assert main([*COMMAND, "--folds", "0", "1"]) == 0
    assert [fold(model, n).state() for n in range(2)] == [FoldState.DONE] * 2
    assert "Epoch" not in (model / "crossval_fold_0.log").read_text()  # validated only
    assert (model / "crossval_results_folds_0_1" / "summary.json").is_file()


def test_all_folds_of_the_splits_are_accumulated(
    project: Project, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --folds; the splits file has two, which are done."""
    preprocessed = tmp_path / "preprocessed" / project.dataset
    shutil.copytree(project.preprocessed, preprocessed, ignore=shutil.ignore_patterns("*.b2nd", "*.npz", "*.pkl", "*.npy"))
    splits = json.loads((preprocessed / "splits_final.json").read_text())
    (preprocessed / "splits_final.json").write_text(json.dumps(splits[:2]))
    for name, value in {**folders(project, model), "nnUNet_preprocessed": str(preprocessed.parent)}.items():
        monkeypatch.setenv(name, value)
    assert main([*COMMAND]) == 0
    summary = load_json(str(model / "crossval_results_folds_0_1" / "summary.json"))
    assert f"0 1 {summary['foreground_mean']['Dice']:.4f}" in " ".join(re.findall(r"[\w.]+", capsys.readouterr().out))


def test_a_failing_fold_is_named(project: Project, model: Path) -> None:
    (model / "fold_2").mkdir()
    (model / "fold_2" / "checkpoint_latest.pth").write_text("no checkpoint")
    output = crossval(project, model, "--folds", "0", "2", check=False)
    assert f"1 of 2 folds did not finish, first fold 2 of {TRAINER}" in output.replace("\n", " ")
    assert "Traceback" not in output
    assert "remove it and repeat the command" in (model / "crossval_fold_2.log").read_text()
    assert not (model / "crossval_results_folds_0_2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["993", "3d_fullers", "-device", "cpu"], "has no configuration 3d_fullers: choose one of 2d, 3d_fullres"),
        (["993", "3d_fullers", "--status"], "has no configuration 3d_fullers"),
        (["993", "3d_fullres", "-p", "OtherPlans"], "OtherPlans.json is missing: run nnUNetv2_plan_and_preprocess"),
        (["993", "3d_fullres", "-tr", "nnUNetTrainerE2ENet_nosuch"], "nnU-Net finds no trainer nnUNetTrainerE2ENet_nosuch"),
        (["4", "3d_fullres"], "no data set 4 in nnUNet_raw="),
        (["993", "3d_fullres", "0"], "0 is a fold as in nnUNetv2_train: choose folds with --folds"),
        (["993", "3d_fullres"], "PyTorch finds no CUDA device here: use -device cpu"),
        (["993", "3d_fullres", "--folds", "3"], "1 of 1 folds are not done, first fold 3 of nnUNetTrainerE2ENet"),
        (["993", "3d_fullres", "-tr", "nnUNetTrainerE2ENet_nosuch", "--status"], "nnU-Net finds no trainer"),
        (["993", "3d_fullres", "-device", "cpu", "--gpus", "0"], "--gpus 0 with -device cpu: leave one of them out"),
        (["993", "3d_fullres", "--gpus", "0", "1", "--slurm"], "--gpus 0 1 with --slurm: leave one of them out"),
        (["993", "3d_fullres", "-device", "cpu", "--folds", "0", "9"], "fold 9 has no split: "),
    ],
)
@pytest.mark.usefixtures("in_process", "registered")
def test_what_can_never_be_trained_is_not_started(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["crossval", *arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("in_process")
def test_slurm_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shutil.which", lambda *_: None)
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda *_: pytest.fail("submitted"))
    command = ["crossval", "993", "3d_fullres", "-tr", "nnUNetTrainer", "--slurm"]
    for values, message in (
        ([], '--slurm: submitit cannot submit (Could not detect "srun"'),
        (["cluster=local", "nonesuch=1"], "(Parameter 'nonesuch' need to be prefixed by an executor name.)"),
        (["cluster=none"], "(AutoExecutor doesn't know any executor named none)"),
    ):
        assert main([*command, *values]) == 1
        output = capsys.readouterr()
        assert message in output.err
        assert (output.out, output.err.count("\n")) == ("", 1)


def test_folds_are_those_of_the_splits_file(
    in_process: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six folds in the data set's file; a fold that was trained without a split is shown and accumulated all the same."""
    preprocessed = tmp_path / "preprocessed" / in_process.dataset
    preprocessed.mkdir(parents=True)
    shutil.copy(in_process.preprocessed / "nnUNetPlans.json", preprocessed)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    file = preprocessed / "splits_final.json"
    command = ["crossval", "993", "3d_fullres", "-tr", "nnUNetTrainer", "-tr", "nnUNetTrainer", "--status", "--folds"]
    assert main([*command, "5"]) == 1
    assert "fold 5 has no split: nnU-Net makes 5 folds; choose from 0 to 4" in capsys.readouterr().err
    file.write_text('[{"train": [], "val": []}' + ', {"train": [], "val": []}' * 5 + "]")
    assert main([*command, "5"]) == 0
    assert capsys.readouterr().out.count("nnUNetTrainer") == 1  # named twice
    assert main(command[:-1]) == 0
    assert capsys.readouterr().out.count("nnUNetTrainer") == 6
    assert main([*command, "6"]) == 1
    assert f"fold 6 has no split: {file} has 6 folds; choose from 0 to 5" in capsys.readouterr().err
    end_well(fold(tmp_path / "results" / in_process.dataset / "nnUNetTrainer__nnUNetPlans__3d_fullres", 6))
    assert main([*command, "6"]) == 0
    file.write_text("[")
    assert main([*command, "0"]) == 1
    assert f"cannot read {file} as JSON" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process", "registered")
def test_results_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("nnUNet_results", "/proc/results")
    assert main([*COMMAND]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("e2enet crossval: cannot write into /proc/results/Dataset993_Phantom/")
    assert output.err.count("\n") == 1


@pytest.mark.usefixtures("in_process")
def test_gpus_that_are_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for gpus in ("0 2", "1 1"):  # or two trainings would share one
        assert main(["crossval", "993", "3d_fullres", "-tr", "nnUNetTrainer", "--gpus", *gpus.split()]) == 1
        assert f"--gpus {gpus}: expected different numbers from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1"]), ("2, 3", ["2", "3"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])]
)
def test_gpus_are_those_that_this_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    seen = []
    monkeypatch.setattr(jobs, "_run_logged", lambda _c, _log, given, _held: seen.append(given["CUDA_VISIBLE_DEVICES"]) or 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for gpu in (0, 1):
        fold(tmp_path / "T__P__3d_fullres", gpu).run(gpu)
    assert seen == expected


def end_well(fold: Fold) -> None:
    """Leaves the files by which a fold is done."""
    (fold.folder / "validation").mkdir(parents=True)
    (fold.folder / "checkpoint_final.pth").touch()
    (fold.folder / "validation" / "summary.json").write_text('{"metric_per_case": []}')


@pytest.mark.usefixtures("in_process", "registered")
def test_two_trainers_on_two_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each GPU has one training at a time, and both have one; trainings end in pairs, so that two must run at once."""
    ran: list[tuple[str, str]] = []
    busy: list[str] = []
    shared: list[list[str]] = []
    lock, pair = threading.Lock(), threading.Barrier(2)

    def run_logged(command: list[str], log: Path, given: dict[str, str], *_: Any) -> int:
        if command[0] == "nnUNetv2_accumulate_crossval_results":
            summary = jobs.summary(log.parent, [0, 1])
            summary.parent.mkdir()
            summary.write_text('{"foreground_mean": {"Dice": 0.75}}')
            return 0
        gpu = given["CUDA_VISIBLE_DEVICES"]
        with lock:
            busy.append(gpu)
            if len(set(busy)) < len(busy):
                shared.append(list(busy))
        pair.wait(60)
        with lock:
            ran.append((f"{command[command.index('-tr') + 1]} {command[3]}", gpu))
            busy.remove(gpu)
        end_well(fold(log.parent, int(command[3])))
        return 0

    monkeypatch.setattr(jobs, "_run_logged", run_logged)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    trainers = (TRAINER, "nnUNetTrainer")
    command = ["crossval", "993", "3d_fullres", "-tr", trainers[0], "-tr", trainers[1], "--folds", "0", "1"]
    for gpus in ([], ["--gpus", "0", "1"]):
        assert main([*command, *gpus, "--status"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        listed = [(row[1], row[3]) for row in rows if len(row) > 3 and row[1] in trainers]
        assert listed == [(trainer, number) for trainer in trainers for number in "01"]
    assert main([*command, "--gpus", "0", "1"]) == 0
    assert sorted(name for name, _ in ran) == [f"{trainer} {number}" for trainer in sorted(trainers) for number in "01"]
    assert {gpu for _, gpu in ran} == {"0", "1"}
    assert shared == []
    output = capsys.readouterr().out
    assert [output.count("0.7500"), output.count("done")] == [2, 4]


def test_ctrl_c_starts_no_waiting_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [fold(tmp_path / "T__P__3d_fullres", number) for number in range(3)]
    interrupted = threading.Event()
    started = []

    class Pool(ThreadPoolExecutor):
        """Its end is waited for once the interruption has been seen; the training goes on until then."""

        def shutdown(self, *arguments: Any, **named: Any) -> None:
            interrupted.set()
            super().shutdown(*arguments, **named)

    def train(command: list[str], *_: Any) -> int:
        started.append(command[3])
        assert interrupted.wait(60)
        return 0

    def watch() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(jobs, "_run_logged", train)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_locally(ours, [], watch)
    assert started == ["0"]


def test_a_fold_is_trained_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second job waits for nothing, writes nothing, and does not train again what the first one has brought to its end."""
    ours = fold(tmp_path / "T__P__3d_fullres", 0)
    begun, go_on = threading.Event(), threading.Event()

    def train(*_: Any) -> int:
        begun.set()
        assert go_on.wait(60)
        end_well(ours)
        return 0

    monkeypatch.setattr(jobs, "_run_logged", train)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ours.run)
        assert begun.wait(60)
        with pytest.raises(E2ENetError, match=r"fold 0 of T is trained by another e2enet crossval \(see .*\): wait"):
            ours.run()
        go_on.set()
        assert first.result() == 0
    monkeypatch.setattr(jobs, "_run_logged", lambda *_: pytest.fail("trained again"))
    assert ours.run() == 0


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fold is trained where a second command could train it too."""

    def no_locks(_: Any) -> None:  # as filelock raises it in new versions
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    monkeypatch.setattr(jobs, "_run_logged", lambda *_: pytest.fail("trained"))
    with pytest.raises(E2ENetError, match=r"cannot lock .*crossval_fold_0\.lock .*No locks available"):
        fold(tmp_path / "T__P__3d_fullres", 0).run()


COMMAND_THAT_SLEEPS = """
import sys
from pathlib import Path
from nnunetv2_e2enet.training import crossval

program = "import os, time; open('training', 'w').write(str(os.getpid())); os.rename('training', 'pid'); time.sleep(600)"
crossval.console_command = lambda name: [sys.executable, "-c", program]
crossval.Fold(Path(sys.argv[1]), "993", 0).run()
"""


@pytest.mark.skipif(os.name != "posix", reason="locks of a process that is killed are kept on POSIX systems alone")
def test_a_training_whose_command_was_killed_keeps_its_fold(tmp_path: Path) -> None:
    model = tmp_path / "T__P__3d_fullres"
    command = [sys.executable, "-c", COMMAND_THAT_SLEEPS, str(model)]
    pid = tmp_path / "pid"
    with subprocess.Popen(command, cwd=tmp_path) as parent:
        for _ in range(1200):
            if pid.exists():
                break
            time.sleep(0.1)
        parent.kill()
    training = int(pid.read_text())
    try:
        with pytest.raises(E2ENetError, match="is trained by another e2enet crossval"):
            fold(model, 0).run()
    finally:
        os.kill(training, signal.SIGKILL)


def test_a_summary_that_was_torn_off_is_written_again(model: Path) -> None:
    summary = model / "fold_0" / "validation" / "summary.json"
    whole = summary.read_text()
    for torn in ("", whole[: len(whole) // 2], "{}"):
        summary.write_text(torn)
        assert fold(model, 0).state() is FoldState.TRAINED
        assert fold(model, 0).command()[-1] == "--val"


def test_probabilities_that_are_asked_for_later(model: Path) -> None:
    """A validated fold is validated once more, whose probabilities nnU-Net needs for ensembles."""
    later = Fold(model, "993", 0, ("--npz",))
    assert fold(model, 0).state() is FoldState.DONE
    assert later.state() is FoldState.TRAINED
    assert later.command()[-2:] == ["--npz", "--val"]
    for case in load_json(str(later.folder / "validation" / "summary.json"))["metric_per_case"]:
        (later.folder / "validation" / Path(case["prediction_file"]).name.replace(".nii.gz", ".npz")).touch()
    assert later.state() is FoldState.DONE


@pytest.mark.slow
def test_jobs_are_submitted_for_what_is_not_done(
    project: Project, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """submitit's local executor stands for the cluster. The test waits for the job to end, well or not."""
    submitted: list[submitit.Job[None]] = []
    submit = submitit.AutoExecutor.submit

    def recorded(executor: submitit.AutoExecutor, *task: Any) -> submitit.Job[None]:
        submitted.append(submit(executor, *task))
        return submitted[-1]

    monkeypatch.setattr(submitit.AutoExecutor, "submit", recorded)
    for name, value in folders(project, model).items():
        monkeypatch.setenv(name, value)
    command = [*COMMAND, "--folds", "0", "2", "--slurm", "cluster=local"]
    assert main([*command, "timeout_min=10"]) == 0
    (job,) = submitted
    assert f"fold 2: job {job.job_id}, submitted" in capsys.readouterr().out
    job.result()
    assert fold(model, 2).state() is FoldState.DONE
    assert main(command) == 0
    assert "all folds are done" in capsys.readouterr().out
    assert submitted == [job]


@pytest.mark.parametrize("done", [True, False])
def test_a_job_whose_training_fails_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """A cluster sees a job fail by an exception alone."""
    third = fold(tmp_path / "T__P__3d_fullres", 2)
    if done:
        end_well(third)
    monkeypatch.setattr(jobs, "_run_logged", lambda *_: 1)
    with nullcontext() if done else pytest.raises(E2ENetError, match=f"fold 2 of T did not finish: see {third.log}"):
        third.finish()


@pytest.mark.usefixtures("registered")
def test_folds_that_start_at_once_find_their_splits(
    in_process: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each would write the same file otherwise, and another one read half of it."""
    preprocessed = tmp_path / "preprocessed" / in_process.dataset
    shutil.copytree(in_process.preprocessed, preprocessed)
    file = preprocessed / "splits_final.json"
    nnunets = file.read_bytes()
    file.unlink()
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    read: list[bytes] = []

    def run_logged(*_: Any) -> int:
        read.append(file.read_bytes())
        return 1

    monkeypatch.setattr(jobs, "_run_logged", run_logged)
    assert main(["crossval", "993", "3d_fullres", "-tr", "nnUNetTrainer"]) == 1
    assert len(read) == 5
    assert [json.loads(splits) for splits in read] == [json.loads(nnunets)] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "0", "0"], "expected different numbers"),
        (["--slurm", "partition"], "expected KEY=VALUE"),
        (["-p", "my__plans"], "-p my__plans: `__` divides"),
    ],
)
def test_bad_input_is_said_in_one_line(project: Project, model: Path, options: list[str], message: str) -> None:
    output = crossval(project, model, *options, check=False)
    assert message in output
    assert "Traceback" not in output
