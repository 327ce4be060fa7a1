"""What moved between two results of the same benchmark, beyond noise?

    python benchmarks/compare.py OLD NEW [--all]

OLD and NEW are result files (JSON), or folders of them, of which the names in both are compared. Rows are matched by
their identity columns. A figure that has raw samples on both sides is given as new / old with the 95 % interval of that
ratio of medians (bootstrap over the samples): it "moved" when 1 is outside. A figure without samples has no known
noise; it is shown when it differs, and left to the reader. --all shows what did not move, too.

Samples of one run share their machine, its temperature and its other guests: an interval tells the noise within the
runs, not that between them. Run each side twice and compare these first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hdpissa.benchmarks import timing
from hdpissa.engine.errors import ConfigError

COLUMNS = ("result", "row", "figure", "old", "new", "new / old", "95 % interval", "verdict")
RESAMPLES = 4000
FEWEST = 3  # samples that an interval is made of


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Name → result, of a file or of all files in a folder.

    Raises:
        ConfigError: nothing there, or not a result.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            found[content["name"]] = content
            rows = content["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}: {type(error).__name__}; give a result file (JSON) or a folder of them"
            ) from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{file}: its rows are no list of records; give a result that a benchmark wrote")
    if not found:
        raise ConfigError(f"{path}: no result (*.json) there; give a file or a folder that a benchmark wrote")
    return found


def by_identity(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What tells a row from the others → the row. Without identity columns: everything in it that is text."""
    rows: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        columns = result.get("identity") or [key for key, value in row.items() if isinstance(value, str)]
        name = ", ".join(f"{row[column]}" for column in columns if column in row)
        key, number = name, 2
        while key in rows:
            key, number = f"{name} ({number})", number + 1
        rows[key] = row
    return rows


def interval(old: list[float], new: list[float]) -> tuple[float, float]:
    """95 % interval of median(new) / median(old), by bootstrap; the same for the same samples."""
    generator = np.random.default_rng(0)
    medians = [
        np.median(generator.choice(np.asarray(samples, float), (RESAMPLES, len(samples))), axis=1)
        for samples in (old, new)
    ]
    ratios = medians[1] / medians[0]
    return float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row."""
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line per figure that both sides have, and one per row that only one has."""
    olds, news = by_identity(old), by_identity(new)
    for key in dict.fromkeys((*olds, *news)):
        if key not in olds or key not in news:
            yield {"result": name, "row": key, "verdict": "only in NEW" if key in news else "only in OLD"}
            continue
        before, after = figures(olds[key]), figures(news[key])
        samples = [row.get("samples", {}) for row in (olds[key], news[key])]
        identity = set(old.get("identity") or ())
        for figure in [f for f in before if f in after and f not in identity]:
            line: dict[str, Any] = {"result": name, "row": key, "figure": figure}
            line |= {"old": before[figure], "new": after[figure]}
            if before[figure]:
                line["new / old"] = after[figure] / before[figure]
            both = [side.get(figure, []) for side in samples]
            if before[figure] == after[figure]:
                yield {**line, "verdict": "equal"}
            elif min(map(len, both)) < FEWEST:
                yield {**line, "verdict": "differs; noise unknown"}
            else:
                low, high = interval(*both)
                moved = "within noise" if low <= 1 <= high else "moved"
                yield {**line, "95 % interval": f"{low:.3f} … {high:.3f}", "verdict": moved}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="also what did not move")
    args = parser.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
        if not old.keys() & new.keys():
            raise ConfigError(
                f"{args.old} holds {', '.join(old)} and {args.new} {', '.join(new)}: nothing in common; compare two "
                f"results of the same benchmark"
            )
    except ConfigError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    lines = [line for name in old if name in new for line in changes(name, old[name], new[name])]
    shown = [line for line in lines if args.all or line["verdict"] not in ("equal", "within noise")]
    if shown:
        print(timing.markdown(shown, COLUMNS))
    count = sum(line["verdict"] == "moved" for line in lines)
    print(f"{len(lines)} figures compared, {count} moved beyond noise, {len(lines) - len(shown)} not shown")
    for name in old:
        if name in new:
            print(*differences(name, old[name], new[name]), sep="\n", end="")
    return 0


def differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What else than the code was different: the device, and every key of the configuration; a line each."""
    sides = [{"device": r.get("environment", {}).get("device"), **(r.get("configuration") or {})} for r in (old, new)]
    for key in dict.fromkeys((*sides[0], *sides[1])):
        before, after = (side.get(key) for side in sides)
        if before != after:
            yield f"{name}: not the same {key}: {before} in OLD, {after} in NEW\n"


if __name__ == "__main__":
    raise SystemExit(main())
