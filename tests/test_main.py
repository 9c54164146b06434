"""``e2enet`` as a shell starts it: completion, and a pipe that nobody reads to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import program, run_python

from nnunetv2_e2enet.cli import main as entry
from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.registration import console_command


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit) as ended:
            main(["completion", shell])
        assert ended.value.code == 0
        script = capsys.readouterr().out
        assert "--report" in script
        assert "profile" in script


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_command_without_a_word(unbuffered: str) -> None:
    """As in ``e2enet completion bash | head -1``, with a reader that has gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [program("e2enet"), "completion", "bash"]
    result = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_standard_output_that_was_closed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """``e2enet completion bash >&-``: Python has no standard output then, and what would be printed is lost."""
    monkeypatch.setattr("sys.stdout", None)
    assert main([]) == 0


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "JSON"])
def test_info_into_a_closed_pipe(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``e2enet info | head -1``: a table comes from rich, which has a way of its own to end, and JSON does not."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        try:
            code: str | int | None = main(["info", *options])
        except SystemExit as end:
            code = end.code
    assert code == 1
    assert capsys.readouterr().err == ""


def test_the_broken_pipe_of_a_pool_is_no_closed_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its traceback is shown, while standard output is as it should be."""

    def broken(_args: object) -> int:
        raise BrokenPipeError("a worker has died")

    monkeypatch.setattr(entry.phantom, "run", broken)
    with (tmp_path / "output.txt").open("w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with pytest.raises(BrokenPipeError, match="a worker has died"):
            main(["phantom", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "-m", "m.e2enet", "-i", "scan.nii.gz", "-o", "out", "-d", "302"], "unrecognized arguments: -d 302"),
        (["profile", "4", "--round", "3"], "unrecognized arguments: --round 3"),
        (["crossval", "4", "3d_fullres", "--fold=0"], "unrecognized arguments: --fold=0"),
    ],
)
def test_options_are_written_out(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: e2enet {arguments[0]} ")
    assert error.endswith(f"e2enet {arguments[0]}: error: {message}\n")


@pytest.mark.parametrize("command", [*entry.COMMANDS, "completion"])
def test_help_fits_a_terminal_of_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 1] == []


def test_a_short_option_may_be_joined_with_its_value() -> None:
    assert entry.build_parser().parse_args(["plan", "-d4"]).d == [4]


@pytest.mark.usefixtures("registered")
def test_a_demo_needs_a_folder_that_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, Path("/proc/demo")):
        assert main(["demo", "--folder", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"e2enet demo: cannot write into {folder} (")
        assert error.count("\n") == 1


def test_console_commands_are_those_of_the_installed_package(tmp_path: Path) -> None:
    """Wherever they are started, also in a folder with packages of the same names, such as a clone."""
    for package in ("nnunetv2_e2enet", "nnunetv2"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('not the installed one')")
    ended = subprocess.run(
        [*console_command("e2enet"), "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("nnunetv2-e2enet ")


def test_json_takes_no_library_of_the_evaluation() -> None:
    """Commands that compare nothing write JSON too."""
    code = (
        "import sys\n"
        "from argparse import Namespace\n"
        "import numpy as np\n"
        "from nnunetv2_e2enet.cli.output import write_json\n"
        "write_json(Namespace(json='-'), {'a': (np.float32(0.5), float('nan'))})\n"
        "assert not {'torch', 'pandas', 'scipy', 'nnunetv2'} & set(sys.modules)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"a": [0.5, None]}


def test_an_error_that_ends_a_program_is_its_message_alone() -> None:
    """Where nnU-Net's own code meets it, as with weights of another network after -pretrained_weights."""
    program = (
        "from nnunetv2_e2enet.errors import E2ENetError, show_message_alone as show; show(); show(); raise E2ENetError('so')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "E2ENet: so\n")
    ended = subprocess.run(
        [sys.executable, "-c", program.replace("raise E2ENetError", "raise KeyError")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in ended.stderr
