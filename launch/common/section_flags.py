"""The keys of `hd_pissa` as flags: `--r 8`, and `--init_tol 1e-5` for `init.tol`; and how they meet the JSON.

As everywhere with Hugging Face's names: where the JSON is silent, or says "auto", the command line counts; where both
speak they must agree, and every disagreement is told at once (`ds_config.fill_auto` raises them with its own).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from typing import Any

from pydantic import BaseModel

from hdpissa.engine.config.section import AdamConfig, HDPissaConfig, show


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


# --- the JSON and the command line

OPEN = (None, "auto")  # of a key in the JSON: nobody has decided
ADAM = {"adam_beta1": ("betas", 0), "adam_beta2": ("betas", 1), "adam_epsilon": ("eps", None)}


def merge(
    ds: Mapping[str, Any], section: Mapping[str, Any], adam: Mapping[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """(the config with the command line's values, what JSON and command line say differently).

    Args:
        ds: as read from the file. Nothing of it is checked here; what is no object is left as it is.
        section: key of `hd_pissa` → the value that the user gave on the command line.
        adam: adam_beta1, adam_beta2, adam_epsilon, those of them that the user gave.
    """
    out = copy.deepcopy(dict(ds))
    ours = out.setdefault("hd_pissa", {})
    if not isinstance(ours, dict):
        return out, []
    differ: list[str] = []
    _merge_section(ours, section, "hd_pissa", differ)
    return out, differ + _merge_adam(out, ours, adam)


def _merge_section(ours: dict[str, Any], section: Mapping[str, Any], path: str, differ: list[str]) -> None:
    for key, value in section.items():
        in_json = ours.get(key)
        if isinstance(value, dict) and isinstance(in_json, dict):
            _merge_section(in_json, value, f"{path}.{key}", differ)
        elif in_json in OPEN:
            ours[key] = value
        elif _plain(in_json) != _plain(value):
            flag = f"{path}.{key}".removeprefix("hd_pissa.").replace(".", "_")
            differ.append(f"{path}.{key} is {show(in_json)} but --{flag} is {show(value)}")


def _plain(value: Any) -> Any:
    """The order of names says nothing."""
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _merge_adam(ds: dict[str, Any], ours: dict[str, Any], given: Mapping[str, float]) -> list[str]:
    """Puts betas and eps into `hd_pissa.adam`, unless that or the optimizer section has them."""
    optimizer, adam = ds.get("optimizer") or {}, ours.get("adam")
    homes = {"hd_pissa.adam": {} if adam in OPEN else adam}
    homes["optimizer.params"] = optimizer.get("params") or {} if isinstance(optimizer, dict) else optimizer
    if not all(isinstance(home, dict) for home in homes.values()):
        return []  # refused by the checks of the section
    differ, defaults = [], AdamConfig()
    chosen: dict[str, Any] = {}
    for option, (key, index) in ADAM.items():
        if option not in given:
            continue
        in_json = {f"{name}.{key}": home[key] for name, home in homes.items() if home.get(key) not in OPEN}
        for path, value in in_json.items():
            part = value[index] if index is not None and isinstance(value, list) and len(value) == 2 else value
            if part != given[option]:
                differ.append(f"{path} is {show(value)} but --{option} is {show(given[option])}")
        if not in_json and index is None:
            chosen[key] = given[option]
        elif not in_json:
            chosen.setdefault(key, list(defaults.betas))[index] = given[option]
    if chosen:
        ours["adam"] = {**homes["hd_pissa.adam"], **chosen}
    return differ
