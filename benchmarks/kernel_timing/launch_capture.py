"""Every Triton launch of a program, compiled for an H100 or H200 (sm_90) as on the chip and not run. Needs no GPU.

    with capture() as launches:
        loss = model(input_ids=ids).loss
        loss.backward()
    for kernel in {launch.kernel for launch in launches}:
        print(kernel.name, kernel.registers, kernel.spilled, kernel.shared)

A driver of our own takes the place of Triton's CUDA driver. Triton itself specialises the arguments of each launch,
compiles a new signature (about 1.5 s, or from TRITON_CACHE_DIR) and refuses what asks for more shared memory than a
program may have; tensors are on the CPU, and what a kernel would write is left as it is. Unlike a list of variants
(`aot_table.py`), this sees the alignments, strides and sizes that the layers really launch with.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

SHARED_BYTES = 227 * 1024  # what one program may have
MULTIPROCESSORS = 132
MEMORY_ACCESS = r"\b(?:LDG|STG|LDGSTS)\.E[\w.]*"
MATRIX = r"\b[HIQ]G?MMA\.[\w.]+"

# Every capture is a device of its own to Triton, which keeps compiled kernels, with their launchers, by device.
_device_numbers = itertools.count(-1, -1)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: equal to another one if its machine code is the same.

    Attributes:
        cubin: the machine code.
        shared: bytes of shared memory of a program.
        registers: per thread.
        spilled: bytes per thread.
    """

    name: str
    cubin: bytes
    shared: int
    registers: int
    spilled: int

    @functools.cached_property
    def assembly(self) -> str:
        """The machine code in words."""
        from triton import knobs

        return _on_file([knobs.nvidia.nvdisasm.path, "-c"], self.cubin)

    @property
    def accesses(self) -> Counter[str]:
        """Instructions that read or write global memory, e.g. {"LDG.E.128": 4}."""
        return Counter(re.findall(MEMORY_ACCESS, self.assembly))

    @property
    def matrix_instructions(self) -> Counter[str]:
        """Instructions of the matrix units, e.g. {"HGMMA.64x16x16.F32.BF16": 8}."""
        return Counter(re.findall(MATRIX, self.assembly))


@dataclass(frozen=True)
class Launch:
    """A kernel, and the number of programs along each of three axes."""

    kernel: Kernel
    grid: tuple[int, int, int]


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes spilled, both per thread, by the tool that Triton brings."""
    from triton import knobs

    usage = _on_file([knobs.nvidia.cuobjdump.path, "--dump-resource-usage"], cubin)
    # a function's stack frame holds what is spilled; local memory is counted too, should a compiler use it
    figure = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return figure["REG"], figure["STACK"] + figure["LOCAL"]


def _on_file(command: list[str], content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


class CaptureDriver:
    """What Triton's launches ask of a driver, answered for sm_90; `utils` of a CUDA driver included."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches: list[Launch] = []
        self.utils = self
        self._device = next(_device_numbers)
        self._target = GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, Kernel, int, int, int]:
        """(module, function, registers, spills, most threads of a program); our kernel stands for the function."""
        registers, spilled = registers_and_spills(cubin)
        return None, Kernel(name, cubin, shared, registers, spilled), registers, spilled, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, grid_0: int, grid_1: int, grid_2: int, stream: int, kernel: Kernel, *rest: Any) -> None:
        self.launches.append(Launch(kernel, (grid_0, grid_1, grid_2)))


@contextmanager
def capture() -> Iterator[list[Launch]]:
    """Within it nothing that Triton launches runs, and the list grows by each launch; tensors are on the CPU.

    Our own layers and kernels take their tensors for a GPU's: impl "auto" is Triton's, and blocks and splits are those
    for the chip. Outside, everything is as before.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, which nothing compiles.
        triton.OutOfResources: inside, at a launch with more shared memory than the chip has.
    """
    import triton
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted, nothing is compiled; unset it")
    capturing = CaptureDriver()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", capturing))
        for patch in _as_on_hopper():
            stack.enter_context(patch)
        yield capturing.launches


def _as_on_hopper() -> list[Any]:
    """Patches of the few places in which our code asks what device a tensor is on."""
    from hdpissa.engine import resolved_config
    from hdpissa.engine.optim import factors
    from hdpissa.kernels import api, delta_tile, fused_linear, low_rank_grad_A

    chip = torch.device("cuda")
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    width_for = delta_tile.width_for
    return [
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        *(mock.patch.object(module, "obstacle", return_value=None) for module in (api, resolved_config)),
        *(mock.patch.object(module, "uses_triton", lambda _, impl: impl != "torch") for module in (api, factors)),
        mock.patch.object(low_rank_grad_A, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(delta_tile, "width_for", lambda _, *divisible: width_for(chip, *divisible)),
        mock.patch.object(fused_linear, "_chip", return_value="sm_90"),
    ]
