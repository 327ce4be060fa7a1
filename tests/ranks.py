"""Runs a function on K real ranks: real processes, real gloo, real DeepSpeed, imported once.

A fork server imports torch, transformers and DeepSpeed one time and runs no torch operation itself
(threads do not survive a fork); every rank of every test is a fork of it, so that it starts in a
fraction of a second and nothing of DeepSpeed's global state leaks from one test into the next.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nccl_rules
import rooms
import torch

rooms.put_on_path()
os.environ["DS_ACCELERATOR"] = "cpu"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preload"])


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    one_gpu: bool = False,
    lost_peer: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """function(*args, **kwargs) on `world_size` ranks; returns the results in rank order.

    Their collectives are held to NCCL's rules (`nccl_rules`). The function must be importable by name (a module of
    tests/), arguments and results picklable.

    Args:
        one_gpu: they all compute on this machine's first GPU, and talk through gloo: NCCL wants a GPU for each.
        lost_peer: a rank fails or leaves on purpose, so that others issue collectives that it does not.
    """
    # the fork server's DeepSpeed is set to the CPU
    context, begin = (multiprocessing.get_context("spawn"), _rank_on_gpu) if one_gpu else (_context, _rank)
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = [
            context.Process(target=begin, args=(r, world_size, port, folder, function, args, kwargs))
            for r in range(world_size)
        ]
        for w in workers:
            w.start()
        for w in workers:
            w.join(timeout)
        hung = [r for r, w in enumerate(workers) if w.is_alive()]
        for w in workers:
            w.kill()
            w.join()
        errors = [Path(folder, f"{r}.err") for r in range(world_size)]
        told = [e.read_text() for e in errors if e.exists()]
        if told or hung or any(w.exitcode for w in workers):
            codes = [w.exitcode for w in workers]
            raise RankError(f"exit codes {codes}, hung ranks {hung}\n" + "\n".join(told))
        ended = [torch.load(Path(folder, f"{r}.pt"), weights_only=False) for r in range(world_size)]
        nccl_rules.compare([recorder for _, recorder in ended], lost_peer=lost_peer)
        return [result for result, _ in ended]


def _rank_on_gpu(rank: int, world_size: int, port: int, *rest: Any) -> None:
    """`_rank` in a process that has not imported DeepSpeed, with the process group that the engine is to take."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    os.environ["LOCAL_RANK"] = "0"
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    _rank(rank, world_size, port, *rest)


def _rank(rank: int, world_size: int, port: int, folder: str, function: Callable, args: tuple, kwargs: dict) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=os.environ.get("LOCAL_RANK", str(rank)), WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DEEPSPEED_TIMEOUT="2",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recorder = nccl_rules.Recorder()
    recorder.install()
    try:
        result = function(*args, **kwargs)
        torch.save((result, recorder), Path(folder, f"{rank}.pt"))
    except BaseException:
        Path(folder, f"{rank}.err").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    # Threads of gloo and of DeepSpeed need no orderly end here, and an abort at exit would hide the result.
    os._exit(0)
