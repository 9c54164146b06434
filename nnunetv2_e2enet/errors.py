"""The package's error about input that cannot be used, and about an extra that is not installed."""

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType
from typing import Any


class E2ENetError(ValueError):
    """Bad input, said in one line: what was found, what was expected, what to do.

    The console commands print the message alone, without a traceback.
    """


def check_extra(what: str, extra: str, *modules: str) -> None:
    """Raises E2ENetError, with the command that helps, unless these modules of an extra of the package are installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        needed = f"{what} needs {', '.join(missing)}, not installed here"
        raise E2ENetError(f"{needed}: in the clone of the repository, pip install '.[{extra}]'")


def show_message_alone() -> None:
    """An E2ENetError that ends the program is shown as its message on standard error, without a traceback, from now on."""
    present = sys.excepthook
    if not (isinstance(present, functools.partial) and present.func is _show):
        sys.excepthook = functools.partial(_show, present)


def _show(
    others: Callable[..., Any], kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if isinstance(error, E2ENetError):
        print(f"E2ENet: {error}", file=sys.stderr)
    else:
        others(kind, error, traceback)
