"""The DeepSpeed JSONs that come with the project, by name: `--ds_config zero3` wherever one works."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from hdpissa.engine.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"  # beside launch/, in a checkout and in an installed package


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def locate(given: str) -> str:
    """The path of a shipped config for its name; what is a path stays as it is.

    Raises:
        ConfigError: a name that none has.
    """
    if Path(given).exists() or not re.fullmatch(r"\w+", given):
        return given
    if given not in names():
        near = difflib.get_close_matches(given, names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--ds_config {given}: no file and no shipped config; {meant}there are {', '.join(names())}")
    return str(FOLDER / f"{given}.json")
