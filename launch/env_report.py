"""Prints what is installed and found on this machine, for a bug report.

    hdpissa env

Versions, launchers, free disk space and the environment variables that affect a run are ours; system, CPU, GPUs and
drivers are `torch.utils.collect_env`'s. A part that fails is reported as its error. Of tokens and keys only that they
are set is shown.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from hdpissa.engine.distributed.launcher import read_launch
from hdpissa.engine.errors import one_line

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
PACKAGES += ("safetensors", "triton", "pydantic", "numpy", "pyarrow", "matplotlib", "wandb", "tensorboard", "lm-eval")
PACKAGES += ("flash-attn", "liger-kernel", "kernels", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
# of torch's and DeepSpeed's launchers, Slurm, Open MPI; of NCCL, gloo, the devices, the caches
SHOWN = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|(SLURM|OMPI_COMM|PMI|TORCH|TORCHELASTIC|NCCL|GLOO|CUDA|HIP|ROCR|DS|DEEPSPEED|TRITON|PYTORCH|OMP|HDPISSA"
    r"|WANDB|TOKENIZERS|TRANSFORMERS)_\w+|HF_(HOME|HUB_OFFLINE|HUB_CACHE|DATASETS_CACHE|DATASETS_OFFLINE|ENDPOINT))"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def hdpissa() -> str:
    folder = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError):
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        return f"{importlib.metadata.version('hdpissa')}, revision {revision or 'unknown'}, in {folder}"
    return f"{importlib.metadata.version('hdpissa')}, in {folder}"


def packages() -> str:
    """Versions of what is installed; nothing is imported."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(versions)


def disk() -> str:
    """Free space of shared memory, this folder and the hub's cache."""
    parts = []
    for folder in (Path("/dev/shm"), Path.cwd(), Path(os.environ.get("HF_HOME") or "~/.cache").expanduser()):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        parts.append(f"{shutil.disk_usage(there).free / 2**30:.1f} GiB in {there}")
    return ", ".join(parts)


def launcher(environment: Mapping[str, str]) -> str:
    """What started this process, and which launchers are installed."""
    launch = read_launch(environment)
    beside = Path(sys.executable).parent
    installed = [name for name in ("deepspeed", "torchrun", "srun", "mpirun", "pdsh")
                 if shutil.which(name) or (beside / name).exists()]  # fmt: skip
    place = f"rank {launch.rank} of {launch.world_size}, {launch.local_rank} of {launch.local_world_size} on this host"
    return f"{launch.launcher}, {place}; installed: {', '.join(installed) or 'none'}"


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that affect a run; of a secret only that it is set."""
    names = sorted(name for name in environment if SHOWN.fullmatch(name))
    return {name: "(set)" if SECRET.search(name) else environment[name] for name in names}


def machine() -> str:
    """torch's report: system, CPU, GPUs, drivers."""
    from torch.utils.collect_env import get_pretty_env_info

    return "\n" + get_pretty_env_info()


def report(environment: Mapping[str, str]) -> str:
    """All parts, as lines that an issue can hold."""
    set_here = [f"  {name}={value}" for name, value in variables(environment).items()]
    parts: dict[str, Callable[[], str]] = {
        "hdpissa": hdpissa,
        "packages": packages,
        "free disk": disk,
        "launcher": lambda: launcher(environment),
        "variables": lambda: "\n" + "\n".join(set_here) if set_here else "none",
        "torch.utils.collect_env": machine,
    }
    return "\n".join(f"{name}: {_tried(part)}" for name, part in parts.items())


def _tried(part: Callable[[], str]) -> str:
    try:
        return part()
    except Exception as error:  # a broken CUDA installation raises anything, and is what the report is for
        return one_line(error)


def main(argv: list[str] | None = None) -> None:
    """Prints the report."""
    from hdpissa.launch.common import command_line

    parser = command_line.PlainParser(prog="hdpissa env", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    print(report(dict(os.environ)))


if __name__ == "__main__":
    main()
