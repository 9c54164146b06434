"""The compiled core: where it lies, and which kernels this CPU can run.

The library is optional. Where it was not built, or cannot be loaded, ``load_core`` says why, and PyTorch computes.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import time
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

from nnunetv2_e2enet.engine.jobs import (
    ConvGradientJob,
    ConvJob,
    Grid,
    HeadGradientJob,
    HeadJob,
    Job,
    LabelJob,
    Map,
    NormGradientJob,
    PoolJob,
    StridedGradientJob,
    StridedJob,
    UpsampleGradientJob,
)
from nnunetv2_e2enet.engine.layout import CHUNK, TILE
from nnunetv2_e2enet.engine.weights import DENSE_ROWS, POINTS
from nnunetv2_e2enet.settings import CHOICES, check_choice, settings, variable

KERNELS = tuple(filter(None, CHOICES["engine_kernels"]))
KERNELS_VARIABLE = variable("engine_kernels")
STORAGES = {"float32": 4, "float16": 2}  # bytes of a pixel
STORAGE_VARIABLE = variable("engine_storage")
TIMERS = (
    *("input transform", "products", "output transform", "upsampling", "strided convs", "pooling", "heads"),
    *("gradients of norms", "gradients transformed", "gradient products", "gradients of flows", "gradients of kernels"),
    *("gradients of upsampling", "gradients of strided convs", "gradients of heads"),
)

_ABI = 8


_CALLS: dict[type[Structure], str] = {
    ConvJob: "e2e_conv",
    StridedJob: "e2e_strided",
    PoolJob: "e2e_pool",
    HeadJob: "e2e_head",
    NormGradientJob: "e2e_norm_gradient",
    ConvGradientJob: "e2e_conv_gradient",
    StridedGradientJob: "e2e_strided_gradient",
    UpsampleGradientJob: "e2e_upsample_gradient",
    HeadGradientJob: "e2e_head_gradient",
}


class Core:
    """The loaded library with one set of kernels.

    Attributes:
        kernels: "amx" (AVX-512, and AMX for dense products), "avx512", "avx2" or "generic".
        storage: "float32" or "float16": how feature maps are stored; sums are float32 in both.
        path: of the library.
    """

    def __init__(self, library: ctypes.CDLL, path: Path, kernels: str, storage: str, handle: int) -> None:
        self.kernels = kernels
        self.storage = storage
        self.path = path
        self._library = library
        self._handle = c_void_p(handle)

    @property
    def has_amx(self) -> bool:
        """Whether dense products use AMX, and take their weights as ``split_bfloat16`` makes them."""
        return self.kernels == "amx"

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel of a stored map."""
        return STORAGES[self.storage]

    def scratch_floats(self, job: Job, threads: int) -> int:
        """Floats of scratch memory that ``run`` needs for this job with this number of threads."""
        return self._call(job, None, threads)

    def run(self, job: Job, scratch: int, threads: int) -> None:
        """Run a job.

        Raises:
            MemoryError: the core finds no memory.
        """
        self._call(job, scratch, threads)

    def _call(self, job: Job, scratch: int | None, threads: int) -> int:
        return _checked(getattr(self._library, _CALLS[type(job)])(self._handle, ctypes.byref(job), scratch, threads))

    def import_image(self, image: int, factor: float, target: Map, threads: int) -> None:
        """Store an image, multiplied by ``factor``; ``image`` is its address, ``(channels, *patch)`` of float32."""
        _checked(self._library.e2e_import(self._handle, image, factor, ctypes.byref(target), threads))

    @property
    def dot_shape(self) -> tuple[int, int]:
        """Rows and columns that dense sums over tiles are made of together."""
        shape = (c_int32 * 2)()
        self._library.e2e_dot_shape(self._handle, shape)
        return shape[0], shape[1]

    def pack_kernels(self, weight: int, places: int, n: int, turned: bool, target: int, threads: int) -> None:
        """3 x 3 kernels to the Winograd domain, ``[36][n]``; by half a turn if ``turned``. Zeros where a place is negative."""
        self._library.e2e_pack_kernels(weight, places, n, turned, target, threads)

    def pack_weights(self, weight: int, places: int, n: int, target: int, threads: int) -> None:
        """Single weights in another order, zeros where a place is negative."""
        self._library.e2e_pack_weights(weight, places, n, target, threads)

    def peak_flops(self, threads: int) -> float:
        """Floating-point operations a second in a loop of multiply-adds, at best of many tries of a few milliseconds."""
        best = 0.0
        for _ in range(40):
            begin = time.perf_counter()
            n = self._library.e2e_multiply_add_only(self._handle, 1 << 21, threads)
            best = max(best, 2 * n / (time.perf_counter() - begin))
        return best

    def checksum(self, address: int, n_bytes: int, threads: int) -> int:
        """A number that changes when any of the bytes does."""
        return int(self._library.e2e_checksum(address, n_bytes, threads))

    def sample(self, addresses: Sequence[int], n_bytes: Sequence[int]) -> int:
        """A number that changes when any of a few words of each array does."""
        n = len(addresses)
        return int(self._library.e2e_sample((c_void_p * n)(*addresses), (c_int64 * n)(*n_bytes), n))


