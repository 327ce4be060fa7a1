"""A W&B server that never answers, a run that reports there, and whether what was reported is what was written."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch_runs import train_here
from wandb_file import history, offline_run


@contextlib.contextmanager
def silent_server(*, answer: bytes = b"") -> Iterator[str]:
    """Takes connections; answers nothing, or the same to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    if answer:
                        kept[-1].recv(4096)
                        kept[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def train_with_reports(argv: list[str], cache: str, url: str) -> dict[str, Any]:
    """`train_here` with an account of W&B's, whose server does not answer."""
    os.environ.update(WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=url, WANDB_PROJECT="molehills")
    os.environ.update(WANDB_X_DISABLE_STATS="true", NO_PROXY="127.0.0.1")
    for name in ("WANDB_MODE", "WANDB_NAME", "WANDB_DIR"):
        os.environ.pop(name, None)
    return train_here([*argv, "--report_to", "tensorboard", "wandb"], cache)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What of a row is a figure, under its own names."""
    parts = [(f"{k}/{i}", x) for k, v in row.items() if isinstance(v, list) for i, x in enumerate(v)]
    parts += [(k, v) for k, v in row.items() if not isinstance(v, list)]
    return {k: float(v) for k, v in parts if isinstance(v, int | float) and k != "step"}


def assert_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    """W&B's file below the folder holds every figure of the rows, in their order."""
    found = history(offline_run(folder))
    assert [row["train/global_step"] for row in found] == [row["step"] for row in rows]
    for one, row in zip(found, rows, strict=True):
        plain = {k.split("/", 1)[1]: v for k, v in one.items() if not isinstance(v, str) and k != "train/global_step"}
        assert plain == {k.removeprefix("eval_"): v for k, v in numbers(row).items()}
