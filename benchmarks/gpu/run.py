"""What needs a GPU, in one go: `make gpu`, or `python3 benchmarks/gpu/run.py [--dry] [PHASE ...]`.

Does it run, is it right, is it bound by the host? In this order, with the seconds each is expected to take:

    environment   30   versions, imports, the ceilings of a copy and of a product
    smoke         60   a tiny model's whole life through launch/train.py: save, kill, resume, offload, export, two ranks
    tests         90   every kernel against float64, and the layers and engine that use them
    step         110   a whole optimizer step of a 7B model with the shipped config, against frozen base and LoRA
    profile       20   of that step, the device's busy share, its kernels, and the host's time
    kernels       80   every kernel against torch and its floor
    svd           35   the decomposition of three shapes, against torch's
    memcheck      60   compute-sanitizer over one launch of every kernel

Only by name, each a call of its own: `throughput-MODEL` (all methods through the launcher, for each of four models) and
`reference` (the published algorithm's step, in three layers of a 7B model).

A phase has a time limit, and the next one goes on when it has failed; the exit code is 1 if one has. Its rows are in
`benchmarks/results/gpu/rows.jsonl`, or in the folder that OUT names, as soon as they are measured (gpu_rows.py), with
`gpu.log` and, in the end, `gpu.md`. --dry runs the same phases on the CPU with toy sizes.

Runs with the Python that starts it; the package is used from this checkout, it need not be installed. Wheels in `.whl/`
are installed into a temporary folder, without network, and the Triton cache in `.triton-cache.tar.xz`
(`make gpu-cache`) is used. benchmarks/README.md says how to carry them. Imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

if __package__:
    from hdpissa.benchmarks.gpu import gpu_rows
else:
    import gpu_rows  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".triton-cache.tar.xz"
# By the names that they are imported under: what the phases import themselves, and what DeepSpeed brings no wheel for.
NEEDED = (
    *("torch", "triton", "transformers", "peft", "pytest", "hypothesis", "deepspeed", "pydantic", "datasets"),
    *("numpy", "psutil", "yaml", "safetensors", "tokenizers", "filelock", "jinja2", "rich"),
    *("hjson", "msgpack", "einops", "tqdm", "packaging"),
)
SVD = ("--sizes", "1024x4096", "4096x4096", "4096x11008", "--spectra", "flat", "--ranks", "128")
SVD_DRY = ("--sizes", "32x64", "48x64", "48x96", "--ranks", "8")
# One GPU does what eight would: as many slices, and a micro-batch of its own for each. A method that hangs is ended.
ONE_GPU = (
    *("--num_accelerators", "1", "--slices", "8", "--accumulation", "8"),
    *("--steps", "4", "--warmup", "2", "--timeout", "300"),
)
REFERENCE = ("--methods", "hd_pissa", "frozen", "reference", "--label", "reference", *ONE_GPU)
ONE_CPU = ("--model", "tiny", "--layers", "1", "--methods", "hd_pissa", "frozen", "--slices", "1", "--steps", "1")
MEMCHECK = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
# memcheck sees reads behind a tensor only where every tensor is an allocation of its own
NO_POOL = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SLOWER = 5  # limits of the dry form, on a few busy cores
INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Phase:
    """A script with its arguments, in its own process.

    Attributes:
        limit: seconds after which it is ended, about one and a half times what it is expected to take.
        env: in addition to that of all phases. dry_env: in the dry form instead.
        under: the tool that the script runs under, not in the dry form.
        dry: more arguments in the dry form.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    env: dict[str, str] = field(default_factory=dict)
    dry_env: dict[str, str] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()

    def full(self, dry: bool) -> list[str]:
        script, *arguments = self.command
        arguments += self.dry if dry else ()
        return [*(() if dry else self.under), sys.executable, "-u", f"benchmarks/{script}", *arguments]


PHASES = (
    Phase("environment", ("gpu/gpu_environment.py",), 60),
    Phase("smoke", ("gpu/gpu_smoke.py",), 120),
    Phase("tests", ("gpu/gpu_tests.py",), 140, dry_env=INTERPRETED),
    Phase("step", ("step/whole_step.py",), 160),
    Phase("profile", ("gpu/gpu_profile.py",), 60),
    Phase("kernels", ("kernel_timing/time_kernels.py",), 110, dry_env=INTERPRETED),
    Phase("svd", ("startup/svd_methods.py", *SVD), 60, dry=SVD_DRY),
    Phase("memcheck", ("kernel_timing/memcheck_run.py",), 90, NO_POOL, INTERPRETED, MEMCHECK),
)
BY_NAME = (
    *(
        Phase(f"throughput-{model}", ("step/throughput.py", "--model", model, *ONE_GPU), 1800, dry=ONE_CPU)
        for model in ("smollm2-135m", "0.5b", "1.5b", "llama-2-7b")
    ),
    # in fp32, as published, more layers of its dense side path do not fit
    Phase("reference", ("step/throughput.py", "--model", "llama-2-7b", "--layers", "3", *REFERENCE), 300, dry=ONE_CPU),
)


