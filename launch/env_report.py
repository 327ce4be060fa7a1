"""Versions, devices and variables of this machine, for a bug report.

    hdpissa env [--json]

A part that cannot be read (a package that fails to import, a GPU that does not answer) is an entry with its error. Only
those environment variables that steer a run are shown, and of a secret only that it is set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACKAGES: tuple[str, ...] = (
    "torch",
    "deepspeed",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "peft",
)
PACKAGES += (
    "peft",
    "safetensors",
    "triton",
    "pydantic",
    "numpy",
    "pyarrow",
    "matplotlib",
    "wandb",
    "tensorboard",
    "lm-eval",
)
PACKAGES += ("flash-attn", "liger-kernel", "kernels", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
# of torch's and DeepSpeed's launchers, Slurm, Open MPI; of NCCL, gloo, the devices, the caches
SHOWN = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|(SLURM|OMPI_COMM|PMI|TORCH|TORCHELASTIC|NCCL|GLOO|CUDA|HIP|ROCR|DS|DEEPSPEED|TRITON|PYTORCH|OMP|HDPISSA"
    r"|WANDB|TOKENIZERS|TRANSFORMERS)_\w+|HF_(HOME|HUB_OFFLINE|HUB_CACHE|DATASETS_CACHE|DATASETS_OFFLINE|ENDPOINT))"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def collect(environment: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Part → its entries; for this process's environment or another."""
    # a copy: torch and DeepSpeed add variables of their own when they are imported
    environment = dict(os.environ if environment is None else environment)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "hdpissa": _package,
        "system": _system,
        "packages": _versions,
        "torch": lambda: _torch(),
        "devices": _devices,
        "launcher": lambda: _launcher(environment),
    }
    return {name: _guarded(part) for name, part in parts.items()} | {"variables": variables(environment)}


def _guarded(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part, or its error; what libraries print meanwhile is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return part()
    except BaseException as error:  # a broken CUDA installation raises anything, and is what the report is for
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _package() -> dict[str, Any]:
    folder = Path(__file__).resolve().parents[1]
    revision = _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*")
    return {
        "version": importlib.metadata.version("hdpissa"),
        "revision": revision or "not a git checkout",
        "folder": str(folder),
        "python": f"{platform.python_version()} {sys.executable}",
    }


def _system() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disks = {"shared memory": "/dev/shm", "disk here": ".", "disk of the home": "~"}
    return {
        "os": platform.platform(),
        "cpu": f"{cpu}, {usable} of {os.cpu_count()} cores usable",
        "memory": f"{memory / 2**30:.1f} GiB",
        **{name: _free(Path(folder).expanduser()) for name, folder in disks.items()},
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "no nvidia-smi",
    }


def _free(folder: Path) -> str:
    if not folder.exists():
        return f"no {folder}"
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {folder.resolve()}"


def _output(*command: str) -> str:
    """The first line of a command's output; empty where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def _versions() -> dict[str, Any]:
    """Of what is installed; nothing is imported."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    backends = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available, "mpi": dist.is_mpi_available}
    return {
        "cuda": torch.version.cuda or "not built with it",
        "rocm": getattr(torch.version, "hip", None) or "not built with it",
        "cudnn": torch.backends.cudnn.version() or "none",
        "communication": ", ".join(name for name, available in backends.items() if available()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "unknown without GPU",
        "threads": torch.get_num_threads(),
    }


def _devices() -> dict[str, Any]:
    import torch

    from hdpissa.engine.sharding import zero3

    found: dict[str, Any] = {"deepspeed takes": zero3.accelerator_name()}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        found[f"gpu {index}"] = (
            f"{device.name}, capability {device.major}.{device.minor}, {device.multi_processor_count} multiprocessors, "
            f"{free / 2**30:.1f} of {device.total_memory / 2**30:.1f} GiB free"
        )
    return found


def _launcher(environment: Mapping[str, str]) -> dict[str, Any]:
    """The rank that the engine would take, and the launchers that are installed."""
    from hdpissa.engine.distributed.launcher import read_launch

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    names = ("deepspeed", "torchrun", "srun", "mpirun", "pdsh")
    launch = read_launch(environment)
    place = f"rank {launch.rank} of {launch.world_size}, {launch.local_rank} of {launch.local_world_size} on this host"
    launchers = {name: shutil.which(name, path=path) or "not found" for name in names}
    return {"started by": launch.launcher, "place": place, **launchers}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that steer a run; of a secret only that it is set."""
    names = sorted(name for name in environment if SHOWN.fullmatch(name))
    return {name: "(set)" if SECRET.search(name) else environment[name] for name in names}


def text(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as lines for an issue."""
    lines = []
    for part, entries in report.items():
        width = max(map(len, entries), default=0)
        lines += [part, *(f"  {name:<{width}}  {value}" for name, value in entries.items() or [("none", "")]), ""]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def main(argv: list[str] | None = None) -> int:
    """Prints the report."""
    parser = argparse.ArgumentParser(description="Versions, devices and variables, for a bug report.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
