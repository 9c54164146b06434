import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.depth_shift import check_shift_size, depth_shift, shift_groups

ODD = st.sampled_from([1, 3, 5, 7])


def shifted_by_definition(x: Tensor, shift_size: int) -> Tensor:
    """Voxel by voxel from the definition: out[:, :, d] = in[:, :, d - t], zeros from outside."""
    if x.shape[1] < shift_size:
        return x.clone()
    out = torch.zeros_like(x)
    for index, group in enumerate(torch.tensor_split(torch.arange(x.shape[1]), shift_size)):
        t = index - shift_size // 2
        for d in range(x.shape[2]):
            if 0 <= d - t < x.shape[2]:
                out[:, group, d] = x[:, group, d - t]
    return out


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 6), ODD, st.integers(0, 2**31))
def test_equals_the_definition_on_the_concatenation(widths: list[int], depth: int, shift_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, width, depth, 2, 3, generator=generator) for width in widths]
    expected = shifted_by_definition(torch.cat(maps, 1), shift_size)
    assert torch.equal(depth_shift(maps, shift_size), expected)
    with_grad = [m.clone().requires_grad_() for m in maps]
    assert torch.equal(depth_shift(with_grad, shift_size), expected)


@given(st.integers(1, 20), ODD)
def test_groups_are_those_of_tensor_split(channels: int, shift_size: int) -> None:
    groups = shift_groups(channels, shift_size)
    if channels < shift_size:
        assert groups == [(slice(0, channels), 0)]
        return
    expected = torch.tensor_split(torch.arange(channels), shift_size)
    assert [torch.arange(channels)[group].tolist() for group, _ in groups] == [e.tolist() for e in expected]
    assert [offset for _, offset in groups] == list(range(-(shift_size // 2), shift_size // 2 + 1))


@pytest.mark.parametrize("shift_size", [1, 3, 5])
def test_gradient_equals_autograd_of_the_definition(shift_size: int) -> None:
    maps = [torch.randn(1, c, 4, 2, 2, dtype=torch.float64, requires_grad=True) for c in (3, 4, 1)]
    assert torch.autograd.gradcheck(lambda *m: depth_shift(m, shift_size), maps)


def test_only_maps_that_need_a_gradient_get_one() -> None:
    fixed, learned = torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 4, 2, 2, requires_grad=True)
    depth_shift([fixed, learned], 3).sum().backward()
    assert learned.grad is not None
    assert fixed.grad is None


def test_mixed_precision_is_promoted_and_gradients_keep_the_dtype() -> None:
    half, single = torch.ones(1, 3, 4, 2, 2, dtype=torch.bfloat16, requires_grad=True), torch.ones(1, 3, 4, 2, 2)
    out = depth_shift([half, single], 3)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_a_single_map_without_a_shift_is_not_copied() -> None:
    x = torch.randn(1, 2, 3, 2, 2)
    assert depth_shift(x, 1) is x
    assert depth_shift(x, 3) is x  # fewer channels than groups


@pytest.mark.parametrize("shift_size", [0, 2, -3, 4, True, 3.0, "3"])
def test_even_and_other_shift_sizes_are_refused(shift_size: object) -> None:
    with pytest.raises(E2ENetError, match="odd number"):
        check_shift_size(shift_size)  # type: ignore[arg-type]
