"""README's table of figures, made from the committed results: no number is typed by hand.

    python benchmarks/figures.py          prints the table
    python benchmarks/figures.py --write  puts it into README.md, between its two marks

tests/test_figures.py holds that README says what the results say. A result that is not there yet is said to be missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: python benchmarks/figures.py --write -->", "<!-- end of figures -->"

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        question: what it answers. result: name of the result file. command: what measured it.
        say: the text, from the result's rows.
    """

    question: str
    result: str
    command: str
    say: Callable[[Rows], str]


def one(table: Rows, /, **wanted: Any) -> dict[str, Any]:
    """The only row with these values; columns are given with _ in place of what is no letter."""
    plain = {"".join(c if c.isalnum() else "_" for c in key): key for row in table for key in row}
    found = [row for row in table if all(row.get(plain[key]) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows with {wanted}")
    return found[0]


def most_ranks(rows: Rows) -> Rows:
    """Those of the largest number of processes."""
    most = max(row["ranks"] for row in rows)
    return [row for row in rows if row["ranks"] == most]


def _aot(rows: Rows) -> str:
    spills = sum(row["spilled"] > 0 for row in rows)
    return f"{len(rows)} variants, {spills or 'none'} with spills"


def _cpu_layers(rows: Rows) -> str:
    ours, lora = (one(rows, variant=name)["/ frozen, least of each"] for name in ("ours", "lora"))
    return f"HD-PiSSA {ours:.2f}, PEFT's LoRA {lora:.2f}"


def _checkpoint(rows: Rows) -> str:
    full, small = (one(rows, kind=kind) for kind in ("full", "small"))
    return (
        f"full {full['files MB']:.0f} MB, small {small['files MB']:.0f} MB; a full one stops training for "
        f"{full['pause at once s']:.1f} s, in the background {full['pause in background s']:.1f} s"
    )


def _init(rows: Rows) -> str:
    every = one(rows, shape="all")
    return (
        f"{every['ours s']:.1f} s, {every['full / ours']:.2f} times as fast as a full fp32 SVD of each; largest "
        f"relative error of σ {every['σ error']:.0e}, largest angle of a slice {every['slice angle']:.0e}"
    )


def _svd(rows: Rows) -> str:
    chosen = [one(rows, rows=4096, cols=cols, rank=128, spectrum="flat") for cols in (4096, 11008)]
    ratios = [f"{row['full / randomized']:.1f} times at 4096 × {row['cols']}" for row in chosen]
    return f"full fp32 SVD takes {' and '.join(ratios)} as long (flat spectrum)"


def _load(rows: Rows) -> str:
    own, whole = (one(rows, ranks=4, path=path) for path in ("own rows", "rank 0 reads all"))
    return (
        f"{own['model MB'] / 1e3:.1f} GB on 4 ranks: {own['peak MB']:.0f} MB and {own['seconds']:.1f} s; through "
        f"rank 0 {whole['peak MB']:.0f} MB and {whole['seconds']:.1f} s"
    )


def _export(rows: Rows) -> str:
    within = sum(row["peak MB"] <= row["bound MB"] for row in rows)
    return f"at most {max(row['peak MB'] for row in rows):.0f} MB; {within} of {len(rows)} exports within their bound"


def _cache(rows: Rows) -> str:
    return ", ".join(f"{row['second / first, slices s']:.1%} on {row['ranks']} ranks" for row in rows)


def _rank(rows: Rows) -> str:
    wide = max(row["min(m, n)"] for row in rows)
    told = []
    for steps in sorted({row["steps"] for row in rows}):
        chosen = [row for row in rows if row["steps"] == steps and row["min(m, n)"] == wide]
        ranks = []
        for method, slices, name in (
            ("lora", "", "LoRA"),
            ("pissa", "", "PiSSA"),
            ("hd_pissa", 8, "HD-PiSSA, S = 8"),
            ("full", "", "full fine-tuning"),
        ):
            row = one([row for row in chosen if (row.get("S") or "") == slices], method=method)
            ranks.append(f"{name} {row['numerical rank']:g}")
        told.append(f"after {steps} step{'s' if steps > 1 else ''} {', '.join(ranks)}")
    return "; ".join(told) + f" of {wide}"


def _quality(rows: Rows) -> str:
    told = []
    for row in rows:
        spread = f" ± {row['± test']:.3f}" if "± test" in row else ""
        told.append(f"{row['arm']} {row['test loss']:.3f}{spread}")
    return ", ".join(told)


def _throughput(rows: Rows) -> str:
    names = {
        "hd_pissa": "HD-PiSSA",
        "lora": "LoRA",
        "pissa": "PiSSA",
        "full": "full fine-tuning",
        "reference": "published",
    }
    chosen = [row for row in most_ranks(rows) if row["method"] in names and "CPU / frozen" in row]
    return ", ".join(f"{names[row['method']]} {row['CPU / frozen']:.2f}" for row in chosen)


def _published(rows: Rows) -> str:
    row = one(most_ranks(rows), method="hd_pissa")
    return f"{row['reference / it']:.2f} by the clock, {row['CPU reference / it']:.2f} in CPU time"


def _memory(rows: Rows) -> str:
    return ", ".join(f"{row['method']} {row['peak MB']:.0f} MB" for row in most_ranks(rows) if "peak MB" in row)


def _counted(rows: Rows) -> str:
    return f"{sum(row['agrees'] for row in rows)} of {len(rows)} figures agree exactly, on 1, 2 and 4 processes"


THROUGHPUT = (
    "throughput.py --model ~/.cache/hdpissa/smollm2-135m-instruct --num_accelerators 2 --r 16 --max_length 256"
    " --micro_batch 2 --steps 4 --warmup 2"
)
FIGURES = (
    Figure("kernels compiled for A100, H100 and MI300", "aot", "aot_table.py", _aot),
    Figure(
        "CPU time of forward + backward, frozen base = 1, SmolLM2-135M, 1024 tokens, fp32",
        "cpu_layers_fp32",
        "cpu_layers.py --dtype fp32",
        _cpu_layers,
    ),
    Figure("the same in bf16, which this CPU emulates", "cpu_layers_bf16", "cpu_layers.py --dtype bf16", _cpu_layers),
    Figure("decomposing the 210 targets of SmolLM2-135M, S·r = 128", "init", "init.py", _init),
    Figure("decomposing larger matrices, S·r = 128", "svd_methods", "svd_methods.py", _svd),
    Figure(
        "a start from the slice cache, the first start = 100 %", "slice_cache_start", "slice_cache_start.py", _cache
    ),
    Figure("loading, peak memory of a rank and time", "load_memory", "load_memory.py", _load),
    Figure("exporting a model of several GB, peak memory", "export_memory", "export_memory.py", _export),
    Figure("a checkpoint of SmolLM2-135M, S = 8, r = 16, two ranks", "checkpoint", "checkpoint.py", _checkpoint),
    Figure(
        "CPU time of a whole training step on two ranks, frozen base = 1, SmolLM2-135M, fp32, r = 16",
        "throughput_smollm2_135m_instruct_fp32",
        THROUGHPUT,
        _throughput,
    ),
    Figure(
        "the same runs: time of the published algorithm's step, HD-PiSSA's = 1",
        "throughput_smollm2_135m_instruct_fp32",
        THROUGHPUT,
        _published,
    ),
    Figure("the same runs: peak memory of a rank", "throughput_smollm2_135m_instruct_fp32", THROUGHPUT, _memory),
    Figure("bytes and FLOP of a step, counted and planned", "plan_counted", "projection.py", _counted),
    Figure("rank of the change of W, r = 16", "update_rank", "update_rank.py", _rank),
)


def table() -> str:
    """The Markdown table."""
    lines = ["| figure | measured | by `python benchmarks/…`, in `benchmarks/results/…` |", "| --- | --- | --- |"]
    return "\n".join([*lines, *_lines()])


def _lines() -> Iterator[str]:
    for figure in FIGURES:
        file = RESULTS / f"{figure.result}.json"
        said = figure.say(json.loads(file.read_text())["rows"]) if file.exists() else "**not measured yet**"
        where = f"[{figure.result}](benchmarks/results/{figure.result}.md)" if file.exists() else figure.result
        source = f"`{figure.command}`, {where}"
        yield f"| {figure.question} | {said} | {source} |"


def replaced(text: str) -> str:
    """A README with the present table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(replaced(readme.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
