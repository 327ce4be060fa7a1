"""What is installed and found on this machine, for a bug report.

    hdpissa env [--json]

Every part is looked at by itself: a package that cannot be imported, or a GPU that does not answer, is an entry of
the report and not its end. Of the environment only variables that steer a run are shown, and no secrets.
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

PACKAGES: tuple[str, ...] = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "tokenizers")
PACKAGES += ("safetensors", "triton", "pydantic", "numpy", "pyarrow", "rich", "matplotlib", "wandb", "tensorboard")
PACKAGES += ("peft", "lm-eval", "flash-attn", "liger-kernel", "kernels", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
# of torch's and DeepSpeed's launchers, Slurm, Open MPI; of NCCL, gloo, the devices, the caches
SHOWN = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|(SLURM|OMPI_COMM|PMI|TORCH|TORCHELASTIC|NCCL|GLOO|CUDA|HIP|ROCR|DS|DEEPSPEED|TRITON|PYTORCH|OMP|HDPISSA"
    r"|WANDB|TOKENIZERS|TRANSFORMERS)_\w+|HF_(HOME|HUB_OFFLINE|HUB_CACHE|DATASETS_CACHE|DATASETS_OFFLINE|ENDPOINT))"
)
NONE = {"variables": "none of those that steer a run is set"}
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def collect(given: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The report: part → what was found; of this process's environment, or of another."""
    # a copy: torch and DeepSpeed add variables of their own when they are imported
    environment = dict(os.environ if given is None else given)
    return {
        "hdpissa": _found(_ourselves),
        "system": _found(_system),
        "packages": _found(_packages),
        "torch": _found(_torch),
        "devices": _found(_devices),
        "launcher": _found(lambda: _launcher(environment)),
        "variables": variables(environment),
    }


def _found(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of the report; whatever ends it is told instead. What libraries print on the way is not part of it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return part()
    except BaseException as error:  # a broken CUDA installation raises anything, and is what the report is for
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _ourselves() -> dict[str, Any]:
    folder = Path(__file__).resolve().parents[1]
    revision = _said("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*")
    return {
        "version": importlib.metadata.version("hdpissa"),
        "revision": revision or "not a git checkout",
        "folder": str(folder),
        "python": f"{platform.python_version()} {sys.executable}",
    }


def _system() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags, model = _cpu()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cache = Path(os.environ.get("HF_HOME") or "~/.cache").expanduser()
    return {
        "os": f"{platform.platform()}",
        "cpu": f"{model}, {usable} of {os.cpu_count()} cores usable",
        "cpu instructions": ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags),
        "memory": f"{memory / 2**30:.1f} GiB",
        "shared memory": _free(Path("/dev/shm")),
        "disk here": _free(Path.cwd()),
        "disk of the cache": _free(cache),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "no nvidia-smi",
    }


def _cpu() -> tuple[set[str], str]:
    """(flags, model name) as Linux tells them."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        lines = dict(re.findall(r"^(flags|Features|model name)\s*: (.*)$", text, re.MULTILINE))
        return set(" ".join((lines.get("flags", ""), lines.get("Features", ""))).split()), lines.get("model name", "")
    return set(), platform.processor()


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {folder}"


def _said(*command: str) -> str:
    """The first line of a command's output; nothing where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else ""


def _packages() -> dict[str, Any]:
    """Versions of what is installed; nothing is imported."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    backends = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available, "mpi": dist.is_mpi_available}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not looked at without GPU"
    return {
        "cuda": torch.version.cuda or "not built with it",
        "rocm": getattr(torch.version, "hip", None) or "not built with it",
        "cudnn": torch.backends.cudnn.version() or "none",
        "communication": ", ".join(name for name, has in backends.items() if has()),
        "nccl": nccl,
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
    """Where the engine believes to be, and which launchers there are."""
    from hdpissa.engine.distributed.launcher import read_launch

    beside = {name: Path(sys.executable).with_name(name) for name in ("deepspeed", "torchrun")}
    launchers = {n: str(path) if path.exists() else shutil.which(n) or "not found" for n, path in beside.items()}
    launchers |= {name: shutil.which(name) or "not found" for name in ("srun", "mpirun", "pdsh")}
    launch = read_launch(environment)
    place = f"rank {launch.rank} of {launch.world_size}, {launch.local_rank} of {launch.local_world_size} on this host"
    return {"started by": launch.launcher, "place": place, **launchers}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What steers a run; of a secret only that it is set."""
    names = sorted(name for name in environment if SHOWN.fullmatch(name))
    return {name: "(set)" if SECRET.search(name) else environment[name] for name in names}


def text(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as lines that an issue can hold."""
    lines = []
    for part, found in report.items():
        shown = {name: value for name, value in found.items() if value != ""}
        width = max(map(len, shown), default=0)
        lines += [part, *(f"  {name:<{width}}  {value}" for name, value in shown.items()), ""]
        if not shown:  # a heading with nothing below looks like something that was cut off
            lines[-1:] = [f"  {NONE.get(part, 'none')}", ""]
    return "\n".join(lines).rstrip()


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
