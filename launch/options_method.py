"""Options of train.py, "method": what the section hd_pissa of the JSON says, where that leaves it open.

The names are PEFT's. A value that the JSON gives, too, must be the same there; "auto" there, or nothing, leaves it to
the command line (engine/overrides.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import at_least, json_object, option

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
ALL_LINEAR = "all-linear"


@dataclass
class MethodOptions:
    """What is trained, and at which rank; default: what the section hd_pissa of the JSON says."""

    r: int | None = option(None, "rank of one slice (default 16)")
    lora_alpha: float | None = option(None, "alpha / r scales the change of W (default r, the method itself)")
    slices: str | None = option(None, "slices of each weight: a number, or auto, one per rank (default)")
    target_modules: list[str] | None = option(
        None,
        "names or suffixes of Linears to train, or all-linear, or one regular expression (default: q_proj "
        "k_proj v_proj o_proj gate_proj up_proj down_proj)",
    )
    exclude_modules: list[str] | None = option(None, "names or suffixes to leave out, or one regular expression")
    rank_pattern: str | None = option(None, "JSON: name, suffix or regular expression → its own r")
    modules_to_save: list[str] | None = option(
        None, "parameters that DeepSpeed's AdamW trains beside: names or parts of them, such as norm, lm_head, bias"
    )
    modules_to_save_learning_rate: float | None = option(None, "their peak learning rate (default --learning_rate)")


def check(args: MethodOptions) -> None:
    """Raises ConfigError for what is wrong whatever the JSON says; `HDPissaConfig` knows the rest."""
    at_least(args, 1, "r")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
        raise ConfigError(f"--lora_alpha is {args.lora_alpha}: must be greater than 0; leave it out for the default, r")
    if args.slices not in (None, "auto") and not (args.slices.isdecimal() and int(args.slices) > 0):
        raise ConfigError(f"--slices is {args.slices}: must be a number of at least 1, or auto, one slice per rank")
    json_object(args, "rank_pattern")


def section_options(args: MethodOptions) -> dict[str, Any]:
    """Key of hd_pissa → the value that the command line gives it; without what it does not give."""
    values: dict[str, Any] = {"r": args.r, "lora_alpha": args.lora_alpha}
    values["slices"] = args.slices if args.slices in (None, "auto") else int(args.slices)
    values["rank_pattern"] = None if args.rank_pattern is None else json_object(args, "rank_pattern")
    for name in ("target_modules", "exclude_modules"):
        values[name] = modules(getattr(args, name))
    if args.modules_to_save is not None:
        values["modules_to_save"] = [part for word in args.modules_to_save for part in word.split(",") if part]
    values["modules_to_save_learning_rate"] = args.modules_to_save_learning_rate
    return {key: value for key, value in values.items() if value is not None}


def modules(words: list[str] | None) -> list[str] | str | None:
    """Names as PEFT takes them: several are a list; one that is no plain name is a regular expression or all-linear.

    Commas may stand for spaces.
    """
    if words is None:
        return None
    parts = [part for word in words for part in word.split(",") if part]
    if parts and all(NAME.fullmatch(part) for part in parts):
        return parts
    if len(words) == 1:
        return words[0]
    return list(words)