def prepare(folder: Path) -> dict[str, str]:
    """The environment of all phases: this checkout as package `hdpissa`, and what `.whl/` holds."""
    (folder / "source").mkdir()
    (folder / "source" / "hdpissa").symlink_to(ROOT)
    paths = [folder / "source"]
    # the rows are the result; those of the single scripts are not kept
    found = {"PYTHONWARNINGS": "ignore::FutureWarning", "HDPISSA_RESULTS": str(folder / "results")}
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    if wheels:
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        install = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), *wheels]
        subprocess.run(install, check=True)
        paths.append(folder / "site")
        found["PATH"] = f"{folder / 'site' / 'bin'}{os.pathsep}{os.environ['PATH']}"  # the deepspeed launcher
    if CACHE.is_file():
        unpack_cache(CACHE, folder / "triton")
        found["TRITON_CACHE_DIR"] = str(folder / "triton")
    paths += [Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {**os.environ, **found, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def unpack_cache(archive: Path, target: Path) -> None:
    """Unpacks a Triton cache, whose files name each other by absolute paths: those of where it was made."""
    with tarfile.open(archive) as files:
        files.extractall(target, filter="data")
    for group in target.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.with_name(name)) for name in names}}))


def missing(env: dict[str, str], dry: bool) -> str:
    """What keeps this machine from running, in one line; empty when nothing does."""
    absent = _printed(f"import importlib.util as u; print(*[n for n in {NEEDED!r} if u.find_spec(n) is None])", env)
    parts = [f"no {', '.join(absent.split())} (install, or put wheels into .whl/)"] if absent else []
    sees_gpu = "import torch; print(torch.cuda.is_available())"
    if not dry and "torch" not in absent.split() and _printed(sees_gpu, env) != "True":
        parts.append("no GPU (torch.cuda.is_available() is False); --dry runs the phases without one")
    return "; ".join(parts)


def _printed(program: str, env: dict[str, str]) -> str:
    """The last line that a Python program prints."""
    printed = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True).stdout
    return (printed.splitlines() or [""])[-1]


class Runner:
    """Runs phases one after another; what they print is shown and logged."""

    def __init__(self, folder: Path, env: dict[str, str], *, dry: bool) -> None:
        self.folder, self.dry = folder, dry
        self.log = folder / "gpu.log"
        self.log.write_text("")
        self.env = env | {gpu_rows.FILE_VARIABLE: str(folder / gpu_rows.FILE)}
        if dry:
            self.env |= {gpu_rows.DRY_VARIABLE: "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}

    def run(self, phase: Phase) -> str:
        """ "passed", or what went wrong; a row of `phases` says so too."""
        start = time.monotonic()
        own = phase.dry_env if self.dry else phase.env
        limit = phase.limit * (SLOWER if self.dry else 1)
        outcome = self._watched(phase.full(self.dry), limit, {**own, gpu_rows.PHASE_VARIABLE: phase.name})
        seconds = round(time.monotonic() - start, 1)
        row = {"phase": "phases", "name": phase.name, "outcome": outcome, "seconds": seconds, "limit": limit}
        gpu_rows.append(self.folder / gpu_rows.FILE, row | ({"dry": True} if self.dry else {}))
        return outcome

    def _watched(self, command: list[str], limit: float, own: dict[str, str]) -> str:
        if shutil.which(command[0]) is None:
            return f"{command[0]} is not on this machine"
        self.log_line(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.env | own, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            self.log_line(line)
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
        if late:
            return f"stopped after {limit} s"
        return "passed" if code == 0 else f"exit code {code}"

    def log_line(self, text: str) -> None:
        print(text, end="", flush=True)
        with self.log.open("a") as file:
            file.write(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [phase.name for phase in (*PHASES, *BY_NAME)]
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"of {', '.join(known)}; default: the first eight")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with toy sizes")
    args = parser.parse_args(argv)
    unknown = [name for name in args.phases if name not in known]
    if unknown:
        parser.error(f"no phase {', '.join(unknown)}; there are {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    phases = [phase for phase in (*PHASES, *BY_NAME) if phase.name in args.phases] if args.phases else list(PHASES)
    folder = Path(os.environ.get("OUT") or gpu_rows.FOLDER.with_name("gpu-dry" if args.dry else "gpu"))
    with tempfile.TemporaryDirectory() as scratch:
        env = prepare(Path(scratch))
        obstacle = missing(env, args.dry)
        if obstacle:
            print(f"gpu/run.py: {obstacle}", file=sys.stderr)
            return 2
        folder.mkdir(parents=True, exist_ok=True)
        gpu_rows.drop(folder, {"phases", *(phase.name for phase in phases)})
        runner = Runner(folder, env, dry=args.dry)
        outcomes = [runner.run(phase) for phase in phases]
        gpu_rows.write_markdown(folder)
        summary = [f"{phase.name}: {outcome}" for phase, outcome in zip(phases, outcomes, strict=True)]
        runner.log_line("\n" + "\n".join(summary) + f"\n{folder / 'gpu.md'}\n")
    return 0 if set(outcomes) == {"passed"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
