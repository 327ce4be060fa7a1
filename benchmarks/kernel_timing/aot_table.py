"""What the compiler makes of every kernel, on a machine without a GPU: kernel × chip.

    python benchmarks/kernel_timing/aot_table.py [KERNEL ...]

Compiles the configurations that the launchers use (each kernel module's `AOT`) for an A100 (sm_80), an H100 or
H200 (sm_90) and an MI300 (gfx942), and reads from what comes out: registers per thread, bytes spilled (stack
frame and local memory, on AMD scratch), shared memory against what a program may have, and the matrix
instructions (of PTX on NVIDIA: mma becomes HMMA, wgmma HGMMA). KERNEL is a stem of `kernels/` or the path of a
Python file that has an `AOT`; without any, all kernels are compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import launch_capture

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# What kernels share, and what chooses between them.
NOT_KERNELS = ("api", "available", "common", "delta_tile", "reference")
COLUMNS = ("kernel", "target", "registers", "spilled", "shared KiB", "limit KiB", "matrix instructions")


@dataclass(frozen=True)
class Target:
    """A chip: Triton's name of it, and the shared memory that one program may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, launch_capture.SHARED_BYTES),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


def kernel_stems() -> list[str]:
    """All modules of `kernels/` that hold a kernel."""
    return sorted(path.stem for path in KERNELS.glob("*.py") if path.stem not in NOT_KERNELS)


def load(kernel: str) -> Any:
    """A kernel module by its stem, or any Python file by its path."""
    if not kernel.endswith(".py"):
        return importlib.import_module(f"hdpissa.kernels.{kernel}")
    spec = importlib.util.spec_from_file_location(Path(kernel).stem, kernel)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_case(kernel: str, index: int, target_name: str) -> dict[str, Any]:
    """Compiles one case for one chip and reads the result: a row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget

    case, target = load(kernel).AOT[index], TARGETS[target_name]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    chip = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled = triton.compile(case.source(), target=chip, options=options)
    read = _read_nvidia(compiled.asm) if target.backend == "cuda" else _read_amd(compiled.asm["amdgcn"])
    return {
        "module": kernel,
        "kernel": case.name,
        "target": target_name,
        "tensor_core": case.tensor_core,
        "shared KiB": compiled.metadata.shared / 1024,
        "limit KiB": target.shared_bytes // 1024,
        **read,
    }


def _read_nvidia(asm: Mapping[str, Any]) -> dict[str, Any]:
    """Registers and spills of a cubin; matrix instructions of its PTX."""
    registers, spilled = launch_capture.registers_and_spills(asm["cubin"])
    instructions = re.sub(r"\.(?:mma_async|sync|aligned|row|col)\b", "", asm["ptx"])
    return {
        "registers": registers,
        "spilled": spilled,
        "matrix instructions": _distinct(r"\bw?g?mma\.m\d[\w.]+", instructions),
    }


def _read_amd(assembly: str) -> dict[str, Any]:
    """The same of AMD's assembly, whose metadata counts spilled registers."""
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    figure = {key: int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in keys}  # type: ignore[index]
    spilled_registers = figure["vgpr_spill_count"] + figure["sgpr_spill_count"]
    return {
        "registers": figure["vgpr_count"],
        "spilled": max(4 * spilled_registers, figure["private_segment_fixed_size"]),
        "matrix instructions": _distinct(r"\bv_mfma_\w+", assembly),
    }


def _distinct(pattern: str, code: str) -> str:
    return ", ".join(sorted(set(re.findall(pattern, code))))


def covered(cases: Sequence[Any]) -> set[str]:
    """The chips that the first or the last case is for."""
    return {*cases[0].targets, *cases[-1].targets}


def measure(kernels: Sequence[str], *, sample: bool = False) -> list[dict[str, Any]]:
    """The rows of all cases of the given kernels, each on every chip that its launcher uses it on."""
    # A kernel under the interpreter is a Python function that nothing compiles.
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [
        (kernel, index, target)
        for kernel in kernels
        for index, case in enumerate(load(kernel).AOT)
        for target in case.targets
        if not sample or index in (0, len(load(kernel).AOT) - 1) or target not in covered(load(kernel).AOT)
    ]
    workers = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True)))


def main() -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL")
    parser.add_argument("--sample", action="store_true", help="of each kernel only the first and the last variant")
    args = parser.parse_args()
    args.kernels = args.kernels or kernel_stems()
    rows = measure(args.kernels, sample=args.sample)
    note = "Ahead-of-time compilation with the shipped block sizes; registers per thread, bytes spilled per thread."
    headline = f"{len(rows)} kernel variants on three chips, {sum(row['spilled'] > 0 for row in rows)} with spills"
    args.kernels = [Path(name).name for name in args.kernels]
    identity = ("kernel", "target")
    timing.write("aot", args, rows, COLUMNS, note, identity=identity, headline=headline, targets=list(TARGETS))


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
