"""The optional libraries that comparisons need."""

from importlib.util import find_spec

from nnunetv2_e2enet.errors import E2ENetError

NEEDED = ("monai", "scikit_posthocs", "statsmodels")


def check_evaluation_extra() -> None:
    """Raises E2ENetError, with the command that helps, unless the libraries of the extra ``evaluation`` are installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise E2ENetError(
            f"comparing needs {', '.join(missing)}, not installed here: pip install 'nnunetv2-e2enet[evaluation]'"
        )
