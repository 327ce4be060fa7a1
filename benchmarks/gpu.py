"""Everything that needs a GPU, in one go: `make gpu`, or `python3 benchmarks/gpu.py [PHASE ...]`.

    environment   device, versions, what is missing
    tests         every kernel against float64 (tests/test_kernel_*.py)
    sanitizer     compute-sanitizer's memcheck over one launch of every kernel
    bench         the kernels' benchmarks (bench_*.py)
    linear        layers of two Llamas against frozen Linears and LoRA (linear_layers.py)
    step          a whole optimizer step of a 7B model (whole_step.py)
    throughput    whole steps of four models through the launcher, all methods, on one GPU (throughput.py)

GPU_PHASES names phases, too ("tests bench"). Every phase has a time limit, and goes on when an earlier one has failed;
the exit code is 1 if one has. Results are in `benchmarks/results/`. Where OUT names a folder, one JSON, one Markdown
file and the log are kept there, up to date after every phase.

Runs with the Python that starts it, which needs torch with CUDA, triton, transformers, peft, pytest and hypothesis. The
package is used from this checkout, it need not be installed; wheels in `.whl/` are installed beside it for the
time of the run, without network (benchmarks/README.md). Imports nothing but the standard library itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# By the names that they are imported under: what the phases import themselves, and what DeepSpeed brings no wheel for.
NEEDED = (
    *("torch", "triton", "transformers", "peft", "pytest", "hypothesis", "deepspeed", "pydantic", "datasets"),
    *(
        "numpy",
        "psutil",
        "yaml",
        "safetensors",
        "filelock",
        "jinja2",
        "hjson",
        "msgpack",
        "einops",
        "tqdm",
        "packaging",
    ),
)
# Whatever else is missing for the scripts, their imports find out.
IMPORTS = "import hdpissa.benchmarks.throughput, hdpissa.benchmarks.method_zero3, hdpissa.benchmarks.whole_step"

REPORT = """
import importlib.metadata as m, torch
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), f"{torch.cuda.mem_get_info()[1] / 1e9:.0f} GB")
names = m.packages_distributions()
print("cuda", torch.version.cuda, *(f"{n} {m.version(names[n][0])}" for n in NEEDED))
""".replace("NEEDED", repr(NEEDED))


def commands(phase: str) -> list[tuple[list[str], int]]:
    """The commands of a phase, each with its time limit in seconds."""
    python = [sys.executable, "-u"]

    def script(name: str, limit: int, *arguments: str) -> tuple[list[str], int]:
        return [*python, f"benchmarks/{name}", *arguments], limit

    if phase == "environment":
        return [(["nvidia-smi"], 30), ([*python, "-c", REPORT], 60)]
    if phase == "tests":
        files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_kernel_*.py"))]
        files.remove("tests/test_kernel_aot.py")  # needs no GPU
        files.remove("tests/test_kernel_mutations.py")  # broken on purpose: reads beyond a tensor end a GPU process
        files.append("tests/test_shared_input.py")  # the layers that use them, on the thread that autograd uses there
        files.append("tests/test_engine_triton.py")  # the engine that uses the layers; its ranks stay on the CPU
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        return [([*python, "-m", "pytest", "-q", "-m", "not slow", *workers, *files], 240)]
    if phase == "sanitizer":
        check = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        return [([*check, *python, "benchmarks/memcheck_run.py"], 150)]
    if phase == "bench":
        return [script(p.name, 90) for p in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    if phase == "linear":
        return [script("linear_layers.py", 180)]
    if phase == "throughput":
        models = ("smollm2-135m", "0.5b", "1.5b", "llama-2-7b")
        # one GPU does what eight would: as many slices, and a micro-batch of its own for each
        words = ["--num_accelerators", "1", "--slices", "8", "--accumulation", "8", "--steps", "4", "--warmup", "2"]
        # a method that hangs is ended well before the script is, and the others still run
        words += ["--timeout", str(THROUGHPUT_LIMIT // 3)]
        return [script("throughput.py", THROUGHPUT_LIMIT, *words, "--model", model) for model in models]
    return [script("whole_step.py", 300, "--random_slices")]


THROUGHPUT_LIMIT = 900
PHASES = ("environment", "tests", "sanitizer", "bench", "linear", "step", "throughput")


def prepare(folder: Path) -> dict[str, str]:
    """The environment of all commands: this checkout as package `hdpissa`, and what `.whl/` holds."""
    (folder / "source").mkdir()
    (folder / "source" / "hdpissa").symlink_to(ROOT)
    paths = [folder / "source"]
    scripts: dict[str, str] = {}
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    if wheels:
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        install = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), *wheels]
        subprocess.run(install, check=True)
        paths.append(folder / "site")
        scripts = {"PATH": f"{folder / 'site' / 'bin'}{os.pathsep}{os.environ['PATH']}"}  # the deepspeed launcher
    paths += [Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    fewer_warnings = {"PYTHONWARNINGS": "ignore::FutureWarning"}
    return {**os.environ, **fewer_warnings, **scripts, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def missing(env: dict[str, str]) -> str:
    """What keeps this machine from running, in one line; empty when nothing does."""
    absent = _ask(f"import importlib.util as u; print(*[n for n in {NEEDED!r} if u.find_spec(n) is None])", env)
    parts = [f"no {', '.join(absent.split())} (install, or put wheels into .whl/)"] if absent else []
    if "torch" not in absent.split() and _ask("import torch; print(torch.cuda.is_available())", env) != "True":
        parts.append("no GPU (torch.cuda.is_available() is False)")
    return "; ".join(parts) or broken(env)


def broken(env: dict[str, str]) -> str:
    """Why the scripts cannot be imported, by the last line of the error; empty where they can."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=env, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"imports fail: {(done.stderr.splitlines() or ['no reason given'])[-1]}"


