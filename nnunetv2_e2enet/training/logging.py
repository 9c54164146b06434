"""DSFF's values in nnU-Net's log, which goes into checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnunetv2_e2enet.dsff import TopologyHistory

if TYPE_CHECKING:

    class _LocalLogger:
        my_fantastic_logging: dict[str, list[Any]]
        verbose: bool

        def __init__(self, verbose: bool = False) -> None: ...
        def log(self, key: str, value: Any, epoch: int) -> None: ...
        def get_value(self, key: str, step: int | None) -> Any: ...
        def get_checkpoint(self) -> dict[str, list[Any]]: ...
        def load_checkpoint(self, checkpoint: dict[str, list[Any]]) -> None: ...
else:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger as _LocalLogger

KEYS = ("dsff_sparsity", "dsff_prune_fraction", "dsff_connections_changed", "dsff_explored")
BORN = "dsff_born"

# nnU-Net's progress plot ends where the shortest list of the log ends, also for a stock trainer that goes on from a checkpoint
# of DSFF. Lists of DSFF are therefore longer than any training, with None for epochs that are still to come.
_LENGTH = 10_000


class DSFFLogger(_LocalLogger):
    """nnU-Net's local logger, with DSFF's values in lists of the same log.

    The history has a record an update; the log has a value an epoch, goes with the checkpoint into any folder, and outlives
    epochs of a stock trainer. In a checkpoint, ``logging`` also has ``dsff_born``, one tensor a maskable layer: see
    ``TopologyHistory.born``.

    Args:
        history: the history whose ``born`` is saved and loaded.
        former: the logger in whose place this one is, with all lists of its log, those that a trainer of the user's added too.
    """

    def __init__(self, history: TopologyHistory, former: _LocalLogger) -> None:
        super().__init__(former.verbose)
        self.history = history
        self.my_fantastic_logging.update({**former.my_fantastic_logging, **_empty()})

    def log(self, key: str, value: Any, epoch: int) -> None:
        """As in nnU-Net; a value of DSFF may leave out epochs and may be logged again."""
        if key not in KEYS:
            super().log(key, value, epoch)
            return
        values = self.my_fantastic_logging[key]
        values.extend([None] * (epoch + 1 - len(values)))
        values[epoch] = float(value)

    def get_value(self, key: str, step: int | None) -> Any:
        """As in nnU-Net; a list of DSFF ends with the last epoch that has a value."""
        value = super().get_value(key, step)
        if key not in KEYS or step is not None:
            return value
        return value[: max((epoch + 1 for epoch, logged in enumerate(value) if logged is not None), default=0)]

    def get_checkpoint(self) -> dict[str, list[Any]]:
        """The whole log, with ``dsff_born``."""
        born = [values.cpu() for values in self.history.born.values()]
        return {**super().get_checkpoint(), BORN: [*born, *[None] * (_LENGTH - len(born))]}

    def load_checkpoint(self, checkpoint: dict[str, list[Any]]) -> None:
        """Take over a log that may lack values of DSFF: of an older release, or of a stock trainer."""
        super().load_checkpoint({**_empty(), **checkpoint})
        self.history.load_born(self.my_fantastic_logging.pop(BORN, []))


def _empty() -> dict[str, list[float | None]]:
    return {key: [None] * _LENGTH for key in KEYS}
