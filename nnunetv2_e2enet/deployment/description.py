"""Description of a trained model without its weights, checked before use.

nnU-Net's plans name Python classes and functions, which nnU-Net calls. A name in a file from elsewhere must not lead to other
code, so each name has to be that of a class or function of nnU-Net of the right kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from inspect import isabstract, isclass, isfunction
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.registration import find_in_nnunet
from nnunetv2_e2enet.training.architecture import is_e2enet

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

MOST_LAYERS = 32  # levels, and convolutions in a level
MOST_VOXELS = 2**31  # in a patch

_MODULES = {
    name: module
    for module in (
        *(nn.Conv2d, nn.Conv3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.LeakyReLU, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU),
    )
    for name in (f"torch.nn.{module.__name__}", f"{module.__module__}.{module.__name__}")
}
_UNUSABLE = (AttributeError, AssertionError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Description:
    """A trained model without its weights; plain data.

    Attributes:
        plans, dataset: content of the model folder's ``plans.json`` and ``dataset.json``.
        configuration, trainer: nnU-Net's names.
        folds: names of the folds.
        checkpoint: file of each fold that the weights come from.
        mirroring_axes: spatial axes that prediction may mirror; None where the training did not mirror.
        postprocessing: labels of which the largest component alone is kept, one list a step.
        written_by: name and version of what wrote it.
    """

    plans: dict[str, Any]
    dataset: dict[str, Any]
    configuration: str
    trainer: str
    folds: list[str]
    checkpoint: str
    mirroring_axes: list[int] | None = None
    postprocessing: list[list[int]] = field(default_factory=list)
    written_by: str = ""

    @classmethod
    def from_json(cls, content: Any) -> Description:
        """The description in ``content``, checked.

        Raises:
            E2ENetError: the content is no description.
        """
        names = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise E2ENetError(f"the description of the model has not the entries {', '.join(sorted(names))}")
        description = cls(**content)
        description.check()
        return description

    @property
    def channel_names(self) -> dict[str, Any]:
        """The channels of an image by number, in this order, under either name that nnU-Net has for them in ``dataset.json``.

        Raises:
            E2ENetError: the numbers are others than those of image files.
        """
        names = {str(number): name for number, name in (self.dataset.get("channel_names") or self.dataset["modality"]).items()}
        numbers = [str(number) for number in range(len(names))]
        if set(names) != set(numbers):
            raise E2ENetError(
                f"dataset.json numbers its channels {', '.join(names)}: expected {', '.join(numbers)}, as image files are "
                "numbered; write these numbers into it, and export the model again"
            )
        return {number: names[number] for number in numbers}

    def as_json(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    def check(self) -> None:
        """Raises E2ENetError if prediction would fail or call code outside nnU-Net."""
        with _one_line("the description of the model"):
            _check_types(self)
            if not self.channel_names:
                raise ValueError("there are no channels")
            plans, settings = self.managers()
            _check_names(plans, settings)
            if not re.fullmatch(r"(\.\w+)+", self.dataset["file_ending"]):  # it becomes part of paths
                raise ValueError(f"the file ending is {self.dataset['file_ending']!r}")
            _check_numbers(self, plans, settings)
            network = self.network()
            with torch.no_grad():
                network(torch.empty((1, network.input_channels, *settings.patch_size), device="meta"))

    def managers(self) -> tuple[PlansManager, ConfigurationManager]:
        """nnU-Net's view of the plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans = PlansManager(self.plans)
        return plans, plans.get_configuration(self.configuration)

    def network(self) -> E2ENet:
        """The network, on the meta device, in evaluation mode.

        Raises:
            E2ENetError: the plans are not of an E2ENet, or cannot be used.
        """
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        with _one_line("the network in the plans"):
            plans, settings = self.managers()
            architecture = settings.configuration["architecture"]
            if not is_e2enet(architecture):
                raise E2ENetError(
                    f"{self.trainer} trained {architecture['network_class_name']}, but only E2ENet can be exported: for "
                    "other networks there is nnUNetv2_export_model_to_zip"
                )
            arguments = dict(architecture["arch_kwargs"])
            own = [arguments[name] for name in ("encoder_class", "decoder_class") if arguments.get(name)]
            if own:
                raise E2ENetError(
                    f"{self.trainer} trained {' and '.join(map(str, own))}, but exported models hold E2ENet's own encoder and "
                    "decoder only, as opening a model imports nothing that its file names: for others there is "
                    "nnUNetv2_export_model_to_zip"
                )
            for name in architecture["_kw_requires_import"]:
                arguments[name] = None if arguments[name] is None else _MODULES[arguments[name]]
            layers = [arguments["n_stages"], *_listed(arguments["n_conv_per_stage"])]
            if not all(type(n) is int and 1 <= n <= MOST_LAYERS for n in layers):
                raise ValueError(f"levels and convolutions in them are {layers}")
            channels = determine_num_input_channels(plans, settings, self.dataset)
            heads = plans.get_label_manager(self.dataset).num_segmentation_heads
            with torch.device("meta"):
                return E2ENet(channels, heads, **{**arguments, "deep_supervision": False}).eval()


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns errors of nnU-Net and torch about malformed plans into an E2ENetError."""
    try:
        yield
    except E2ENetError:
        raise
    except _UNUSABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise E2ENetError(f"{what} cannot be used ({reason[:200]}): expected plans of E2ENet as nnU-Net wrote them") from error


def _check_types(description: Description) -> None:
    texts = (description.configuration, description.trainer, description.checkpoint, description.written_by)
    numbers = [*(description.mirroring_axes or ()), *(label for step in description.postprocessing for label in step)]
    ok = all(isinstance(mapping, dict) for mapping in (description.plans, description.dataset))
    ok &= all(isinstance(text, str) for text in texts)
    ok &= all(type(number) is int for number in numbers)
    folds = description.folds
    ok &= bool(folds) and all(re.fullmatch(r"\w+", fold) for fold in folds) and len(set(folds)) == len(folds)
    if not ok:
        raise TypeError("an entry is of another type")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_names(plans: PlansManager, settings: ConfigurationManager) -> None:
    """Every name in the plans leads to a class or function of nnU-Net's of the right kind."""
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    schemes = [find_in_nnunet("preprocessing.normalization", name) for name in settings.normalization_schemes]
    classes: list[tuple[Any, type]] = [
        (plans.image_reader_writer_class, BaseReaderWriter),
        (plans.label_manager_class, LabelManager),
        (settings.preprocessor_class, DefaultPreprocessor),
        *((scheme, ImageNormalization) for scheme in schemes),
    ]
    for found, base in classes:
        if not isclass(found) or not issubclass(found, base) or isabstract(found):
            raise TypeError(f"{found} is no {base.__name__}")
    for resampling in (settings.resampling_fn_data, settings.resampling_fn_seg, settings.resampling_fn_probabilities):
        function: Any = getattr(resampling, "func", None)
        if not isfunction(function) or not function.__module__.startswith("nnunetv2.preprocessing.resampling."):
            raise TypeError(f"{function} does not resample")


def _check_numbers(description: Description, plans: PlansManager, settings: ConfigurationManager) -> None:
    patch, spacing, axes = settings.patch_size, settings.spacing, description.mirroring_axes
    dimension = len(patch)
    if not all(type(n) is int and n > 0 for n in patch) or prod(patch) > MOST_VOXELS:
        raise ValueError(f"the patch is {patch}")
    if len(spacing) != dimension or not all(isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"the spacing is {spacing}")
    for order in (plans.transpose_forward, plans.transpose_backward):
        if sorted(order) != list(range(3)):
            raise ValueError(f"the order of axes is {order}")
    if axes is not None and (not axes or len(set(axes)) < len(axes) or not set(axes) <= set(range(dimension))):
        raise ValueError(f"the mirroring axes are {axes}")
    if not isinstance(plans.foreground_intensity_properties_per_channel, Mapping):
        raise TypeError("there are no intensity properties")
