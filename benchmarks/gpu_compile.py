"""The sparse convolutions' Triton programs compiled for GPUs without one: registers, shared memory, tensor-core instructions.

python benchmarks/gpu_compile.py          # for sm_80 (A100) and sm_90 (H100), float16 maps, blocks of 16 output maps
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunetv2_e2enet.kernels import sparse_programs
from nnunetv2_e2enet.kernels.sparse import WARPS

ARCHITECTURES = (80, 90)
PROGRAMS = ("convolve_blocks", "gradient_of_inputs", "gradient_of_weights")
NAMES = ("SD", "SH", "SW", "KD", "KH", "KW", "UD", "UH", "UW")
KINDS = {"convolution": (1, 1, 1, 1, 3, 3, 1, 1, 1), "transposed": (1, 1, 1, 1, 1, 1, 2, 2, 2)}
"""Of a convolution of 1 x 3 x 3 and of a transposed one of 2 x 2 x 2: stride, kernel, voxels that a place becomes."""
CONSTANTS = {"BLOCK_V": 64, "BLOCK_N": 16, "BLOCK_K": 32, "WIDE": tl.float32}
TYPES = {"x": "*fp16", "weight": "*fp16", "grad": "*fp16", "out": "*fp16", "inputs": "*i64", "parts": "*fp32"}
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA)\b")


def compiled(name: str, kind: str, architecture: int) -> dict[str, Any]:
    """What a program becomes on an architecture: registers a thread, stack, shared memory, tensor-core instructions."""
    program = getattr(sparse_programs, name)
    constants = {**CONSTANTS, **dict(zip(NAMES, KINDS[kind], strict=True)), "GROUPS": 3 if kind == "convolution" else 1}
    types = {**TYPES, "out": "*fp32"} if name == "gradient_of_inputs" else TYPES
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in program.arg_names}
    places = {(program.arg_names.index(a),): value for a, value in constants.items() if a in program.arg_names}
    result = triton.compile(
        ASTSource(program, signature, places), target=GPUTarget("cuda", architecture, 32), options={"num_warps": WARPS}
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
    table = Table(title="Sparse convolutions, float16, blocks of 16 output maps, kernel 1 x 3 x 3; transposed ones, 2 x 2 x 2")
    for column in (
        "program",
        "kind",
        "architecture",
        "registers",
        "stack, bytes",
        "shared memory, bytes",
        "tensor-core instructions",
    ):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name, kind, architecture in itertools.product(PROGRAMS, KINDS, ARCHITECTURES):
        table.add_row(name, kind, f"sm_{architecture}", *map(str, compiled(name, kind, architecture).values()))
    Console(highlight=False, width=130).print(table)


if __name__ == "__main__":
    main()
