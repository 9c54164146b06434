"""Where the engine steps in and where PyTorch computes: settings, other configurations, hooks, a missing core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import pytest
import torch
from networks import assert_same_logits, make_network, needs_core, uses_engine
from support import run_python
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine.core import load_core
from nnunetv2_e2enet.engine.prediction import TOLERANCES
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.network.blocks import BlockStyle
from nnunetv2_e2enet.network.connections import MaskedConv3d, MaskedConvTranspose3d
from nnunetv2_e2enet.network.fusion import FusionNode
from nnunetv2_e2enet.settings import Settings, override, variable
from nnunetv2_e2enet.settings import settings as current_settings


@pytest.fixture(scope="module", autouse=True)
def on_small_networks_too() -> Iterator[None]:
    with override(engine="on"):
        yield


def test_gradients_in_eval_mode_and_training_mode_without_gradients_never_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):  # noqa: N818
        """The engine was."""

    def asked(*_: object) -> None:
        raise Asked

    for name in ("train", "predict"):
        monkeypatch.setattr(engine, name, asked)
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    network(x).sum().backward()
    assert network.decoder.seg_layers[-1].weight.grad is not None
    with torch.no_grad(), pytest.raises(Asked):
        network(x)
    network.train()
    with torch.no_grad():
        network(x)
    with pytest.raises(Asked):
        network(x)


@needs_core
def test_off_switch(setting: Callable[..., None]) -> None:
    setting(engine="off")
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    assert not uses_engine(network, x)
    assert "off" in str(engine.why_pytorch(network))
    assert not engine.status().used


def test_unknown_settings_are_errors() -> None:
    wrong = {"engine": "perhaps", "engine_kernels": "mmx", "engine_storage": "bfloat16", "kernels": "yes"}
    for name, value in wrong.items():
        assert Settings.from_environment({variable(name): ""}) == Settings()
        with pytest.raises(E2ENetError, match=f"nnUNet_e2enet_{name} is '{value}': use one of "):
            Settings.from_environment({variable(name): value})
        with pytest.raises(E2ENetError, match=value), override(**{name: value}):
            pass
    with pytest.raises(E2ENetError, match="use one of float32, float16"):
        load_core(storage="bfloat16")
    given = {"nnUNet_e2enet_engine": "0", "nnUNet_e2enet_engine_storage": "float16"}
    assert Settings.from_environment(given) == Settings(engine="off", engine_storage="float16")


def test_switches_are_also_numbers_and_truth_values() -> None:
    for name in ("engine", "kernels", "plane_convolutions", "predictor"):
        for value, meaning in {"0": "off", "False": "off", "1": "on", "TRUE": "on", "Off": "off"}.items():
            assert getattr(Settings.from_environment({variable(name): value}), name) == meaning


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = current_settings()
    monkeypatch.setenv(engine.ENGINE_VARIABLE, "perhaps")
    assert current_settings() is before
    with override(engine="off") as changed:
        assert current_settings() is changed == replace(before, engine="off")
    assert current_settings() is before


@needs_core
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"norm_op": nn.BatchNorm3d}, "BatchNorm3d"),
        ({"norm_op_kwargs": {"affine": True, "track_running_stats": True}}, "running statistics"),
        ({"nonlin": nn.ReLU, "nonlin_kwargs": {}}, "ReLU"),
        ({"nonlin_kwargs": {"negative_slope": 1.5}}, "LeakyReLU"),
        ({"kernel_size": (3, 3, 3), "shift_size": 1}, "kernel (3, 3, 3)"),
        ({"kernel_size": (3, 1, 3)}, "kernel (3, 1, 3)"),
        ({"kernel_size": (1, 3, 5)}, "kernel (1, 3, 5)"),
    ],
)
def test_other_configurations_stay_with_pytorch(settings: dict[str, object], reason: str) -> None:
    network = make_network(**settings)
    assert not uses_engine(network, torch.randn(1, 1, 8, 32, 32))
    assert reason in str(engine.why_pytorch(network))
    assert engine.why_not_predicted(network, (1, 1, 8, 32, 32)) is not None


@needs_core
@pytest.mark.parametrize("settings", [{"norm_op_kwargs": {"affine": False}}, {"dropout_op": nn.Dropout3d}])
def test_configurations_that_change_nothing_in_eval_mode(settings: dict[str, object]) -> None:
    assert_same_logits(make_network(**settings), torch.randn(1, 1, 8, 32, 32))


@needs_core
def test_hooks_and_double_precision_stay_with_pytorch() -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    handle = network.encoder.register_forward_hook(lambda *_: None)
    assert not uses_engine(network, x)
    handle.remove()
    assert uses_engine(network, x)
    handle = network.decoder.register_forward_pre_hook(lambda *_: None)
    assert not uses_engine(network, x)
    handle.remove()
    assert not uses_engine(network.double(), x.double())


def doubled(module: nn.Module) -> None:
    """Replace the forward of this one module, as accelerate's hooks do."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


