"""Files that appear whole or not at all, and that nobody can read whom the umask keeps out."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnunetv2_e2enet import files
from nnunetv2_e2enet.errors import E2ENetError


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        files.write(tmp_path / "report.html", "case_1")
        files.write(tmp_path / "report.html", "case_2")
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == mode
    assert (tmp_path / "report.html").read_text() == "case_2"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_writing_ends_early(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_handle: int) -> None:
        raise error

    path = tmp_path / "report.html"
    path.write_text("former")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(E2ENetError if isinstance(error, OSError) else type(error)):
        files.write(path, "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"report.html": "former"}
