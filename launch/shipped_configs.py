"""The DeepSpeed JSONs that come with the project, by name: `--ds_config zero3` wherever one works."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"  # beside launch/, in a checkout and in an installed package


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def locate(given: str) -> str:
    """The path of a shipped config for its name; what is a file, or no such name, stays as it is."""
    if given in names() and not Path(given).exists():
        return str(FOLDER / f"{given}.json")
    return given
