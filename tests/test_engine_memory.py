"""The CPU engine where memory is short: what it keeps, and what is raised when there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine import prediction
from nnunetv2_e2enet.engine.prediction import session_of
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.settings import override

pytestmark = pytest.mark.skipif(isinstance(engine.load_core(), str), reason="the compiled core was not built")

ALLOCATOR = """
#include <atomic>
#include <cstdlib>
#include <new>
static std::atomic<long> left{-1};
extern "C" void fail_after(long allocations) { left = allocations; }
void* operator new(std::size_t n) {
    if (left >= 0 && left-- == 0) throw std::bad_alloc();
    if (void* memory = std::malloc(n)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
"""

# Attempts something with an allocation that fails, a later one each time, until none does.
ATTEMPTS = """
import ctypes, sys
import torch
from torch import nn
from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine.description import describe
from nnunetv2_e2enet.engine.program import Program
from nnunetv2_e2enet.engine.training_program import TrainingProgram
from nnunetv2_e2enet.engine.training_weights import TrainingWeights
from nnunetv2_e2enet.engine.weights import pack
from nnunetv2_e2enet.network import E2ENet

strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
torch.manual_seed(0)
network = E2ENet(1, 3, 3, [8, 12, 16], nn.Conv3d, strides, deep_supervision=True)
x, threads, core = torch.randn(1, 8, 32, 32), int(sys.argv[1]), engine.load_core("generic")
{definitions}
fail_after = ctypes.CDLL(None).fail_after
before()
expected = [tensor.clone() for tensor in attempt()]
errors, allocations = 0, 0
while True:
    before()
    fail_after(ctypes.c_long(allocations))
    try:
        attempt()
    except MemoryError:
        errors += 1
    else:
        break
    finally:
        fail_after(ctypes.c_long(-1))
    allocations += 1 + allocations // 8
before()
assert all(torch.equal(a, b) for a, b in zip(attempt(), expected, strict=True))
print(errors)
"""
PREDICTION = """
program, logits = Program(pack(describe(network.eval())), [8, 32, 32], core), torch.empty(3, 8, 32, 32)

def before():
    logits.zero_()

def attempt():
    program.run(x, [logits], threads)
    return [logits]
"""
BACKWARD = """
weights = TrainingWeights(network.train(), core)
program = TrainingProgram(weights, [8, 32, 32])
logits = [torch.randn(3, 8, 32, 32)]
parameters = list(network.parameters())
gradients = [torch.zeros_like(parameter) for parameter in parameters]

def before():
    weights.refresh(parameters, threads)
    program.run(x, [torch.empty(3, 8, 32, 32)], threads)
    weights.refresh(parameters, threads, backward=True)
    for gradient in gradients:
        gradient.zero_()

def attempt():
    program.run_backward(logits, gradients, threads)
    return gradients
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("definitions", [PREDICTION, BACKWARD], ids=["prediction", "backward"])
def test_no_memory_in_a_parallel_region_is_a_memory_error(tmp_path: Path, definitions: str, threads: int) -> None:
    source, library = tmp_path / "allocator.cpp", tmp_path / "allocator.so"
    source.write_text(ALLOCATOR)
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", str(source), "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS.format(definitions=definitions), str(threads)],
        env=environment,
        cwd=tmp_path,  # not the repository, whose package has no compiled core where a wheel is installed
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_kernels_stay_within_the_room_of_their_maps() -> None:
    """Over random networks, in prediction and in training, with every kind of kernel."""
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("guarded_maps.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


def test_programs_that_wait_for_their_patch_size_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    network = E2ENet(1, 3, 2, [8, 12], nn.Conv3d, [[1, 1, 1], [1, 2, 2]]).eval()
    patches = [(4, 16, 16), (4, 32, 32), (4, 24, 24)]

    def kept_after_all() -> list[tuple[int, ...]]:
        engine.release(network)
        with override(engine="on"), torch.inference_mode():
            for patch in patches:
                network(torch.randn(1, 1, *patch))
        return [program.patch_size for program in session_of(network).idle_programs()]

    assert kept_after_all() == patches[1:]
    monkeypatch.setattr(prediction, "IDLE_BYTES", 1)
    assert kept_after_all() == patches[2:]
