"""How a model is prompted, in the export of a checkpoint: the chat template of its run, and the tokens that end a turn.

By the state that train.py leaves in a checkpoint (`RunEnds.description`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hdpissa.engine.export.from_checkpoint import read_json

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"  # in transformers
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_prompt_files(state: dict[str, Any], folder: Path, base: Path, *, format: str) -> None:
    """Writes the template in place of the base's and, for a whole model, adds the ends of turn to the base's EOS."""
    if state.get("chat_template"):
        (folder / TEMPLATE).write_text(state["chat_template"], encoding="utf-8")
    if format == "hf" and state.get("stop_token_ids"):
        config = read_json(base / "config.json") or {}
        generation = read_json(folder / GENERATION) or {n: config[n] for n in SPECIAL if config.get(n) is not None}
        own = generation.get("eos_token_id")
        ends = own if isinstance(own, list) else [own] if own is not None else []
        generation["eos_token_id"] = list(dict.fromkeys([*ends, *state["stop_token_ids"]]))
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
