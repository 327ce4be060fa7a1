"""README's figures are those of the result files that it links."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def row(results: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    [found] = [row for row in results if all(row[key] == value for key, value in wanted.items())]
    return found


# Result file → the numbers of README's row, as printed there, from the file's rows.
FIGURES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "aot": lambda rows: [f"{len(rows)}", f"{sum(r['spilled'] > 0 for r in rows)}"],
    "throughput_smollm2_135m_instruct_fp32": lambda rows: [
        f"{row(rows, method=method)['CPU / frozen']:.2f}" for method in ("hd_pissa", "lora", "full", "reference")
    ],
    "svd_methods": lambda rows: [
        f"{row(rows, rows=4096, cols=11008, spectrum=spectrum)['full / randomized']:.1f}"
        for spectrum in ("flat", "decaying")
    ],
    "load_memory": lambda rows: [
        f"{row(rows, ranks=4, path=path)['peak MB']:.0f}" for path in ("own rows", "rank 0 reads all")
    ],
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_row_has_the_numbers_of_its_file(name):
    result = f"benchmarks/results/{name}.json"
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if f"({result})" in line]
    printed = re.findall(r"\d+(?:\.\d+)?", line.split("|")[2])
    assert printed == FIGURES[name](json.loads((ROOT / result).read_text())["rows"])


def test_every_row_is_held():
    linked = re.findall(r"\(benchmarks/results/(\w+)\.json\)", (ROOT / "README.md").read_text())
    assert sorted(linked) == sorted(FIGURES)
