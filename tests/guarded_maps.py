"""Maps between pages that cannot be touched, against maps as they lie otherwise; in a process that a stray access ends."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from test_engine import networks_and_inputs
from test_engine_training import as_list, cases, gradients
from torch import Tensor

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine import program, training_program
from nnunetv2_e2enet.engine.arena import Lifetime
from nnunetv2_e2enet.engine.layout import STAGGER, Floats, pages
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.settings import override

PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE
PAIRS = [(kernels, storage) for storage in engine.STORAGES for kernels in engine.KERNELS]
CORES = [pair for pair in PAIRS if not isinstance(engine.load_core(*pair), str)]
Way = tuple[tuple[str, str], int, bool]  # kernels and storage, threads, whether maps lie at the end of their pages
ways = st.tuples(st.sampled_from(CORES), st.sampled_from([1, 3]), st.booleans())
settings = hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)  # a fault comes again


@contextmanager
def guarded(at_end: bool) -> Iterator[None]:
    """Each map has its own pages between two that nobody may touch, and lies at their end or start.

    All memory, that of scratch as well, is not a number until it is written.
    """
    mprotect = ctypes.CDLL(None).mprotect
    untouchable: list[int] = []  # pages of the memory that comes next

    def place_apart(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
        offsets, end = [], 0
        for life in lifetimes:
            untouchable.append(end)
            n_bytes = life.n_bytes - STAGGER
            room = -(-n_bytes // PAGE) * PAGE
            offsets.append(end + PAGE + (room - n_bytes if at_end else 0))
            end += PAGE + room
        untouchable.append(end)
        return offsets, end + PAGE

    def pages_of_nan(floats: int) -> Floats:
        memory = pages(floats)
        memory.view(np.uint8).fill(0xFF)
        for first in untouchable:
            address = memory.ctypes.data + first
            assert mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
        untouchable.clear()
        return memory

    changes = {"place": place_apart, "pages": pages_of_nan}
    with patch.multiple(program, **changes), patch.multiple(training_program, **changes):
        yield


def compare(network: E2ENet, results: Callable[[], list[Tensor]], way: Way) -> None:
    """Compare what the engine computes in guarded memory with the same in its usual memory, bit by bit."""
    (kernels, storage), threads, at_end = way
    torch.set_num_threads(threads)
    found = []
    with override(engine="on", engine_kernels=kernels, engine_storage=storage):
        for memory in (nullcontext(), guarded(at_end)):
            with memory:
                found.append(results())
            assert engine.why_pytorch(network) is None
            engine.release(network)
    for usual, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, usual, rtol=0, atol=0, equal_nan=True)


@settings
@hypothesis.given(networks_and_inputs(), ways)
def predictions(case: tuple[E2ENet, Tensor], way: Way) -> None:
    network, x = case
    with torch.inference_mode():
        compare(network, lambda: as_list(network(x)), way)


@settings
@hypothesis.given(cases(), ways)
def iterations(case: tuple[E2ENet, Tensor], way: Way) -> None:
    network, x = case

    def results() -> list[Tensor]:
        logits, found = gradients(network, x)
        return [*logits, *found.values()]

    compare(network, results, way)


if __name__ == "__main__":
    predictions()
    iterations()
