"""What moved between two results of the same benchmark, beyond noise, and what broke?

    python benchmarks/compare.py OLD NEW [--all]

OLD and NEW are result files (JSON), or folders of them, of which the names in both are compared. Rows are matched by
their identity columns. A figure that has raw samples on both sides is given as new / old with the 95 % interval of
that ratio (noise.py), and it "moved" when 1 is outside and a permutation test agrees. Where a sample is 0 or negative
the interval is that of new − old instead, and says so. A figure without samples, or with too few, has no known noise;
it is shown when it differs, and left to the reader. --all shows what did not move, too.

What OLD has and NEW lacks is always told: a result, a row, a figure, a method that failed. Then the exit code is 1.
Told, too, is a new remark of a row that has its figures: that it failed after some rounds, or that a seed diverged.

Samples of one run share their machine, its temperature and its other guests. Where a benchmark has rounds, these are
what is drawn again, and below four a side nothing is said to have moved. Of one round a side the interval is of the
noise within the two runs: what is outside "differs within these two runs", which other runs of the same code may, too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpissa.benchmarks import noise, timing
from hdpissa.engine.errors import ConfigError

COLUMNS = ("result", "row", "figure", "old", "new", "new / old", "95 % interval", "verdict")
QUIET = ("equal", "within noise")
ONE_RUN = "differs within these two runs; noise between runs unknown"
NO_FIGURES = ("rounds",)  # how often a row was measured
LOST = ("only in OLD", "gone in NEW", "failed in NEW", "not finite in NEW")  # how a verdict begins


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


def by_identity(result: Mapping[str, Any], identity: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What tells a row from the others → the row. Without identity columns: everything in it that is text."""
    rows: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        columns = identity or [key for key, value in row.items() if isinstance(value, str)]
        name = ", ".join(f"{row[column]}" for column in columns if column in row)
        key, number = name, 2
        while key in rows:
            key, number = f"{name} ({number})", number + 1
        rows[key] = row
    return rows


def figures(row: Mapping[str, Any], identity: Sequence[str]) -> dict[str, float]:
    """The numbers of a row that are no part of its name."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: float(value) for key, value in numbers.items() if key not in (*identity, *NO_FIGURES)}


def reason(row: Mapping[str, Any]) -> str:
    """Why a row has no figures, in its own words."""
    return str(row.get("remark") or row.get("status") or "it has no figures")


def changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line per figure of either side, and one per row that only one has or that has failed."""
    identity = list(new.get("identity") or old.get("identity") or ())
    olds, news = by_identity(old, identity), by_identity(new, identity)
    for key in dict.fromkeys((*olds, *news)):
        line = {"result": name, "row": key}
        if key not in olds or key not in news:
            yield {**line, "verdict": "only in NEW" if key in news else "only in OLD"}
            continue
        before, after = figures(olds[key], identity), figures(news[key], identity)
        if before and not after:
            yield {**line, "verdict": f"failed in NEW: {reason(news[key])}"}
        elif after and not before:
            yield {**line, "verdict": f"failed in OLD: {reason(olds[key])}"}
        else:
            if news[key].get("remark") and news[key].get("remark") != olds[key].get("remark"):
                yield {**line, "verdict": f"remark in NEW: {news[key]['remark']}"}
            rounds = [noise.rounds_of(side, rows[key]) for side, rows in ((old, olds), (new, news))]
            for figure in dict.fromkeys((*before, *after)):
                verdict = judge(figure, (olds[key], news[key]), (before, after), rounds)
                yield {**line, "figure": figure, **verdict}


def judge(
    figure: str, rows: Sequence[Mapping[str, Any]], numbers: Sequence[Mapping[str, float]], rounds: Sequence[int | None]
) -> dict[str, Any]:
    """The cells of a figure of two rows; each argument has OLD's and NEW's."""
    before, after = (side.get(figure) for side in numbers)
    if before is None or after is None:
        there = {"new": after} if before is None else {"old": before}
        instead = rows[1].get(figure) or rows[1].get("remark")
        why = f": {instead}" if before is not None and instead else ""
        return {**there, "verdict": "only in NEW" if before is None else f"gone in NEW{why}"}
    line: dict[str, Any] = {"old": before, "new": after}
    samples = [list((row.get("samples") or {}).get(figure, [])) for row in rows]
    if (before == after or (math.isnan(before) and math.isnan(after))) and samples[0] == samples[1]:
        return {**line, "verdict": "equal"}
    if not math.isfinite(before) or not math.isfinite(after):
        return {**line, "verdict": f"not finite in {'OLD' if math.isfinite(after) else 'NEW'}"}
    if before:
        line["new / old"] = after / before
    found = noise.compared((before, after), samples, [row.get("weights") for row in rows], rounds)
    if isinstance(found, str):
        return {**line, "verdict": "equal" if before == after else f"differs; noise unknown{found}"}
    if found.ratio is not None:
        line["new / old"] = found.ratio
    verdict = ("within noise", ONE_RUN if found.within_runs else "moved")[found.moved]
    return {**line, "95 % interval": str(found), "verdict": verdict}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="also what did not move")
    args = parser.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
        both = [name for name in old if name in new]
        if not both:
            raise ConfigError(
                f"{args.old} holds {', '.join(old)} and {args.new} {', '.join(new)}: nothing in common; compare two "
                f"results of the same benchmark"
            )
    except ConfigError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    lines = [line for name in both for line in changes(name, old[name], new[name])]
    compared = sum("figure" in line for line in lines)
    lines += [{"result": name, "verdict": "only in OLD"} for name in old if name not in new]
    lines += [{"result": name, "verdict": "only in NEW"} for name in new if name not in old]
    shown = [line for line in lines if args.all or line["verdict"] not in QUIET]
    if shown:
        print(timing.markdown(shown, COLUMNS))
    count = sum(line["verdict"] == "moved" for line in lines)
    lost = sum(line["verdict"].startswith(LOST) for line in lines)
    print(
        f"{compared} figures compared, {count} moved beyond noise, {lost} failed or gone in NEW, "
        f"{len(lines) - len(shown)} not shown"
    )
    for name in both:
        print(*differences(name, old[name], new[name]), sep="", end="")
    return 1 if lost else 0


def differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What else than the code was different: the device, and every key of the configuration; a line each."""
    sides = [{"device": r.get("environment", {}).get("device"), **(r.get("configuration") or {})} for r in (old, new)]
    for side, result in zip(("OLD", "NEW"), (old, new), strict=True):
        if not result.get("configuration"):
            yield f"{name}: {side} does not tell its configuration\n"
    for key in dict.fromkeys((*sides[0], *sides[1])):
        before, after = (side.get(key, "not told") for side in sides)
        if before != after and all(r.get("configuration") or key == "device" for r in (old, new)):
            yield f"{name}: not the same {key}: {before} in OLD, {after} in NEW\n"


if __name__ == "__main__":
    raise SystemExit(main())
