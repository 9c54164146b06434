"""Addresses of the kernels in maps of more than 2^32 values, too many to allocate for a test: nothing is read or written.

The operators launch their programs on tensors without values. Of each launch the first, the last and one between them run in
Triton's interpreter, whose loads and stores note their addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST

SIZE = (63, 512, 513)
CHANNELS = 131
HALF = torch.float16
HUGE = 2**32

pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
if torch.cuda.is_available():
    pytest.skip("Triton's interpreter runs where there is no GPU", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402 (after the fixture file has chosen the interpreter)


class Pointer:
    """What the interpreter takes for a tensor: a dtype and an address that no other tensor is near."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.tensor, self.dtype, self.base = tensor, tensor.dtype, number << 48
        self.touched: list[np.ndarray[Any, Any]] = []

    def data_ptr(self) -> int:
        return self.base


@dataclass
class Launches:
    """Takes the place of a program: notes what it is launched with."""

    program: Any
    launched: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launched.append((self.program, grid, args, kwargs))


class Memory:
    """In the place of memory: notes offsets, and has values of tensors that have some."""

    def __init__(self, pointers: list[Pointer]) -> None:
        self.pointers = pointers

    def touch(self, addresses: Any, mask: Any) -> list[tuple[Pointer, Any, Any]]:
        """The tensors that are touched, the places in ``addresses`` of each, and its offsets there."""
        addresses, mask = np.broadcast_arrays(addresses, mask)
        numbers = addresses >> np.uint64(48)
        found = []
        for number in np.unique(numbers[mask]):
            assert 1 <= number <= len(self.pointers), "addresses of no tensor"
            pointer, places = self.pointers[int(number) - 1], mask & (numbers == number)
            offsets = (addresses[places] - np.uint64(pointer.base)).astype(np.int64) // pointer.tensor.element_size()
            pointer.touched.append(offsets)
            found.append((pointer, places, offsets))
        return found

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        values = np.where(mask, 0, 0 if other is None else other).astype(dtype)
        for pointer, places, offsets in self.touch(addresses, mask):
            if not pointer.tensor.is_meta:
                values[places] = pointer.tensor.flatten().numpy()[offsets]
        return values

    def store(self, addresses: Any, value: Any, mask: Any) -> None:  # noqa: ARG002
        self.touch(addresses, mask)


