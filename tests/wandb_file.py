"""Reads the .wandb file of an offline run.

Up to 0.2x W&B's package had a reader in Python (`wandb.sdk.internal.datastore`); now only its Go program has one. The
container is LevelDB's log format behind a header of seven bytes; what is in it are W&B's own protocol buffers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, _MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, as wandb's `Record`."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert struct.unpack("<4sHB", data[:HEADER])[:2] == (b":W&B", 0xBEE1)
    at, whole = HEADER, b""
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that has no room for a header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER
        whole = (b"" if kind in (FULL, FIRST) else whole) + data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def offline_run(folder: Path) -> Path:
    """The one .wandb file below a folder."""
    (found,) = folder.rglob("*.wandb")
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, row by row, without W&B's own columns."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def described(path: Path) -> tuple[str, str, dict[str, Any]]:
    """(project, name, config) of the run."""
    name = project = ""
    config: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name, project = record.run.display_name, record.run.project
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            config |= {update.key or "/".join(update.nested_key): json.loads(update.value_json) for update in updates}
    return project, name, config
