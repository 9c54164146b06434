"""``e2enet demo``: the first command of the README."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console
from support import run_command

from nnunetv2_e2enet.cli import demo
from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.errors import E2ENetError


@pytest.mark.slow
def test_demo(tmp_path: Path, registered: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    output = run_command("e2enet", "demo", "--folder", str(tmp_path), "--device", "cpu", env={"COLUMNS": "80"}).stdout
    assert all(len(line) <= 80 for line in output.splitlines() if not line.startswith("Overlay: "))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row}
    ours, stock = map(float, rows["mean foreground Dice"])
    assert ours >= demo.EXPECTED_DICE
    assert stock > 0.5
    active, total = (int(rows[f"parameters {kind}"][0].replace(",", "")) for kind in ("active", "in total"))
    assert active < 0.6 * total  # the encoder is dense
    assert [rows["parameters active"][1]] == [rows["parameters in total"][1]]
    seconds = list(map(float, rows["seconds of training"]))
    assert max(seconds) < 1.5 * min(seconds)
    picture = matplotlib.image.imread(tmp_path / "overlay.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.1

    monkeypatch.setattr(demo, "EXPECTED_DICE", 0.999)
    with pytest.raises(E2ENetError, match=r"but at least 0\.999 is expected"):
        demo._report(Console(), demo.Workspace(tmp_path, "cpu"))


def test_processes_are_as_many_as_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a batch job, which has a part of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {3, 4, 7}, raising=False)
    assert demo.Workspace(tmp_path, "cpu").environment()["nnUNet_def_n_proc"] == "3"


@pytest.mark.usefixtures("registered")
def test_a_device_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for device in ("cuda", "mps"):
        assert main(["demo", "--folder", str(tmp_path / "new"), "--device", device]) == 1
        assert capsys.readouterr().err == f"e2enet demo: PyTorch finds no {device.upper()} device here: use --device cpu\n"
    assert not (tmp_path / "new").exists()


def test_a_command_that_fails_names_its_log(
    tmp_path: Path,
    registered: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "_commands", lambda _: [("Phantom data", ["e2enet", "phantom", "1000"])])
    assert main(["demo", "--folder", str(tmp_path), "--device", "cpu"]) == 1
    log = tmp_path / "logs" / "phantom_data.log"
    error = capsys.readouterr().err
    assert "`e2enet phantom 1000 …` ended with exit code 1" in error
    assert str(log) in error
    assert "nnUNet_raw" not in error  # the reason is in the log
    assert "1000" in log.read_text()