def touched_by(
    program: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[Pointer]:
    """The tensors of a launch, with the offsets that some of its programs touch."""
    pointers: list[Pointer] = []

    def point_to(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(point_to, argument))
        if isinstance(argument, Tensor):
            pointers.append(Pointer(argument, len(pointers) + 1))
            return pointers[-1]
        return argument

    given = [point_to(a) for a in args]
    grid = (*grid, *[1] * (3 - len(grid)))
    builder = interpreter.interpreter_builder
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", Memory(pointers))
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda _, args, kwargs: (args, kwargs))
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
        patch.setattr(builder, "set_grid_dim", lambda *_: set_dim(*grid))
        end = [n - 1 for n in grid]
        for place in ((0, 0, 0), (end[0] // 2, *end[1:]), tuple(end)):  # what lies at the end may be moved out of the map
            patch.setattr(builder, "set_grid_idx", lambda *_, place=place: set_index(*place))
            program[1,](*given, **kwargs)
    return pointers


def huge(channels: int, last: bool, size: tuple[int, ...] = SIZE, dtype: torch.dtype = HALF) -> Tensor:
    form = CHANNELS_LAST[3] if last else torch.contiguous_format
    x = torch.empty(2, channels, *size, dtype=dtype, device="meta", memory_format=form)
    assert x.numel() > HUGE
    return x


def per_channel(channels: int) -> Tensor:
    return torch.empty(2, channels, device="meta")


def calls(kernels: Any, last: bool) -> dict[str, tuple[Any, str, Callable[[], Any]]]:
    """Operator, its module and a call of it."""
    operators, pooling, sparse = kernels.operators, kernels.pooling, kernels.sparse
    x = huge(CHANNELS, last)
    mean, scale = per_channel(CHANNELS), per_channel(CHANNELS)
    pooled_size = (63, 256, 256)
    pooled = torch.empty(2, CHANNELS, *pooled_size, dtype=HALF, device="meta")
    pooled = pooled.contiguous(memory_format=CHANNELS_LAST[3] if last else torch.contiguous_format)
    inputs = torch.tensor([[*range(block, 17 + block), CHANNELS - 1] for block in range(9)])
    of_both = torch.tensor([[*range(block, 16 + block), CHANNELS - 1, 2 * CHANNELS - 1] for block in range(9)])
    other, no_norm = huge(CHANNELS, last), float("nan")
    both, one = ([x, scale, scale, other], [0.1, no_norm]), ([torch.empty_like(pooled), scale, scale], [0.1])
    weight = torch.empty(9 * 16, 18, 1, 3, 3, dtype=HALF, device="meta")
    up = torch.empty(9 * 16, 18, 1, 2, 2, dtype=HALF, device="meta")
    coarse, fine = torch.empty_like(pooled), huge(9 * 16, last, (63, 512, 512))
    out = huge(9 * 16, last)
    conv, transposed = ([1, 1, 1], False), ([1, 2, 2], True)
    index = torch.empty_like(pooled, dtype=torch.uint8)
    return {
        "statistics": (operators, "programs", lambda: operators._statistics._init_fn(x, 1e-5)),
        "norm_gradient": (
            operators, "programs", lambda: operators._norm_gradient._init_fn(x, x, mean, mean, scale, scale, 0.1),
        ),
        "join": (operators, "programs", lambda: operators._join._init_fn([x, scale, scale, x], [0.1, float("nan")], 3)),
        "separate": (operators, "programs", lambda: operators._separate._init_fn(x, [30, CHANNELS - 30], 3)),
        "pool": (pooling, "", lambda: pooling._pool._init_fn([x, scale, scale], 0.1, [1, 2, 2])),
        "pool_gradient": (pooling, "", lambda: pooling._pool_gradient._init_fn(pooled, index, list(SIZE), [1, 2, 2])),
        "convolve": (sparse, "programs", lambda: sparse._convolve._init_fn(*both, 3, weight, of_both, *conv)),
        "input_gradient": (
            sparse, "programs", lambda: sparse._input_gradient._init_fn(out, weight, of_both, [x, other], 3, *conv),
        ),
        "weight_gradient": (
            sparse, "programs", lambda: sparse._weight_gradient._init_fn(out, *both, 3, of_both, [1, 3, 3], *conv),
        ),
        "transposed convolve": (sparse, "programs", lambda: sparse._convolve._init_fn(*one, 1, up, inputs, *transposed)),
        "transposed input_gradient": (
            sparse, "programs", lambda: sparse._input_gradient._init_fn(fine, up, inputs, [coarse], 1, *transposed),
        ),
        "transposed weight_gradient": (
            sparse, "programs", lambda: sparse._weight_gradient._init_fn(fine, *one, 1, inputs, [1, 2, 2], *transposed),
        ),
    }  # fmt: skip


NAMES = [
    *("statistics", "norm_gradient", "join", "separate", "pool", "pool_gradient"),
    *(f"{kind}{name}" for kind in ("", "transposed ") for name in ("convolve", "input_gradient", "weight_gradient")),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_addresses_in_maps_of_more_than_two_to_the_32_values(name: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_e2enet import kernels

    monkeypatch.setattr(kernels.sparse, "CHUNK", 2048)  # or a program takes a while
    module, attribute, call = calls(kernels, last)[name]
    home = getattr(module, attribute) if attribute else module
    programs = {
        key: Launches(value) for key, value in vars(home).items() if isinstance(value, interpreter.InterpretedFunction)
    }
    with monkeypatch.context() as patch:
        for key, launches in programs.items():
            patch.setattr(home, key, launches)
        call()
    launched = [launch for launches in programs.values() for launch in launches.launched]
    assert launched
    furthest: dict[int, float] = {}
    for launch in launched:
        for pointer in touched_by(*launch, monkeypatch):
            offsets = np.concatenate([np.zeros(0, np.int64), *pointer.touched])
            assert (offsets >= 0).all()
            assert (offsets < pointer.tensor.numel()).all()
            if pointer.tensor.numel() > HUGE:
                reached = float(offsets.max(initial=0)) / pointer.tensor.numel()
                furthest[id(pointer.tensor)] = max(reached, furthest.get(id(pointer.tensor), 0))
    assert furthest
    assert min(furthest.values()) > 0.98, "the last program is not at the end of its maps"


def test_a_program_of_32_bit_offsets_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes are of what a GPU would compute: numbers of 32 bits wrap around."""
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def program(x, rows, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        place = tl.arange(0, BLOCK)
        tl.store(x + (rows - 1) * width + place, 0.0, place < width)

    x = torch.empty(2**17, 2**16, device="meta")
    with pytest.raises(triton.runtime.errors.InterpreterError, match="addresses of no tensor"):
        touched_by(program, (1,), (x, *x.shape), {"BLOCK": 64}, monkeypatch)
