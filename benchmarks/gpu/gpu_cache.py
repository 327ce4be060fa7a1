"""Fills a Triton cache that a GPU machine can be given: `make gpu-cache`, or `python benchmarks/gpu/gpu_cache.py`.

Every launch that gpu.py's phases tests, step, kernels and memcheck make, and the smoke's on one rank, is compiled for
an H100 or H200 as there (launch_capture.py), without a GPU. A kernel's key holds a digest of Triton's library, which
differs between Python's versions: that of the GPU machine's Python (--python) is taken from Triton's wheel, the version
installed here, which pip fetches once. Only what a launch reads is kept: machine code and its description, not what the
compiler wrote on the way. They stay in `.triton-cache/`, from which the next call goes on, and are packed into
`.triton-cache.tar.xz`, which gpu.py unpacks.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hdpissa.benchmarks.gpu import run as gpu

WANTED = (".json", ".cubin")
LIBRARY = "_C/libtriton.so"


# --- the key --------------------------------------------------------------------------------------------------------


def library_digest(python: str, folder: Path) -> str:
    """The digest of Triton's library for a Python such as "3.12", kept in `folder`."""
    import triton

    kept = folder / f"libtriton-{triton.__version__}-python{python}.sha256"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", python, "--platform", "manylinux_2_27_x86_64", "-d", scratch]
            subprocess.run([*command, f"triton=={triton.__version__}"], check=True)
            [wheel] = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                kept.write_text(hashlib.sha256(files.read(f"triton/{LIBRARY}")).hexdigest())
    return kept.read_text()


@contextmanager
def keys_of(digest: str) -> Iterator[None]:
    """Kernels are found and kept under the keys that Triton with that library has."""
    import triton
    from triton.runtime import cache

    own = hashlib.sha256((Path(triton.__file__).parent / LIBRARY).read_bytes()).hexdigest()
    key = cache.triton_key()
    if own not in key:
        raise RuntimeError(f"Triton {triton.__version__} has another form of key; its library is not in it")
    with mock.patch.object(cache, "triton_key", return_value=key.replace(own, digest)):
        yield


# --- the programs: each makes the launches of a phase, in a process of its own ----------------------------------------


@contextmanager
def computing() -> Iterator[None]:
    """A capture in which results are there all the same: each kernel's launch is followed by its reference."""
    from hdpissa.benchmarks.kernel_timing.launch_capture import capture
    from hdpissa.kernels import api, reference

    choose = api._choose

    def both(name: str, impl: str, tensor: Any) -> Callable[..., Any]:
        chosen, plain = choose(name, impl, tensor), getattr(reference, name)

        def call(*args: Any, **how: Any) -> Any:
            if chosen is not plain:
                chosen(*args, **how)
            return plain(*args, **how)

        return call

    with capture(), mock.patch.object(api, "_choose", both):
        yield


def tests(first: int) -> None:
    """Every second file of the tests: they take longest."""
    import pytest

    from hdpissa.benchmarks.gpu import gpu_tests

    chosen = [name for name in gpu_tests.files() if name != gpu_tests.ENGINE][first::2]
    with computing():
        pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *chosen])


def smoke() -> None:
    from hdpissa.benchmarks.gpu import gpu_smoke
    from hdpissa.launch import train

    with tempfile.TemporaryDirectory() as folder, computing():
        life = gpu_smoke.Life(Path(folder))
        arguments = life.arguments | {"output_dir": f"{folder}/run", "gradient_accumulation_steps": 2}
        assert train.run(gpu_smoke.flags(arguments)) == 0


def step() -> None:
    """A layer of a quarter of the 7B model's widths, which has the same blocks.

    Twice at first: Linears that share an input are found in the first micro-batch.
    """
    import torch

    from hdpissa.benchmarks.kernel_timing.launch_capture import capture
    from hdpissa.benchmarks.step import plain_engine, whole_step

    work = replace(whole_step.Work(), sizes=(1024, 2752, 1, 8, 8, 512, False))
    model = whole_step.llama(work, torch.device("cpu"))
    (short, _), (long, _) = work.lengths
    with capture():
        optimizer = plain_engine.attach(model, r=work.r, slices=work.slices)
        for length in (short, short, long):
            ids = torch.arange(length)[None] % work.sizes[5]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.store.end_of_backward()
        optimizer.reduce()
        optimizer.vote(torch.zeros(4, dtype=torch.float64))
        optimizer.step()


def kernels() -> None:
    """The cases of time_kernels.py. Only our launches are made: operands have no values, products no time."""
    import torch

    from hdpissa.benchmarks.common import timing
    from hdpissa.benchmarks.kernel_timing import time_kernels
    from hdpissa.benchmarks.kernel_timing.launch_capture import capture

    def once(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
        for column, work in works.items():
            if column not in ("torch ms", "linear ms"):
                work()
        return dict.fromkeys(works, 1.0)

    def product(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        return x.new_empty(len(x), len(W))

    # where blocks do not depend on sizes, small ones that divide as those do: the same kernels
    small = (time_kernels.Shape("small", 1024, 1024),)
    sizes = replace(time_kernels.Sizes(), weights=small, shard=2**20, factors=(2**20,), draw=torch.zeros)
    here: dict[str, Any] = {"need_gpu": lambda: torch.device("cpu"), "copy_bandwidth": lambda: 1.0, "medians": once}
    with mock.patch.multiple(timing, **here), mock.patch("torch.nn.functional.linear", product), capture():
        for row in time_kernels.rows(sizes):
            assert "failed" not in row, row


def memcheck() -> None:
    import torch

    from hdpissa.benchmarks.kernel_timing import memcheck_run
    from hdpissa.benchmarks.kernel_timing.launch_capture import capture

    with capture():
        for _ in memcheck_run.rows(torch.device("cpu")):
            pass


PROGRAMS: dict[str, Callable[[], None]] = {
    "tests0": partial(tests, 0), "tests1": partial(tests, 1), "step": step, "kernels": kernels, "smoke": smoke,
    "memcheck": memcheck,
}  # fmt: skip


# --- all of them ----------------------------------------------------------------------------------------------------


def run(name: str, folder: Path, python: str) -> str:
    """A program in a process of its own; "" or the end of its output where it failed."""
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder), "--python", python]
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return "" if done.returncode == 0 else f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}"


def prune(folder: Path) -> None:
    """Removes what no launch reads."""
    for path in folder.glob("*/*"):
        if path.suffix not in WANTED:
            path.unlink()
    for path in folder.iterdir():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def pack(folder: Path) -> Path:
    """The folder as an archive next to it."""
    archive = folder.with_name(f"{folder.name}.tar.xz")
    with tarfile.open(archive, "w:xz") as files:
        files.add(folder, ".")
    return archive


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's (default 3.12)")
    parser.add_argument("--folder", type=Path, default=gpu.ROOT / ".triton-cache")
    parser.add_argument("--only", choices=PROGRAMS, help="one program, in this process; TRITON_CACHE_DIR is set")
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    digest = library_digest(args.python, args.folder)
    if args.only:
        with keys_of(digest):
            PROGRAMS[args.only]()
        return 0
    start = time.monotonic()
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        failures = list(filter(None, pool.map(lambda name: run(name, args.folder, args.python), PROGRAMS)))
    prune(args.folder)
    archive = pack(args.folder)
    count, size = len(list(args.folder.glob("*/*.cubin"))), archive.stat().st_size / 1e6
    print("\n".join(failures), file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"carry {archive}: {count} kernels for Python {args.python}, {size:.1f} MB, in {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
