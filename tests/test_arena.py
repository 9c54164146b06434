"""Memory that maps share: never two of them at the same time, and not more than has to be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine.arena import Lifetime, gaps, most_at_once, place
from nnunetv2_e2enet.engine.prediction import _empty
from nnunetv2_e2enet.evaluation.memory import peak_above_now
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.settings import override

STEPS = 12
lifetimes = st.builds(
    lambda n_bytes, steps: Lifetime(64 * n_bytes, min(steps), max(steps)),
    st.integers(1, 50),
    st.tuples(st.integers(0, STEPS - 1), st.integers(0, STEPS - 1)),
)


@given(st.lists(lifetimes, max_size=20))
def test_what_lives_at_the_same_time_does_not_overlap(lives: list[Lifetime]) -> None:
    offsets, size = place(lives)
    assert (offsets, size) == place(lives)
    for step in range(STEPS):
        alive = sorted(
            (o, o + life.n_bytes) for o, life in zip(offsets, lives, strict=True) if life.first <= step <= life.last
        )
        assert all(end <= begin for (_, end), (begin, _) in pairwise(alive))
        assert all(begin % 64 == 0 and 0 <= begin < end <= size for begin, end in alive)
        assert sum(end - begin for begin, end in alive) <= most_at_once(lives) <= size
    assert size <= sum(life.n_bytes for life in lives)


@given(st.sets(st.integers(0, 39)), st.integers(0, 20))
def test_pieces_and_gaps_make_up_all_bytes_once(cuts: set[int], seed: int) -> None:
    bounds = sorted({0, *cuts, 40})
    pieces = [piece for k, piece in enumerate(pairwise(bounds)) if (seed >> k % 5) & 1]
    found = gaps(reversed(pieces), 40)
    assert sorted(byte for piece in [*pieces, *found] for byte in range(*piece)) == list(range(40))
    assert all(end < begin for (_, end), (begin, _) in pairwise(found))


def test_six_levels_take_little_more_than_the_finest_maps_of_one_node() -> None:
    """The strides and patch of AMOS: two maps of the finest level, the pooled one, and one map or so of every other level.

    As the system sees it: by how much a prediction raises what the process holds, beside its logits.
    """
    if not engine.status().used:
        pytest.skip(engine.status().reason)
    features, patch, classes = [6, 12, 24, 40, 40, 40], (64, 160, 160), 2
    strides = [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4]
    network = E2ENet(1, classes, 6, features, nn.Conv3d, strides, feature_sparsity=0.8).eval()
    x = torch.randn(1, 1, *patch)
    finest, logits = features[0] * x.nbytes, classes * x.nbytes
    with torch.inference_mode(), override(engine="on"):
        network(x[:, :, :32, :32, :32])  # threads, and whatever else a process takes once
        engine.release(network)
        taken = peak_above_now(lambda: network(x))
    assert engine.why_pytorch(network) is None
    assert 2 * finest < taken - logits < 4 * finest  # with weights and what threads compute in


def test_room_for_logits_is_a_tensor_like_any_other() -> None:
    for shape in ((2, 3, 4, 5, 6), (1, 9, 64, 128, 128)):  # 3 kB, and 36 MB, which malloc would give back
        logits = _empty(shape)
        assert logits.shape == shape
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        logits.fill_(1)
        logits[0, 1:].zero_()
        assert logits[0, 0].min() == logits[:, 0].mean() == 1
        assert logits[0, 1:].max() == 0
