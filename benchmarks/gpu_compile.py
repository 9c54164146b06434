"""The sparse convolutions' Triton programs compiled for GPUs without one: registers, shared memory, tensor-core instructions.

python benchmarks/gpu_compile.py          # for sm_80 (A100) and sm_90 (H100), float16 maps, blocks of 16 output maps
"""

from __future__ import annotations

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
SHAPES = {"SD": 1, "SH": 1, "SW": 1, "KD": 1, "KH": 3, "KW": 3}
CONSTANTS = {**SHAPES, "GROUPS": 3, "BLOCK_V": 64, "BLOCK_N": 16, "BLOCK_K": 32, "WIDE": tl.float32}
TYPES = {"x": "*fp16", "weight": "*fp16", "grad": "*fp16", "out": "*fp16", "inputs": "*i64", "parts": "*fp32"}
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA)\b")


def compiled(name: str, architecture: int) -> dict[str, Any]:
    """What a program becomes on an architecture: registers a thread, stack, shared memory, tensor-core instructions."""
    program = getattr(sparse_programs, name)
    types = {**TYPES, "out": "*fp32"} if name == "gradient_of_inputs" else TYPES
    signature = {a: "constexpr" if a in CONSTANTS else types.get(a, "i32") for a in program.arg_names}
    places = {(program.arg_names.index(a),): value for a, value in CONSTANTS.items() if a in program.arg_names}
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
    table = Table(title="Sparse convolutions, float16, blocks of 16 output maps, kernel 1 x 3 x 3")
    for column in ("program", "architecture", "registers", "stack, bytes", "shared memory, bytes", "tensor-core instructions"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name in PROGRAMS:
        for architecture in ARCHITECTURES:
            table.add_row(name, f"sm_{architecture}", *map(str, compiled(name, architecture).values()))
    Console(highlight=False, width=130).print(table)


if __name__ == "__main__":
    main()
