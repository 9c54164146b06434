"""Mixin that trains E2ENet with nnU-Net trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_e2enet.errors import E2ENetError, show_message_alone
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.network.blocks import KERNEL_SIZE
from nnunetv2_e2enet.network.e2enet import check_kernel_size, located
from nnunetv2_e2enet.network.learned_shift import hold_whole_offsets
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST
from nnunetv2_e2enet.training.architecture import BASE_NUM_FEATURES, MAX_NUM_FEATURES, e2enet_architecture, is_e2enet
from nnunetv2_e2enet.training.dsff import DSFFMixin
from nnunetv2_e2enet.training.network import one_line_errors

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

WHOLE_SHIFT_FROM = 0.9  # of the epochs, with a learned shift


class E2ENetMixin(DSFFMixin):
    """Trains E2ENet with dynamic sparse feature fusion; to be put before an nnU-Net trainer.

    ``class MyTrainer(E2ENetMixin, nnUNetTrainerDA5): pass`` combines it with another trainer. Any U-Net plans will do: patch,
    strides and dimension come from the plans, channels from the trainer (unless the plans are E2ENet's).
    """

    shift_size = 3  # channel groups of the depth shift, odd; 1 = no shift
    learned_shift = False  # each channel learns how far it moves, in whole slices over the last tenth of the epochs
    kernel_size: Sequence[int] = KERNEL_SIZE  # of all convolutions, depth first
    base_num_features = BASE_NUM_FEATURES  # channels of the finest level
    max_num_features = MAX_NUM_FEATURES
    encoder_class: type[nn.Module] | None = None  # another backbone; None: that of the plans, Encoder by default
    decoder_class: type[nn.Module] | None = None  # another fusion; None: that of the plans, FusionDecoder by default
    channels_last = False  # how maps lie in memory on the device, never what is computed (docs/memory.md)
    recompute = "blocks"  # in the backward pass; "none" is faster, "nodes" takes less memory (docs/memory.md)

    def initialize(self) -> None:
        """As nnU-Net does.

        Raises:
            SystemExit: with one line, where the patch is not divisible by the strides of the network.
        """
        super().initialize()
        with one_line_errors():
            network = cast(E2ENet, self.unwrapped_network)
            network.recompute = self.recompute
            network.check_patch_size(self.configuration_manager.patch_size)

    def _prepare_network(self) -> None:
        network = cast(E2ENet, self.unwrapped_network)
        network.predicts_only = False  # of two levels it has one head, as one that predicts
        super()._prepare_network()
        if self.channels_last:
            network.to(memory_format=CHANNELS_LAST[network.dimension])  # type: ignore[call-overload]

    def network_architecture(self, architecture: dict[str, Any]) -> dict[str, Any]:
        """The entry of the plans for E2ENet with the settings of the trainer."""
        if is_e2enet(architecture) and self._own_channels():
            self.print_to_log_file(
                f"Channels {architecture['arch_kwargs']['features_per_stage']} are those of the plans, which are E2ENet's; "
                f"those of {type(self).__name__} are for other plans"
            )
        check_kernel_size(self.kernel_size)
        form = {"shift_size": self.shift_size, "kernel_size": list(self.kernel_size), "learned_shift": self.learned_shift}
        for name, value in form.items():
            planned = architecture["arch_kwargs"].get(name, value)
            if is_e2enet(architecture) and planned != value:
                self.print_to_log_file(f"{name} is {value}, that of {type(self).__name__}; the plans have {planned}")
        result = e2enet_architecture(
            architecture,
            self.base_num_features,
            self.max_num_features,
            feature_sparsity=self.feature_sparsity,
            **form,
            **self._classes(),
        )
        if len(result["arch_kwargs"]["strides"]) == 2:
            # A network of two levels has one head, and nnU-Net's deep supervision gives the last one no weight.
            self.enable_deep_supervision = False
        return result

    def _own_channels(self) -> bool:
        names = ("base_num_features", "max_num_features")
        return any(getattr(self, name) != getattr(E2ENetMixin, name) for name in names)

    def _classes(self) -> dict[str, str]:
        """Names under which prediction will import the classes that are not E2ENet's own.

        Raises:
            E2ENetError: a class cannot be imported by its name.
        """
        given = {"encoder_class": self.encoder_class, "decoder_class": self.decoder_class}
        classes = {argument: located(argument, cls) for argument, cls in given.items()}
        names = {argument: f"{cls.__module__}.{cls.__qualname__}" for argument, cls in classes.items() if cls is not None}
        for argument, name in names.items():
            located(argument, name)
        return names

    def on_train_epoch_start(self) -> None:
        """As nnU-Net does; learned shifts are whole from the last tenth of the epochs on."""
        super().on_train_epoch_start()
        if self.current_epoch >= int(WHOLE_SHIFT_FROM * self.num_epochs):
            hold_whole_offsets(self.unwrapped_network, self.optimizer)

    def __init_subclass__(cls) -> None:
        """Refuses a trainer whose own network E2ENet would take the place of."""
        super().__init_subclass__()
        for base in cls.__mro__[cls.__mro__.index(E2ENetMixin) + 1 :]:
            if "build_network_architecture" in vars(base) and base.__name__ != "nnUNetTrainer":
                raise E2ENetError(
                    f"{cls.__name__} joins E2ENet with {base.__name__}, which builds a network of its own: choose a trainer "
                    "without build_network_architecture"
                )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,  # noqa: ARG004 (nnU-Net's signature)
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """E2ENet for a configuration; one of other plans is built with E2ENet's defaults."""
        show_message_alone()  # where nnU-Net's commands build a network to predict
        architecture = e2enet_architecture(configuration_manager.configuration["architecture"])
        network: E2ENet = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )
        if not enable_deep_supervision:  # to predict
            from nnunetv2_e2enet.prediction import install

            install()
            network.predicts_only = True
        return network
