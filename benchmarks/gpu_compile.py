"""The Triton programs compiled for GPUs without one: registers, shared memory, tensor-core instructions.

python benchmarks/gpu_compile.py          # for sm_80 (A100) and sm_90 (H100)
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunetv2_e2enet.kernels import pooling, programs, sparse_programs
from nnunetv2_e2enet.kernels.operators import TILE, TILE_LAST
from nnunetv2_e2enet.kernels.sparse import WARPS, tile_voxels
from nnunetv2_e2enet.network.sparse_convolution import LARGEST_BLOCK

ARCHITECTURES = (80, 90)
PROGRAMS = ("convolve_blocks", "gradient_of_inputs", "gradient_of_weights")
NAMES = ("SD", "SH", "SW", "KD", "KH", "KW", "UD", "UH", "UW")
PLAIN, UP = (1, 1, 1, 1, 3, 3, 1, 1, 1), (1, 1, 1, 1, 1, 1, 2, 2, 2)
FLOWS: tuple[float | None, ...] = (0.01, None, None)
KINDS: dict[str, tuple[tuple[int, ...], int, str, tuple[float | None, ...], bool]] = {
    "convolution": (PLAIN, 16, "*fp16", FLOWS, False),
    "channels last": (PLAIN, 16, "*fp16", FLOWS, True),
    "one map": (PLAIN, 16, "*fp16", (0.01,), False),
    "no norm": (PLAIN, 16, "*fp16", (None,), False),
    "one slice": (PLAIN, 16, "*fp16", FLOWS, False),
    "stride 2": ((1, 2, 2, 1, 3, 3, 1, 1, 1), 16, "*fp16", FLOWS, False),
    "blocks of 32": (PLAIN, 32, "*fp16", FLOWS, False),
    "blocks of 64": (PLAIN, LARGEST_BLOCK, "*fp16", FLOWS, False),
    "bfloat16": (PLAIN, 16, "*bf16", FLOWS, False),
    "float32": (PLAIN, 16, "*fp32", FLOWS, False),
    "transposed": (UP, 16, "*fp16", (0.01,), False),
}
"""Stride, kernel, voxels that a place becomes; output maps of a block; type of maps; their slopes; are channels last?"""
DTYPES = {"*fp16": torch.float16, "*bf16": torch.bfloat16, "*fp32": torch.float32}
NORM = {"SLOPE": 0.01, "WIDE": tl.float32}
POOL = {"KERNEL_D": 2, "KERNEL_H": 2, "KERNEL_W": 2}
PASSES: dict[str, dict[str, Any]] = {
    "sums_around_first": {"WIDE": tl.float32},
    "finish_statistics": {"BLOCK": 1024},
    "move_tiles": {**NORM, "BACK": False, "NORM": True, "MOVE": True},
    "pool_tiles": {**NORM, **POOL, "NORM": True},
    "unpool_tiles": POOL,
    "gradient_sums": NORM,
    "finish_sums": {"BLOCK": 1024},
    "gradient_of_norm": NORM,
}
"""Programs that read and write maps, in float16: constants other than the size of a tile."""
TILES = {"tiles of a channel": (TILE, 1), "tiles of channels last": TILE_LAST}
MAPS = ("x", "weight", "grad", "out", "single", "joined", "whole", "pooled")
TYPES = {
    **dict.fromkeys(("scale", "offset", "mean", "rstd", "sums", "squares", "products", "parts"), "*fp32"),
    **dict.fromkeys(("first_parts", "second_parts", "first", "second"), "*fp32"),
    "inputs": "*i64", "index": "*u8", "eps": "fp32",
}  # fmt: skip
"""Of arguments other than maps and sizes."""
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA)\b")


def compiled_convolution(name: str, kind: str, architecture: int) -> dict[str, Any]:
    """What a program of the sparse convolutions becomes on an architecture; see ``compiled``."""
    geometry, block_size, maps, slopes, last = KINDS[kind]
    blocks = {"BLOCK_V": tile_voxels(DTYPES[maps]), "BLOCK_N": block_size, "BLOCK_K": 32}
    options = {"SLOPES": slopes, "NORM": any(slopes), "MOVE": geometry != UP, "LAST": last, "WIDE": tl.float32}
    ones = dict.fromkeys(("depth", "out_depth"), 1) if kind == "one slice" else {}  # Triton knows arguments that are 1
    constants = {**dict(zip(NAMES, geometry, strict=True)), **blocks, **options, **ones}
    each = {"maps": maps, "scales": "*fp32", "offsets": "*fp32", "sums": "*fp32", "widths": "i32"}
    types = {**TYPES, **dict.fromkeys(MAPS, maps), **{key: (value,) * len(slopes) for key, value in each.items()}}
    return compiled(getattr(sparse_programs, name), constants, types, architecture, WARPS)


def compiled_pass(name: str, tiles: str, architecture: int) -> dict[str, Any]:
    """What a program that reads and writes maps becomes on an architecture; see ``compiled``."""
    program = getattr(programs if hasattr(programs, name) else pooling, name)
    constants = {**PASSES[name], **dict(zip(("BLOCK_V", "BLOCK_C"), TILES[tiles], strict=True))}
    types = {**TYPES, **dict.fromkeys(MAPS, "*fp16")}
    warps = pooling.WARPS_LAST if program in (pooling.pool_tiles, pooling.unpool_tiles) and TILES[tiles] == TILE_LAST else 4
    return compiled(program, constants, types, architecture, warps)


def compiled(
    program: Any, constants: dict[str, Any], types: dict[str, Any], architecture: int, warps: int = 4
) -> dict[str, Any]:
    """Registers a thread, stack, shared memory, tensor-core instructions; arguments without a type are sizes."""
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in program.arg_names}
    places = {(program.arg_names.index(a),): value for a, value in constants.items() if a in program.arg_names}
    result = triton.compile(
        ASTSource(program, signature, places), target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "program.cubin"
        cubin.write_bytes(result.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _run(tools / "nvdisasm", cubin)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack_bytes": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared_bytes": int(result.metadata.shared),
        "tensor_core_instructions": len(TENSOR_CORES.findall(code)),
    }


def _run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def main() -> None:
    table = Table(title="Sparse convolutions, kernel 1 x 3 x 3, transposed ones 2 x 2 x 2; and passes over maps in float16")
    for column in ("program", "kind", "registers", "stack, bytes", "shared memory, bytes", "tensor-core instructions"):
        table.add_column(column, justify="left" if column in ("program", "kind") else "right")
    rows = [(compiled_convolution, name, kind) for name, kind in itertools.product(PROGRAMS, KINDS)]
    rows += [(compiled_pass, name, tiles) for name, tiles in itertools.product(PASSES, TILES)]
    for compile_one, name, kind in rows:
        found = [compile_one(name, kind, architecture) for architecture in ARCHITECTURES]
        table.add_row(name, kind, *(" / ".join(str(f[key]) for f in found) for key in found[0]))
    console = Console(highlight=False, width=130)
    console.print(table)
    console.print("each number: " + " / ".join(f"sm_{architecture}" for architecture in ARCHITECTURES))


if __name__ == "__main__":
    main()