def _ask(program: str, env: dict[str, str]) -> str:
    """The last line that a Python program prints."""
    printed = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True).stdout
    return (printed.splitlines() or [""])[-1]


def run(command: list[str], limit: int, env: dict[str, str], log: Path) -> str:
    """Runs a command with its output shown and logged; "passed", or what went wrong."""
    shown = " ".join(part if "\n" not in part else "..." for part in command)
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on this machine"
    _tell(log, f"\n$ {shown}\n")
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        _tell(log, line)
    code = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    if late:
        return f"stopped after {limit} s"
    return "passed" if code == 0 else f"exit code {code}"


def _tell(log: Path, text: str) -> None:
    print(text, end="", flush=True)
    with log.open("a") as file:
        file.write(text)


def collect(folder: Path, summary: list[str], since: float) -> None:
    """All results of this run as one JSON and one Markdown file, and the log."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = [p for p in sorted(RESULTS.glob("*")) if p.stat().st_mtime >= since]
    tables = {p.stem: json.loads(p.read_text()) for p in fresh if p.suffix == ".json"}
    (folder / "gpu.json").write_text(json.dumps({"phases": summary, "results": tables}, indent=1) + "\n")
    texts = [p.read_text() for p in fresh if p.suffix == ".md"]
    (folder / "gpu.md").write_text("\n".join(["# Phases\n", *[f"* {line}" for line in summary], "", *texts]))
    shutil.copy(RESULTS / "gpu.log", folder)


def main() -> int:
    wanted = sys.argv[1:] or os.environ.get("GPU_PHASES", "").split() or list(PHASES)
    unknown = [phase for phase in wanted if phase not in PHASES]
    if unknown:
        print(f"gpu.py: no phase {', '.join(unknown)}; there are {', '.join(PHASES)}", file=sys.stderr)
        return 2
    since = time.time()
    summary: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        env = prepare(Path(folder))
        obstacle = missing(env)
        if obstacle:
            print(f"gpu.py: {obstacle}", file=sys.stderr)
            return 2
        RESULTS.mkdir(exist_ok=True)
        log = RESULTS / "gpu.log"
        log.write_text("")
        for phase in wanted:
            for command, limit in commands(phase):
                start = time.time()
                outcome = run(command, limit, {**env, **extra(phase)}, log)
                summary.append(f"{phase}: {_name(command)}: {outcome} ({time.time() - start:.0f} s)")
                if "OUT" in os.environ:
                    collect(Path(os.environ["OUT"]), summary, since)
        _tell(log, "\n" + "\n".join(summary) + "\n")
    return 0 if all(": passed (" in line for line in summary) else 1


def extra(phase: str) -> dict[str, str]:
    """memcheck sees reads behind a tensor only where every tensor is an allocation of its own."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if phase == "sanitizer" else {}


def _name(command: list[str]) -> str:
    scripts = [Path(part).name for part in command if part.endswith(".py")]
    return scripts[0] if len(scripts) == 1 else Path(command[0]).name if not scripts else "pytest"


if __name__ == "__main__":
    raise SystemExit(main())
