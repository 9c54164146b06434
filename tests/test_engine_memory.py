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
from nnunetv2_e2enet.engine import automatic
from nnunetv2_e2enet.engine.automatic import session_of
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

# Runs the jobs of one patch with an allocation that fails, a later one each time, until none does.
PREDICTION = """
import ctypes, sys
import torch
from torch import nn
from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine.description import describe
from nnunetv2_e2enet.engine.program import Program
from nnunetv2_e2enet.engine.weights import pack
from nnunetv2_e2enet.network import E2ENet

strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
torch.manual_seed(0)
network = E2ENet(1, 3, 3, [8, 12, 16], nn.Conv3d, strides).eval()
program = Program(pack(describe(network)), [8, 32, 32], engine.load_core())
x, threads = torch.randn(1, 8, 32, 32), int(sys.argv[1])
expected, logits = torch.empty(3, 8, 32, 32), torch.empty(3, 8, 32, 32)
program.run(x, [expected], threads)
fail_after = ctypes.CDLL(None).fail_after
errors, allocations = 0, 0
while True:
    fail_after(ctypes.c_long(allocations))
    try:
        program.run(x, [logits], threads)
    except MemoryError:
        errors += 1
    else:
        break
    finally:
        fail_after(ctypes.c_long(-1))
    allocations += 1 + allocations // 8
program.run(x, [logits], threads)
assert torch.equal(logits, expected)
print(errors)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux")
@pytest.mark.parametrize("threads", [1, 3])
def test_no_memory_in_a_parallel_region_is_a_memory_error(tmp_path: Path, threads: int) -> None:
    source, library = tmp_path / "allocator.cpp", tmp_path / "allocator.so"
    source.write_text(ALLOCATOR)
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", str(source), "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", PREDICTION, str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


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
    monkeypatch.setattr(automatic, "IDLE_BYTES", 1)
    assert kept_after_all() == patches[2:]
