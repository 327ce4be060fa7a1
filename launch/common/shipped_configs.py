"""The DeepSpeed JSONs that come with the project, by name: `--ds_config zero3` wherever one works."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"  # beside launch/, in a checkout and in an installed package


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def locate(given: str) -> str:
    """The path of a shipped config for its name; what is a file, or no such name, stays as it is."""
    if given in names() and not Path(given).exists():
        return str(FOLDER / f"{given}.json")
    return os.path.expanduser(given) if given else given


def read(located: str | Path) -> dict[str, Any]:
    """The config as a dict.

    Raises:
        ConfigError: an unknown name, and what `engine.config.read_ds_config` refuses.
    """
    from hdpissa.engine.config.section import read_ds_config

    name = str(located)
    if re.fullmatch(r"\w+", name) and not Path(name).exists():
        near = difflib.get_close_matches(name, names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--ds_config {name}: no file and no shipped config; {meant}there are {', '.join(names())}")
    return read_ds_config(located)
