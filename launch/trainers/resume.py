"""Which checkpoint a run goes on from, and whether it is one of this run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from hdpissa.engine import consensus
from hdpissa.engine.checkpoint import directory
from hdpissa.engine.checkpoint import state as checkpoint
from hdpissa.engine.checkpoint.manifest import MANIFEST, CheckpointError
from hdpissa.engine.checkpoint.reader import CheckpointReader
from hdpissa.engine.errors import StopError

SAMPLED = 64


def find_checkpoint(wanted: str | bool | None, output_dir: Path) -> CheckpointReader | None:
    """The checkpoint that `resume_from_checkpoint` means, every file compared with its checksum; collective.

    Args:
        wanted: a checkpoint, or a folder of them; True: the newest sound one of `output_dir`; "auto": likewise, or
            None where there is none.

    Raises:
        CheckpointError: on all ranks alike.
    """
    if wanted in (None, False):
        return None
    if wanted in (True, "auto", "true", "True"):
        if wanted == "auto" and not _any(output_dir):
            return None
        return checkpoint.open_checkpoint(output_dir, fall_back=True)
    return checkpoint.open_checkpoint(str(wanted))


def _any(folder: Path) -> bool:
    """Whether rank 0 sees checkpoints; collective."""
    return _of_rank_0(lambda: folder.is_dir() and bool(directory.candidates(folder)))


def _of_rank_0(function: Callable[[], Any]) -> Any:
    """What a function returns there, where the files are; raises StopError on all ranks if it cannot. Collective."""
    try:
        return consensus.from_rank0(function)
    except consensus.RankFailedError as error:
        raise StopError(str(error)) from None


def existing(best: str | None, output_dir: Path) -> str | None:
    """The best checkpoint, or what stands in for it: saving it may have failed, or the folder been moved; collective.

    Args:
        best: as the trainer's state has it.
    """

    def find() -> str | None:
        if best is None or (Path(best) / MANIFEST).is_file():
            return best
        tag = directory.best(output_dir)
        return str(output_dir / tag) if tag and (output_dir / tag / MANIFEST).is_file() else None

    return _of_rank_0(find)


def point_to_best(output_dir: Path, best: str | None) -> None:
    """Makes the folder's `best` what the trainer's state says where a run begins, or goes on from further back.

    Collective; raises StopError where the folder cannot be written.
    """

    def point() -> None:
        tag = Path(best).name if best else None
        directory.point_to_best(output_dir, tag if tag and (output_dir / tag / MANIFEST).is_file() else None)

    _of_rank_0(point)


def refuse_fewer_steps(reader: CheckpointReader, max_steps: int) -> None:
    """Raises CheckpointError where the run would have ended before the checkpoint."""
    if reader.manifest.step > max_steps:
        raise CheckpointError(
            f"max_steps is {max_steps} and {reader.folder} was saved after step {reader.manifest.step}: give at least "
            f"so many, or an earlier checkpoint"
        )


def refuse_passes(reader: CheckpointReader) -> None:
    """Raises CheckpointError for a stream that had been through: where its next pass stood is not known."""
    if passes := reader.manifest.client_state.get("passes", 0):
        raise CheckpointError(
            f"{reader.folder} was saved in pass {passes + 1} over a stream, and a stream is resumed in its first only: "
            f"give --ignore_data_skip (ignore_data_skip=True) to begin a pass anew, or a dataset that is no stream"
        )


def sample(dataset: Any) -> str | None:
    """Checksum of up to 64 rows of a dataset as it was given; None where rows cannot be asked for by number.

    A dataset's own fingerprint would not do: it is another one in every process where a function of `map` holds a
    tokenizer.
    """
    if not isinstance(dataset, datasets.Dataset):
        return None
    positions = sorted({len(dataset) * n // SAMPLED for n in range(SAMPLED)}) if len(dataset) else []
    rows = dataset.with_format("arrow")[positions].to_pylist() if positions else []
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()[:16]


def refuse_other_data(reader: CheckpointReader, here: dict[str, Any]) -> None:
    """Raises CheckpointError where the steps so far have seen other data than this run would have given them."""
    there = reader.manifest.client_state.get("data", {})
    other = [f"{k}: {there.get(k)} then, {v} now" for k, v in here.items() if there.get(k) != v]
    if other:
        raise CheckpointError(
            f"{reader.folder} was trained on other data, or in another order ({'; '.join(other)}): give the same "
            f"again, or --ignore_data_skip (ignore_data_skip=True) to begin the data anew"
        )