def _checked(result: int) -> int:
    """The result of a function of the core.

    Raises:
        MemoryError, RuntimeError: the result is negative, so the function failed.
    """
    if result == -1:
        raise MemoryError("the CPU engine found no memory")
    if result < 0:
        raise RuntimeError("the CPU engine failed; please report this with the output of `e2enet info`")
    return result


def _declare(library: ctypes.CDLL) -> None:
    pointer = c_void_p
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "e2e_kernels": (pointer, [ctypes.c_char_p, ctypes.c_int]),
        **dict.fromkeys(_CALLS.values(), (c_int64, [pointer, pointer, pointer, ctypes.c_int])),
        "e2e_pack_kernels": (None, [pointer, pointer, c_int64, ctypes.c_int, pointer, ctypes.c_int]),
        "e2e_pack_weights": (None, [pointer, pointer, c_int64, pointer, ctypes.c_int]),
        "e2e_dot_shape": (None, [pointer, pointer]),
        "e2e_import": (c_int64, [pointer, pointer, c_float, pointer, ctypes.c_int]),
        "e2e_checksum": (ctypes.c_uint64, [pointer, c_int64, ctypes.c_int]),
        "e2e_multiply_add_only": (c_int64, [pointer, c_int64, ctypes.c_int]),
        "e2e_sample": (ctypes.c_uint64, [pointer, pointer, c_int64]),
        "e2e_add_window": (None, [pointer, c_int64, c_int64, pointer, pointer, *[c_int64] * 4, ctypes.c_int]),
        "e2e_add_mirrored": (None, [pointer, pointer, ctypes.c_int, c_float, *[c_int64] * 4, ctypes.c_int]),
        "e2e_divide_slice": (ctypes.c_int, [pointer, pointer, c_int64, c_int64, ctypes.c_int]),
        "e2e_label_scratch": (c_int64, [pointer, ctypes.c_int]),
        "e2e_label_slices": (None, [pointer, c_int64, c_int64, pointer, ctypes.c_int]),
        "e2e_layout": (None, [pointer]),
        "e2e_abi": (ctypes.c_int, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def _same_layout(library: ctypes.CDLL) -> bool:
    """Whether structs are as large as here, and tiles, groups and Winograd's points are the same."""
    structs: tuple[type[Structure], ...] = (Grid, Map, *_CALLS, LabelJob)
    constants = (len(TIMERS), TILE, CHUNK, DENSE_ROWS, *(int(point * 1024) for point in (POINTS[1], POINTS[3])))
    found = (c_int64 * (len(structs) + len(constants)))()
    library.e2e_layout(found)
    return list(found) == [*map(ctypes.sizeof, structs), *constants]


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, Path] | str:
    folder = Path(__file__).parent
    candidates = [folder / f"_core{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        return "the compiled core was not built: install a C++ compiler with OpenMP (g++ or clang) and reinstall the package"
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return f"the compiled core {path.name} cannot be loaded ({error}): reinstall the package"
    if library.e2e_abi() != _ABI or not _same_layout(library):
        return f"the compiled core {path.name} is of another version of this package: reinstall it"
    return library, path


def load_library() -> ctypes.CDLL | str:
    """The library itself, or a sentence that says why there is none."""
    found = _library()
    return found if isinstance(found, str) else found[0]


@lru_cache(maxsize=len(STORAGES) * (len(KERNELS) + 1))
def _core(kernels: str, storage: str) -> Core | str:
    found = _library()
    if isinstance(found, str):
        return found
    library, path = found
    for name in (kernels,) if kernels else KERNELS:
        handle = library.e2e_kernels(name.encode(), storage == "float16")
        if handle:
            return Core(library, path, name, storage, handle)
    return f"this CPU or this build has no {kernels or 'usable'} kernels for maps in {storage}"


def load_core(kernels: str | None = None, storage: str | None = None) -> Core | str:
    """The core with the best kernels for this CPU, or with those asked for; a sentence saying why not, if there is none.

    Args:
        kernels: one of ``KERNELS``; ``settings().engine_kernels`` otherwise.
        storage: one of ``STORAGES``; ``settings().engine_storage`` otherwise.

    Raises:
        E2ENetError: no such kernels or storage.
    """
    wanted = settings().engine_kernels if kernels is None else kernels
    stored = settings().engine_storage if storage is None else storage
    check_choice("engine_kernels", wanted, CHOICES["engine_kernels"])
    check_choice("engine_storage", stored, CHOICES["engine_storage"])
    return _core(wanted, stored)
