"""What an export from a checkpoint says of prompts: the chat template of its tokenizer, and where an answer ends.

By the state that train.py left in the checkpoint; those of 0.1 have less of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"  # in transformers
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def trained_template(state: dict[str, Any]) -> str | None:
    """The template that --chat_template gave the run, by a checkpoint's state; None: the base's, or unknown."""
    if isinstance(kept := state.get("chat_template"), str):
        return kept
    given = _given_template(state)  # checkpoints of 0.1 have what the command line said, which may be a file's name
    return given if "{{" in given or "{%" in given else None


def lost_template(state: dict[str, Any]) -> str:
    """What to tell of a template that an export cannot have, "" where it has the one that was trained with."""
    given = _given_template(state)
    if given in ("", "tokenizer") or trained_template(state) is not None:
        return ""
    return (
        f"the run was trained with --chat_template {given[:80]}, whose text is not in the checkpoint: the export's "
        f"tokenizer has the base's; save yours beside it as {TEMPLATE}"
    )


def _given_template(state: dict[str, Any]) -> str:
    arguments = state.get("arguments")
    given = arguments.get("chat_template") if isinstance(arguments, dict) else None
    return given if isinstance(given, str) else ""


def write_template(state: dict[str, Any], folder: Path) -> None:
    """In place of the base's; `AutoTokenizer` takes this file before what tokenizer_config.json says."""
    if (text := trained_template(state)) is not None:
        (folder / TEMPLATE).write_text(text, encoding="utf-8")


def write_stops(state: dict[str, Any], base: Path | None, folder: Path) -> None:
    """The end of a chat's turn beside the base's own ends, as the run's export has it."""
    stops = state.get("stop_token_ids")
    if not isinstance(stops, list):  # rows that are no chats, and checkpoints of 0.1
        return
    config = read_config(base)
    made = {name: config[name] for name in SPECIAL if config.get(name) is not None}  # as transformers makes one
    found = _json_object(folder / GENERATION) or made
    own = found.get("eos_token_id")
    ends = list(own) if isinstance(own, list) else [own] if own is not None else []
    found["eos_token_id"] = list(dict.fromkeys([*ends, *stops]))
    (folder / GENERATION).write_text(json.dumps(found, indent=2) + "\n")


def read_config(base: Path | None) -> dict[str, Any]:
    """config.json of a base; empty where it has none."""
    return _json_object(base / "config.json") if base else {}


def _json_object(path: Path) -> dict[str, Any]:
    """A file's; empty where it has none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
