"""The rows of `make gpu`: written one by one as they are measured, read back, and shown as Markdown.

    python benchmarks/gpu/gpu_rows.py [FOLDER]      makes gpu.md of the rows in FOLDER, those of a killed run too

A row is one JSON line in `rows.jsonl`, on disk before the next one is measured: whatever kills a run costs at most the
row under work. `phase` and `table` say where it belongs; a row with `failed` says why there is no figure. Imports
nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"
FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"
# Set by gpu.py for the phases: the file, the phase's name, and whether all is to be small and on the CPU.
FILE_VARIABLE, PHASE_VARIABLE, DRY_VARIABLE = "HDPISSA_GPU_ROWS", "HDPISSA_GPU_PHASE", "HDPISSA_GPU_DRY"
NOT_SHOWN = ("phase", "table", "samples", "traceback")
SLOWEST = 10  # of the passed tests, those that are shown

Row = dict[str, Any]


def is_dry() -> bool:
    """Whether this phase runs in its dry form: small sizes, on the CPU."""
    return os.environ.get(DRY_VARIABLE) == "1"


def append(path: Path, row: Row) -> None:
    """Adds a row to a file; it is on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def record(row: Row) -> Row:
    """Prints a phase's row and, under gpu.py, writes it; returns it."""
    print(json.dumps({key: value for key, value in row.items() if key != "samples"}), flush=True)
    if FILE_VARIABLE in os.environ:
        append(Path(os.environ[FILE_VARIABLE]), {"phase": os.environ.get(PHASE_VARIABLE, ""), **row})
    return row


def record_all(rows: Iterable[Row]) -> int:
    """Records rows as they are measured; the exit code of the phase, 1 if one has failed."""
    return 1 if ["failed" for row in rows if "failed" in record(row)] else 0


def attempt(identity: Row, measure: Callable[[], Row]) -> Row:
    """A row of `identity` and what `measure` returns; its error as `failed`, so that the rows behind it still come."""
    try:
        return {**identity, **measure()}
    except Exception as error:
        return failure(identity, error)


def failure(identity: Row, error: Exception) -> Row:
    """The row of what raised: out of memory, a compiler's refusal, a wrong number."""
    traceback.print_exception(error)
    text = "".join(traceback.format_exception(error))
    return {**identity, "failed": f"{type(error).__name__}: {error}"[:300], "traceback": text[-4000:]}


def read(folder: Path) -> list[Row]:
    """The rows of a folder, none where it has no file. A last line that a kill has cut is left out."""
    path = folder / FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def drop(folder: Path, phases: Iterable[str]) -> None:
    """Removes what an earlier run of these phases has left; rows of other phases stay."""
    kept = [row for row in read(folder) if row["phase"] not in phases]
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in kept))


# --- Markdown -------------------------------------------------------------------------------------------------


def markdown(rows: Iterable[Row]) -> str:
    """A section for each phase, a table for each `table` in it, in the order of their first rows."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row["phase"], row.get("table", "")), []).append(row)
    parts = []
    for number, ((phase, name), found) in enumerate(tables.items()):
        if number == 0 or phase not in [key[0] for key in list(tables)[:number]]:
            parts.append(f"## {phase}")
        parts += [f"### {name}"] if name else []
        parts += _tests(found) if phase == "tests" else [table(found)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """A Markdown table of these columns, or of all that the rows have; floats with four significant digits."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row if key not in NOT_SHOWN))
    lines = [list(columns), ["---"] * len(columns), *[[_cell(row.get(name, "")) for name in columns] for row in rows]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _tests(rows: list[Row]) -> list[str]:
    """How many tests ended how; in full only those that did not pass, and the slowest."""
    counts = Counter(row["outcome"] for row in rows)
    passed = [row for row in rows if row["outcome"] == "passed"]
    slowest = sorted(passed, key=lambda row: row["seconds"], reverse=True)[:SLOWEST]
    shown = [row for row in rows if row["outcome"] != "passed"] + slowest
    return [", ".join(f"{count} {outcome}" for outcome, count in counts.items()), table(shown)]


def write_markdown(folder: Path) -> Path:
    """gpu.md of the folder's rows."""
    target = folder / "gpu.md"
    target.write_text(markdown(read(folder)))
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    if not read(folder):
        print(f"gpu_rows.py: no rows in {folder / FILE}", file=sys.stderr)
        return 2
    print(write_markdown(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