@needs_core
@pytest.mark.parametrize("training", [False, True])
def test_a_module_with_a_forward_of_its_own_stays_with_pytorch(training: bool) -> None:
    network, x = make_network().train(training), torch.randn(1, 1, 4, 16, 16)
    with torch.set_grad_enabled(training):
        before = network(x)
        assert engine.why_pytorch(network) is None
        doubled(network.decoder.seg_layers[-1])
        torch.testing.assert_close(network(x), 2 * before, atol=1e-3, rtol=1e-3)
        assert engine.why_pytorch(network) == "decoder.seg_layers.0 has a forward of its own, which would not be called"


@needs_core
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("part", ["decoder.seg_layers.0", "encoder.stages.0.0.conv", "encoder.stages.1.0.norm"])
def test_weights_that_are_no_parameters_stay_with_pytorch(training: bool, kind: str, part: str) -> None:
    """As frozen ones, and those that another network makes: their changes are seen."""
    network, x = make_network().train(training), torch.randn(1, 1, 4, 16, 16)
    module = network.get_submodule(part)
    weight = module.weight.detach().clone()
    del module.weight
    if kind == "buffer":
        module.register_buffer("weight", weight)
    else:
        module.weight = weight
    with torch.set_grad_enabled(training):
        network(x)
        weight += torch.randn_like(weight)
        found = network(x)
        assert engine.why_pytorch(network) == f"{part}.weight is no parameter, and a change of it would not be seen"
        with engine.disabled():
            torch.testing.assert_close(found, network(x))
        if training:
            found[0].sum().backward()


@needs_core
def test_a_network_whose_own_forward_is_wrapped_uses_the_engine(setting: Callable[..., None]) -> None:
    setting(engine="check")
    network, x = make_network(), torch.randn(1, 1, 4, 16, 16)
    with torch.inference_mode():
        before = network(x)
        doubled(network)
        engine.release(network)
        assert torch.equal(network(x), 2 * before)
    assert engine.why_pytorch(network) is None


ON_TWO_DEVICES = """
import torch
from torch import nn
from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet

x = torch.randn(1, 1, 4, 16, 16)
for predicts_before in (False, True):
    network = E2ENet(1, 3, 2, [8, 12], nn.Conv3d, [[1, 1, 1], [1, 2, 2]]).eval()
    with torch.inference_mode():
        if predicts_before:
            network(x)
        try:
            network.to("meta")(x)
        except RuntimeError as error:
            print("meta" in str(error), engine.why_pytorch(network))
"""


@needs_core
def test_a_network_on_another_device_than_its_input_is_an_error_as_in_pytorch() -> None:
    """In a process of its own, which would end if the engine read at an address of the other device."""
    found = run_python(ON_TWO_DEVICES, {engine.ENGINE_VARIABLE: "on"})
    assert found.returncode == 0, found.stderr
    assert found.stdout == 2 * "True encoder.stages.0.0.conv.weight is not an ordinary tensor on the CPU\n"


