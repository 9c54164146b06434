"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from tempfile import TemporaryFile
from typing import Any

from nnunetv2_e2enet.errors import E2ENetError


def temporary_path(path: Path) -> Path:
    """A new hidden name beside ``path``, for a file that will be renamed to it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write or replace ``path``; an interruption, a crash or an error (OSError) leaves the former file.

    The umask decides who may read it, as with any new file.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write(path: Path, content: str | bytes) -> None:
    """Write or replace ``path`` as ``write_atomically`` does.

    Raises:
        E2ENetError: the folder is missing or cannot be written to.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise E2ENetError(
            f"cannot write {path} ({error.strerror}): expected a folder with room and write permission; choose another place"
        ) from error


def make_writable(folder: Path) -> None:
    """Makes a folder, unless it is there, and a file in it, which is gone at once.

    Raises:
        E2ENetError: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise E2ENetError(
            f"cannot write into {folder} ({error.strerror}): expected a folder with room and write permission, or a new one"
        ) from error


def check_readable(path: Path) -> None:
    """Raises E2ENetError where nobody can tell what lies at a path, or in the folder there; globs find nothing then.

    A path where nothing lies passes, and so does a file, whatever it holds.
    """
    try:
        if S_ISDIR(path.stat().st_mode):
            next(path.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        return  # nothing lies there, which callers say in their own words
    except OSError as error:
        raise E2ENetError(
            f"cannot read {path} ({error.strerror}): expected a file or a folder that you may read; change its permissions"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        E2ENetError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise E2ENetError(f"{path.name} is missing in {path.parent}: expected a JSON file; check the path") from error
    except (OSError, ValueError) as error:
        raise E2ENetError(f"cannot read {path} as JSON ({error}): check the path, or write the file again") from error
    if not isinstance(content, dict):
        raise E2ENetError(f"{path} holds a {type(content).__name__}, but an object was expected: is it the right file?")
    return content
