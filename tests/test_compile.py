"""nnU-Net trains compiled networks on CUDA: the network must be one graph, and a topology update must not compile another."""

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from support import Project, make
from torch import nn
from torch._dynamo.testing import CompileCounter

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.dsff import CosineSchedule, GradientGrowth, RandomGrowth, TopologyUpdater
from nnunetv2_e2enet.network import E2ENet, maskable_layers, store_active_only
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke


@pytest.mark.parametrize(
    ("growth", "dimension", "memory_format"),
    [
        *[(growth, dimension, torch.preserve_format) for growth in (RandomGrowth(), GradientGrowth()) for dimension in (2, 3)],
        (RandomGrowth(), 3, torch.channels_last_3d),
    ],
)
def test_topology_updates_compile_nothing(
    growth: RandomGrowth | GradientGrowth, dimension: int, memory_format: torch.memory_format
) -> None:
    torch._dynamo.reset()
    conv = nn.Conv3d if dimension == 3 else nn.Conv2d
    strides = [[1] * dimension] + [[2] * dimension] * 2
    network = E2ENet(1, 2, 3, [4, 8, 8], conv, strides, deep_supervision=True).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    updater = TopologyUpdater(network, CosineSchedule(10, 1), growth=growth)
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    x = torch.randn(1, 1, *[8] * dimension)
    for epoch in range(4):
        optimizer.zero_grad()
        outputs = compiled(x)
        sum(output.square().mean() for output in outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        with updater.observation(), engine.disabled():  # of the network itself, as the trainer does
            sum(output.square().mean() for output in network(x)).backward()
        update = updater.update(epoch + 1, optimizer)
        assert update is not None
        assert update.replaced > 0
    assert counter.frame_count == 1
    network.eval()
    with torch.no_grad(), engine.disabled():
        compiled_outputs, outputs = compiled(x), network(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled_outputs, outputs, strict=True))


@pytest.mark.usefixtures("fused_kernels")
@pytest.mark.parametrize("active_only", [False, True])
def test_topology_updates_compile_nothing_where_the_kernels_compute(active_only: bool) -> None:
    """Of single connections and of stored active blocks, whose indices change with each update; loading weights too."""
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = E2ENet(1, 2, 2, [4, 6], nn.Conv2d, [[1, 1], [2, 2]], deep_supervision=True, feature_sparsity=0.5).to(device)
    for _, layer in maskable_layers(network) if active_only else ():
        layer.share_inputs(2, equal_blocks=True)
        layer.set_random_topology(layer.connections_at(0.5))
        store_active_only(layer)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    updater = TopologyUpdater(network, CosineSchedule(10, 1))
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    x = torch.randn(1, 1, 4, 4, device=device)
    for epoch in range(3):
        optimizer.zero_grad()
        sum(output.square().mean() for output in compiled(x)).backward()
        optimizer.step()
        update = updater.update(epoch + 1, optimizer)
        assert update is not None
        assert update.replaced > 0
    network.load_state_dict(network.state_dict())
    found, expected = compiled(x), network(x)
    assert counter.frame_count == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert counter.op_count > 0


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_network_on_several_gpus_stays_whole_and_keeps_its_memory_format(
    in_process: Project, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DistributedDataParallel's splits of a graph fail with checkpoints in PyTorch 2.11."""
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.is_ddp = True
    monkeypatch.setattr(trainer, "_do_i_compile", lambda: compiled)

    def stop(_: nnUNetTrainer) -> None:  # before nnU-Net wraps the network, which needs a GPU
        raise InterruptedError

    monkeypatch.setattr(nnUNetTrainer, "initialize", stop)
    with torch._dynamo.config.patch(optimize_ddp=True), torch._inductor.config.patch(layout_optimization=True):
        with pytest.raises(InterruptedError):
            trainer.initialize()
        assert torch._dynamo.config.optimize_ddp is not compiled
        assert torch._inductor.config.layout_optimization is not compiled