def test_one_voxel_is_an_error_as_in_pytorch() -> None:
    network, x = make_network(), torch.randn(1, 1, 2, 4, 4)
    with torch.inference_mode(), pytest.raises(ValueError, match="more than 1 spatial element"):
        network(x)


@needs_core
@pytest.mark.parametrize("training", [False, True])
def test_a_node_of_other_flows_stays_with_pytorch(training: bool) -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    nodes = cast(nn.ModuleList, network.decoder.stages[0])
    style = BlockStyle(3, network.shift_size)
    sizes = {"stage": 1, "level": 1, "features_per_stage": [5, 8, 11], "strides": network.encoder.strides}
    nodes[1] = FusionNode(**sizes, flows=["forward", "upward"], n_blocks=2, style=style)
    network.train(training)
    with torch.set_grad_enabled(training):
        logits = network(x)
        assert "a fusion node of level 1 fuses the flows forward, upward alone" in str(engine.why_pytorch(network))
        with engine.disabled():
            assert torch.equal(logits, network(x))


def conv_of(inputs: int, outputs: int) -> MaskedConv3d:
    return MaskedConv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1))


def upsample_of(inputs: int, outputs: int, *stride: int, **settings: object) -> MaskedConvTranspose3d:
    return MaskedConvTranspose3d(inputs, outputs, stride, stride, bias=False, **settings)


def outcome(network: E2ENet, x: Tensor) -> object:
    """The logits, or the error."""
    try:
        logits = network(x)
        return [level.tolist() for level in (logits if isinstance(logits, list) else [logits])]
    except (IndexError, RuntimeError, ValueError) as error:
        return repr(error)


@needs_core
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("encoder.stages.0.0", "conv", conv_of(400, 5)),
        ("encoder.stages.0.1", "conv", conv_of(4, 5)),
        ("encoder.stages.0.1", "conv", conv_of(5, 4)),
        ("encoder.stages.0.1.conv", "in_channels", 4),
        ("encoder.stages.0.0", "norm", nn.InstanceNorm3d(2, affine=True)),
        ("encoder.stages.0.0.norm", "bias", nn.Parameter(torch.ones(2))),
        ("encoder.stages.1.0.conv", "stride", (1, 1, 1)),
        ("encoder.stages.1.1.conv", "stride", (1, 2, 2)),
        ("encoder", "strides", [[1, 1, 1], [1, 1, 1], [2, 2, 2]]),
        ("encoder", "strides", [[1, 1, 1], [1, 2, 2]]),
        ("encoder.stages", "1", nn.Sequential()),
        ("decoder.stages.0.0", "upsample", upsample_of(9, 5, 1, 2, 2)),
        ("decoder.stages.0.0", "upsample", upsample_of(8, 4, 1, 2, 2)),
        ("decoder.stages.0.0", "upsample", upsample_of(8, 5, 2, 2, 2)),
        ("decoder.stages.0.0", "upsample", upsample_of(8, 5, 1, 2, 2, output_padding=(0, 1, 1))),
        ("decoder.stages.0.0", "upsample", upsample_of(8, 5, 1, 2, 2, dilation=(1, 2, 2))),
        ("decoder.stages.0.0", "upsample", upsample_of(8, 10, 1, 2, 2, groups=2)),
        ("decoder.stages.0.1", "downsample", nn.MaxPool3d((2, 2, 1))),
        ("decoder.stages.0.1", "downsample", None),
        ("decoder.stages.0.1.blocks.0", "conv", conv_of(20, 8)),
        ("decoder.stages.0.1.blocks.0.conv", "stride", (1, 2, 2)),
        ("decoder.stages.0.1.blocks.0.conv", "mask", torch.ones(8, 1, dtype=torch.bool)),
        ("decoder.stages.0.0.upsample", "mask", torch.ones(1, 5, dtype=torch.bool)),
        ("decoder.stages", "1", nn.ModuleList()),
        ("decoder.seg_layers", "0", nn.Conv3d(9, 3, 1)),
        ("decoder.seg_layers.0", "bias", nn.Parameter(torch.ones(2))),
    ],
)
def test_layers_that_do_not_fit_each_other_stay_with_pytorch(where: str, name: str, value: object, training: bool) -> None:
    network, x = make_network().train(training), torch.randn(1, 1, 4, 16, 16)
    setattr(network.get_submodule(where), name, value)
    reason = (engine.why_not_trained if training else engine.why_not_predicted)(network, x.shape)
    assert reason is not None
    with torch.set_grad_enabled(training):
        found = outcome(network, x)
        assert engine.why_pytorch(network) == reason
        with engine.disabled():
            assert found == outcome(network, x)


