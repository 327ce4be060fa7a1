"""What the command line says of the section `hd_pissa`, put into the config.

As everywhere with Hugging Face's names: where the JSON is silent, or says "auto", the command line counts; where both
speak they must agree, and every disagreement is told at once (`ds_config.fill_auto` raises them with its own).
Plain dicts in, a new dict out; what the values may be is `config`'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .section import AdamConfig, show

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
        said = ours.get(key)
        if isinstance(value, dict) and isinstance(said, dict):
            _merge_section(said, value, f"{path}.{key}", differ)
        elif said in OPEN:
            ours[key] = value
        elif _plain(said) != _plain(value):
            flag = f"{path}.{key}".removeprefix("hd_pissa.").replace(".", "_")
            differ.append(f"{path}.{key} is {show(said)} but --{flag} is {show(value)}")


def _plain(value: Any) -> Any:
    """The order of names says nothing."""
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _merge_adam(ds: dict[str, Any], ours: dict[str, Any], given: Mapping[str, float]) -> list[str]:
    """Puts betas and eps into `hd_pissa.adam`, unless that or the optimizer section has them."""
    optimizer, adam = ds.get("optimizer") or {}, ours.get("adam")
    homes = {"hd_pissa.adam": {} if adam in OPEN else adam}
    homes["optimizer.params"] = optimizer.get("params") or {} if isinstance(optimizer, dict) else optimizer
    if not all(isinstance(home, dict) for home in homes.values()):
        return []  # told by those who check them
    differ, defaults = [], AdamConfig()
    chosen: dict[str, Any] = {}
    for option, (key, index) in ADAM.items():
        if option not in given:
            continue
        said = {f"{name}.{key}": home[key] for name, home in homes.items() if home.get(key) not in OPEN}
        for path, value in said.items():
            part = value[index] if index is not None and isinstance(value, list) and len(value) == 2 else value
            if part != given[option]:
                differ.append(f"{path} is {show(value)} but --{option} is {show(given[option])}")
        if not said and index is None:
            chosen[key] = given[option]
        elif not said:
            chosen.setdefault(key, list(defaults.betas))[index] = given[option]
    if chosen:
        ours["adam"] = {**homes["hd_pissa.adam"], **chosen}
    return differ
