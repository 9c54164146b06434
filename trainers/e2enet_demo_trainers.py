"""The trainings of `make demo`, about a minute each, and a smoke test of seconds: does everything run on these data?"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet
from nnunetv2_e2enet.training.timed import TimedMixin
from nnunetv2_e2enet.training.variants import variant


class DemoMixin(TimedMixin):
    """A timed training without nnU-Net's validation of whole cases at its end: the demo predicts held-out cases instead."""

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predicts nothing."""


def _demo(base: type) -> type:
    return type(base.__name__, (DemoMixin, base), {})


_DEMO = {"num_epochs": 10, "num_val_iterations_per_epoch": 2}
SMOKE = {"num_epochs": 3, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}

# The same seconds for both networks, however many iterations of nnU-Net's these are.
nnUNetTrainer_demo = variant(_demo(nnUNetTrainer), "demo", **_DEMO, as_long_as="nnUNetTrainerE2ENet_demo")
nnUNetTrainer_smoke = variant(nnUNetTrainer, "smoke", **SMOKE)
# Small initial weights learn faster in so short a training (docs/experiments.md, "The start of a training").
nnUNetTrainerE2ENet_demo = variant(
    _demo(nnUNetTrainerE2ENet),
    "demo",
    **_DEMO,
    num_iterations_per_epoch=40,
    topology_update_period=2,
    initial_gain=0.25,
    base_num_features=16,
    max_num_features=128,
)
nnUNetTrainerE2ENet_smoke = variant(
    nnUNetTrainerE2ENet, "smoke", **SMOKE, topology_update_period=1, base_num_features=8, max_num_features=32
)

__all__ = [
    "nnUNetTrainerE2ENet_demo",
    "nnUNetTrainerE2ENet_smoke",
    "nnUNetTrainer_demo",
    "nnUNetTrainer_smoke",
]