@needs_core
@pytest.mark.parametrize("training", [False, True])
def test_strides_and_channels_that_change_between_passes_are_noticed(training: bool) -> None:
    network = make_network([[1, 1, 1], *[[1, 2, 2]] * 3], deep_supervision=True).train(training)
    x = torch.randn(1, 1, 4, 32, 32)
    with torch.set_grad_enabled(training):
        network(x)
        assert engine.why_pytorch(network) is None
        network.encoder.strides[1][1] = 1
        found = outcome(network, x)
        assert "does not fit" in str(engine.why_pytorch(network))
        with engine.disabled():
            assert found == outcome(network, x)
        network.encoder.strides[1][1] = 2
        network(x)
        assert engine.why_pytorch(network) is None
        network.input_channels = 2
        assert "expected input[1, 2, 4, 32, 32] to have 1 channels" in str(outcome(network, torch.cat([x, x], 1)))


@needs_core
def test_tangents_are_pytorchs() -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    with torch.no_grad(), forward_ad.dual_level():
        tangents = []
        for mode in (nullcontext(), engine.disabled()):
            with mode:
                tangents.append(forward_ad.unpack_dual(network(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    assert tangents[1] is not None
    assert torch.equal(tangents[0], tangents[1])


@needs_core
def test_counters_see_pytorchs_operations() -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() > 0


@needs_core
@pytest.mark.parametrize("storage", engine.STORAGES)
def test_check_mode_compares_the_first_patch(
    storage: str, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting(engine="check", engine_storage=storage)
    network, x = make_network(deep_supervision=True), torch.randn(1, 1, 8, 32, 32)
    assert uses_engine(network, x)
    calls, tolerance = [], TOLERANCES[storage]
    honest = E2ENet.forward

    def wrong(self: E2ENet, x: Tensor) -> list[Tensor]:
        calls.append(x)
        return [level + 3 * tolerance * level.abs().max() for level in honest(self, x)]

    network = make_network(deep_supervision=True)
    monkeypatch.setattr(E2ENet, "forward", wrong)
    with torch.inference_mode(), pytest.raises(E2ENetError, match="differ from PyTorch"):
        engine.predict(network, x)
    assert len(calls) == 1


def test_without_a_compiled_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_e2enet.engine.support.load_core", lambda *_: "the compiled core was not built")
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    assert not uses_engine(network, x)
    with torch.inference_mode():
        logits = network(x)
        with engine.disabled():
            assert torch.equal(logits, network(x))


@needs_core
def test_small_networks_are_left_to_pytorch_unless_asked_for(setting: Callable[..., None]) -> None:
    setting(engine="auto")
    small, large = make_network(), make_network(features=[32, 64, 64])
    with torch.inference_mode():
        small(torch.zeros(1, 1, 4, 16, 16))
        large(torch.zeros(1, 1, 8, 64, 64))
    assert "the network is small" in str(engine.why_pytorch(small))
    assert engine.why_pytorch(large) is None
