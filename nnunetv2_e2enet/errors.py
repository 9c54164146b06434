"""The package's error about input that cannot be used, and about an extra that is not installed."""

from importlib.util import find_spec


class E2ENetError(ValueError):
    """Bad input, said in one line: what was found, what was expected, what to do.

    The console commands print the message alone, without a traceback.
    """


def check_extra(what: str, extra: str, *modules: str) -> None:
    """Raises E2ENetError, with the command that helps, unless these modules of an extra of the package are installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise E2ENetError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'nnunetv2-e2enet[{extra}]'")
