"""What moved between two results of the same benchmark, and what broke?

    python benchmarks/compare.py OLD NEW [--all]

OLD and NEW are result files (JSON), or folders of them, of which the names in both are compared. Rows are matched by
their identity columns. A figure with raw samples on both sides has the 95 % bootstrap interval of new / old, drawn over
whole rounds where the benchmark has rounds; it "moved" when 1 is outside, but never with fewer than four rounds or
samples a side. A figure without samples is shown when it differs. --all shows what did not move, too.

What OLD has and NEW lacks (a result, a row, a figure, a method that failed) has a line, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.engine.errors import ConfigError

COLUMNS = ("result", "row", "figure", "old", "new", "new / old", "95 % interval", "outcome")
QUIET = ("equal", "within noise")
LOST = "lost in NEW"
RESAMPLES, FEWEST = 4000, 4


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Name → result, of a file or of all files in a folder.

    Raises:
        ConfigError: nothing there, or not a result.
    """
    found = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            content = json.loads(file.read_text())
            found[content["name"]] = {**content, "rows": [dict(row) for row in content["rows"]]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}: {type(error).__name__}; give a result file (JSON) or a folder of them"
            ) from None
    if not found:
        raise ConfigError(f"{path}: no result (*.json) there; give a file or a folder that a benchmark wrote")
    return found


def by_identity(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of the identity columns → the row."""
    return {", ".join(str(row.get(column, "")) for column in result["identity"]): row for row in result["rows"]}


def figures(row: Mapping[str, Any], identity: Sequence[str]) -> dict[str, float]:
    """The numbers of a row that are no part of its name."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: float(value) for key, value in numbers.items() if key not in (*identity, "rounds")}


def changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line per figure of either side; a row or a figure that NEW lacks is lost."""
    olds, news = by_identity(old), by_identity(new)
    for key in dict.fromkeys((*olds, *news)):
        before, after = (figures(rows.get(key, {}), new["identity"]) for rows in (olds, news))
        why = news.get(key, {}).get("remark")
        for figure in dict.fromkeys((*before, *after)):
            line: dict[str, Any] = {
                "result": name,
                "row": key,
                "figure": figure,
                "old": before.get(figure),
                "new": after.get(figure),
            }
            if figure not in after or (math.isfinite(line["old"] or 0) and not math.isfinite(line["new"])):
                yield {**line, "outcome": f"{LOST}: {why}" if why else LOST}
            elif figure not in before:
                yield {**line, "outcome": "only in NEW"}
            else:
                yield {
                    **line,
                    **judge(figure, olds[key], news[key], [rounds(r, rs[key]) for r, rs in ((old, olds), (new, news))]),
                }


def rounds(result: Mapping[str, Any], row: Mapping[str, Any]) -> int | None:
    """Rounds that the samples of a row are of; a method that failed part-way has its own. None: no rounds."""
    return row.get("rounds", (result.get("configuration") or {}).get("rounds"))


def judge(figure: str, old: Mapping[str, Any], new: Mapping[str, Any], counts: Sequence[int | None]) -> dict[str, Any]:
    """Ratio, interval and outcome of a figure that both sides have."""
    before, after = old[figure], new[figure]
    if before == after:
        return {"outcome": "equal"}
    line: dict[str, Any] = {"new / old": after / before} if before else {}
    samples: list[list[float]] = [(row.get("samples") or {}).get(figure) or [] for row in (old, new)]
    if not all(samples) or min(value for side in samples for value in side) <= 0:
        return {**line, "outcome": "differs; noise unknown"}
    units = [units_of(side, count) for side, count in zip(samples, counts, strict=True)]
    low, high = interval(*units)
    line["95 % interval"] = f"{low:.3f} … {high:.3f}"
    if low <= 1 <= high:
        return {**line, "outcome": "within noise"}
    return {**line, "outcome": "moved" if min(map(len, units)) >= FEWEST else "differs; too few rounds to tell"}


def units_of(samples: Sequence[float], count: int | None) -> np.ndarray:
    """What is drawn again, a row each: rounds, because the steps of one round share its luck, else single samples."""
    return np.asarray(samples, float).reshape(count if count and len(samples) % count == 0 else len(samples), -1)


def interval(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of median(new) / median(old); the same for the same samples."""
    generator = np.random.default_rng(0)
    medians = []
    for units in (np.asarray(old, float), np.asarray(new, float)):
        chosen = units[generator.integers(len(units), size=(RESAMPLES, len(units)))]
        medians.append(np.median(chosen.reshape(RESAMPLES, -1), axis=1))
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="also what did not move")
    args = parser.parse_args(argv)
    old, new = read(args.old), read(args.new)
    both = [name for name in old if name in new]
    if not both:
        raise ConfigError(f"{args.old} and {args.new} have no result in common; compare results of the same benchmark")
    lines = [line for name in both for line in changes(name, old[name], new[name])]
    lines += [{"result": name, "outcome": LOST} for name in old if name not in new]
    shown = [line for line in lines if args.all or line["outcome"] not in QUIET]
    if shown:
        print(gpu_rows.table(shown, COLUMNS))
    lost = sum(line["outcome"].startswith(LOST) for line in lines)
    moved = sum(line["outcome"] == "moved" for line in lines)
    print(f"{len(lines)} compared, {moved} moved beyond noise, {lost} lost in NEW, {len(lines) - len(shown)} not shown")
    for name in both:
        for key in ("device", "configuration"):
            sides = [
                r.get("environment", {}).get("device") if key == "device" else r.get(key)
                for r in (old[name], new[name])
            ]
            if sides[0] != sides[1]:
                print(f"{name}: another {key}: {sides[0]} in OLD, {sides[1]} in NEW")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
