"""Memory that maps share: never two of them at the same time, and not more than has to be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnunetv2_e2enet.engine.arena import Lifetime, most_at_once, place
from nnunetv2_e2enet.engine.core import Core, load_core
from nnunetv2_e2enet.engine.description import describe
from nnunetv2_e2enet.engine.program import Program
from nnunetv2_e2enet.engine.weights import pack
from nnunetv2_e2enet.network import E2ENet

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


def test_six_levels_take_little_more_than_the_finest_maps_of_one_node() -> None:
    """The strides and patch of AMOS: two maps of the finest level, the pooled one, and one map or so of every other level."""
    core = load_core()
    if not isinstance(core, Core):
        pytest.skip(core)
    features, patch = [6, 12, 24, 40, 40, 40], (64, 160, 160)
    network = E2ENet(1, 2, 6, features, nn.Conv3d, [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4], feature_sparsity=0.8)
    finest = features[0] * patch[0] * patch[1] * patch[2] * core.pixel_bytes
    assert Program(pack(describe(network.eval())), patch, core).n_bytes < 3.5 * finest
