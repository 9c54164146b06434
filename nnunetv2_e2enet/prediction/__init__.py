"""nnU-Net's prediction of whole scans on a CPU: the same segmentations with less time and memory around the network.

Of an nnU-Net that is not known, nothing is imported or replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2_e2enet.prediction.known import why_unknown

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

__all__ = ["install", "why_never", "why_nnunet"]


def install() -> None:
    """Makes nnU-Net's predictors in this process ask ``why_nnunet`` before each scan, and predict here if it gives None."""
    if why_unknown() is None:
        from nnunetv2_e2enet.prediction import takeover

        takeover.install()


def why_never() -> str | None:
    """Why all predictors go nnU-Net's own way in this environment; None if some do not.

    Raises:
        E2ENetError: an environment variable has a value that cannot be used.
    """
    unknown = why_unknown()
    if unknown is not None:
        return unknown
    from nnunetv2_e2enet.prediction import takeover

    return takeover.why_never()


def why_nnunet(predictor: nnUNetPredictor) -> str | None:
    """Why a predictor that was initialized goes nnU-Net's own way around the network; None if it does not."""
    reason = why_never()
    if reason is not None:
        return reason
    from nnunetv2_e2enet.prediction import takeover

    return takeover.why_nnunet(predictor)
