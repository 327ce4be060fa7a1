"""Which of several ways to compute the same thing is fastest here: measured once, remembered, told; never guessed.

A choice is known by what it depends on (operation, shape, dtype) and by the device and versions it was measured on. It
is kept in the process and in a JSON file, so that a second run starts, and computes, as the first did.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

WARM_UP, REPEATS = 3, 11
_known: dict[str, str] = {}


def _file() -> Path:
    name = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    folder = Path(os.environ.get("HDPISSA_CACHE", Path.home() / ".cache" / "hdpissa"))
    versions = "-".join(f"{package}{version(package)}" for package in ("hdpissa", "torch", "triton"))
    return folder / f"choices-{name}-{versions}.json"


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # absent, or not ours: measured again
        return {}


def _remember(key: str, chosen: str) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(_read(path) | {key: chosen}, indent=1, sort_keys=True))
            os.replace(partial, path)
    except OSError as error:  # a full or read-only home is no reason to stop a run
        logger.warning("the choice for %s could not be kept in %s: %s", key, path, error)


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of one call on the current GPU, by events."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _time(name: str, run: Callable[[], object], measure: Callable[[Callable[[], object]], float]) -> float:
    """Its time, or infinity where it cannot run here (a chip with less shared memory than the kernel wants)."""
    try:
        return measure(run)
    except Exception as error:
        logger.warning("%s cannot run here and is left out: %s", name, error)
        return math.inf


def fastest(
    key: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    measure: Callable[[Callable[[], object]], float] = milliseconds,
) -> str:
    """The name of the fastest candidate; measured when nobody has on this device, else remembered.

    Args:
        key: what the choice depends on, e.g. "forward T8192 I4096 O4096 r16 bfloat16".
        candidates: name → a call without side effects. At a tie the first wins.
    """
    if key not in _known:
        kept = _read(_file()).get(key)
        if kept is None or kept not in candidates:
            times = {name: _time(name, run, measure) for name, run in candidates.items()}
            kept = min(times, key=times.__getitem__)
            told = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
            logger.info("%s: %s (%s)", key, kept, told)
            _remember(key, kept)
        _known[key] = kept
    return _known[key]
