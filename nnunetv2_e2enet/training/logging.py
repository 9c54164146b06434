"""DSFF's values in nnU-Net's log, which goes into checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnunetv2_e2enet.dsff import TopologyHistory

if TYPE_CHECKING:

    class LocalLogger:
        def __init__(self, verbose: bool = False) -> None: ...
        def log(self, key: str, value: Any, epoch: int) -> None: ...
        def get_value(self, key: str, step: int | None) -> Any: ...
        def get_checkpoint(self) -> dict[str, list[Any]]: ...
        def load_checkpoint(self, checkpoint: dict[str, list[Any]]) -> None: ...
else:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

KEYS = ("dsff_sparsity", "dsff_prune_fraction", "dsff_connections_changed", "dsff_explored")
BORN = "dsff_born"

# nnU-Net's progress plot ends where the shortest list of the log does, also that of a stock trainer that goes on from the
# checkpoint and knows nothing of ours. So they are longer in checkpoints than any training.
_LENGTH = 10_000


class DSFFLogger(LocalLogger):
    """nnU-Net's local logger, with DSFF's values beside its own.

    A checkpoint's ``logging`` has them as lists, one entry an epoch, then None. ``dsff_born`` has one tensor a maskable layer:
    see ``TopologyHistory.born``.

    Args:
        history: whose ``born`` travels along.
        verbose: as in nnU-Net.
    """

    def __init__(self, history: TopologyHistory, verbose: bool = False) -> None:
        super().__init__(verbose)
        self.history = history
        self.dsff: dict[str, list[float | None]] = {key: [] for key in KEYS}

    def log(self, key: str, value: Any, epoch: int) -> None:
        if key not in self.dsff:
            super().log(key, value, epoch)
            return
        earlier = self.dsff[key][:epoch]
        self.dsff[key] = [*earlier, *[None] * (epoch - len(earlier)), float(value)]

    def get_value(self, key: str, step: int | None) -> Any:
        if key not in self.dsff:
            return super().get_value(key, step)
        return self.dsff[key] if step is None else self.dsff[key][step]

    def get_checkpoint(self) -> dict[str, list[Any]]:
        ours: dict[str, list[Any]] = {**self.dsff, BORN: [born.cpu() for born in self.history.born.values()]}
        return {
            **super().get_checkpoint(),
            **{key: [*values, *[None] * (_LENGTH - len(values))] for key, values in ours.items()},
        }

    def load_checkpoint(self, checkpoint: dict[str, list[Any]]) -> None:
        """The checkpoint may lack our values, or some of them: it may be older, or a stock trainer's."""
        super().load_checkpoint({key: values for key, values in checkpoint.items() if not key.startswith("dsff_")})
        for key in KEYS:
            values = checkpoint.get(key, [])
            logged = [i for i, value in enumerate(values) if value is not None]
            self.dsff[key] = values[: logged[-1] + 1] if logged else []
        self.history.load_born(checkpoint.get(BORN, []))
