"""The keys of `hd_pissa` as flags: `--r 8`, and `--init_tol 1e-5` for `init.tol`."""

from __future__ import annotations

import json
import re
from dataclasses import field, make_dataclass
from typing import Any

from pydantic import BaseModel

from hdpissa.engine.config.section import HDPissaConfig


def _leaves(model: type[BaseModel] = HDPissaConfig, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Flag → path in the section: `r`, and `init_tol` for `init.tol`."""
    found: dict[str, tuple[str, ...]] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= {flag: (name, *path) for flag, path in _leaves(info.annotation, f"{name}_").items()}
        else:
            found[prefix + name] = (name,)
    return found


FLAGS = _leaves()
SectionArguments = make_dataclass(
    "SectionArguments",
    [
        (flag, list[str] | None, field(default=None, metadata={"help": f"hd_pissa.{'.'.join(path)} of the JSON."}))
        for flag, path in FLAGS.items()
    ],
)


def section_of(values: dict[str, Any]) -> dict[str, Any]:
    """The part of `hd_pissa` that the flags give."""
    section: dict[str, Any] = {}
    for flag, path in FLAGS.items():
        if (words := values[flag]) is not None:
            at = section.setdefault(path[0], {}) if len(path) > 1 else section
            at[path[-1]] = _names(words) if "modules" in flag else _value(words)
    return section


def _value(words: Any) -> Any:
    """What the JSON would have: a number, true, an object, or the word itself."""
    if not isinstance(words, list):  # of YAML
        return words
    found = [_json(word) for word in words]
    return found[0] if len(found) == 1 else found


def _json(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def _names(words: Any) -> Any:
    """Names as PEFT takes them: several, or plain ones, are a list; else one regular expression, or all-linear."""
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, list):
        return _value(words)
    parts = [part for word in words for part in str(word).split(",") if part]
    plain = all(re.fullmatch(r"\w+(\.\w+)*", part) for part in parts)
    return parts if plain or len(words) > 1 else words[0]
