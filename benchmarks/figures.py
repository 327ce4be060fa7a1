"""README's table of figures, made from the committed results: no number is typed by hand.

    python benchmarks/figures.py          prints the table
    python benchmarks/figures.py --write  puts it into README.md, between its two marks

tests/test_figures.py holds that README says what the results say, and that each result is of the configuration that its
row names. A result that is not there yet is said to be missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        question: what it answers; what stands in braces is filled from `configuration`.
        result: name of the result file. command: what measured it. say: the text, from the result's rows.
        configuration: what the result has to be of: all that the question and the command say, and defaults that
            would change the figure.
    """

    question: str
    result: str
    command: str
    say: Callable[[Rows], str]
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """The question with its values."""
        return self.question.format(**self.configuration)

    def others(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """What the stored configuration says otherwise; key → its value. Older results hold their values as text."""
        both = {key: value for key, value in self.configuration.items() if key in stored}
        return {key: stored[key] for key, value in both.items() if str(stored[key]) != str(value)}

    def not_told(self, stored: Mapping[str, Any]) -> list[str]:
        """What the stored configuration does not say."""
        return [key for key in self.configuration if key not in stored]


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


def ratios(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[float]:
    """CPU time over the base's in each round; a result of older form calls its samples otherwise."""
    seconds = [found["samples"]["median s"] if "samples" in found else found["rounds s"] for found in (row, base)]
    return [a / b for a, b in zip(*seconds, strict=True)]


def _cpu_layers(rows: Rows) -> str:
    base = one(rows, variant="frozen")
    told = []
    for variant, name in (("ours", "HD-PiSSA"), ("lora", "PEFT's LoRA")):
        found = ratios(one(rows, variant=variant), base)
        told.append(f"{name} {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return f"{', '.join(told)}: median and range of {len(found)} rounds; the base itself {base['median s']:.3g} s"


def _spread(row: Mapping[str, Any], column: str) -> str:
    """Seconds, with the range of the samples where there are some."""
    samples = (row.get("samples") or {}).get(column)
    return f"{row[column]:.1f} s" + (f" ({min(samples):.1f} to {max(samples):.1f})" if samples else "")


def _checkpoint(rows: Rows) -> str:
    told = [
        f"{row['kind']}: {row['files MB']:.0f} MB, stops training for {_spread(row, 'pause at once s')}, in the "
        f"background for {_spread(row, 'pause in background s')}"
        for row in (one(rows, kind=kind) for kind in ("full", "small"))
    ]
    times = "" if "samples" in rows[0] else "; one save of each"
    return "; ".join(told) + times


def _init(rows: Rows) -> str:
    every = one(rows, shape="all")
    return (
        f"{every['matrices']} matrices in {every['ours s']:.1f} s, {every['full / ours']:.2f} times as fast as a full "
        f"fp32 SVD of each; largest relative error of σ {every['σ error']:.0e}, largest angle of a slice "
        f"{every['slice angle']:.0e}"
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
    told = [f"{row['second / first, slices CPU s']:.1%} on {_number(row['ranks'], 'rank')}" for row in rows]
    return ", ".join(told)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
        if "test loss" not in row:
            told.append(f"{row['arm']}: {row['remark']}")
            continue
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
    frozen = one(most_ranks(rows), method="frozen")
    return (
        f"{row['reference / it']:.2f} by the clock, {row['CPU reference / it']:.2f} in CPU time; with nothing "
        f"trained {frozen['reference / it']:.2f} and {frozen['CPU reference / it']:.2f}"
    )


def _rates(rows: Rows) -> str:
    fp32, bf16 = ([r["rate"] for r in rows if r["what"] == f"product, {kind}"] for kind in ("float32", "bfloat16"))
    gathers = [row["seconds"] for row in rows if "seconds" in row]
    return (
        f"products {min(fp32):.0f} to {max(fp32):.0f} GFLOP/s in fp32, {min(bf16):.1f} to {max(bf16):.1f} in bf16; all "
        f"weights of SmolLM2-135M gathered in {min(gathers):.2f} to {max(gathers):.2f} s"
    )


def _memory(rows: Rows) -> str:
    return ", ".join(f"{row['method']} {row['peak MB']:.0f} MB" for row in most_ranks(rows) if "peak MB" in row)


def _counted(rows: Rows) -> str:
    *most, last = sorted({row["ranks"] for row in rows})
    counts = " and ".join(filter(None, (", ".join(map(str, most)), str(last))))
    return f"{sum(row['agrees'] for row in rows)} of {len(rows)} figures agree exactly, on {counts} processes"


DEMO = "smollm2-135m-instruct"
THROUGHPUT = (
    f"throughput.py --model ~/.cache/hdpissa/{DEMO} --num_accelerators 2 --r 16 --slices 8 --accumulation 4"
    " --micro_batch 1 --max_length 256"
)
THROUGHPUT_IS = {
    "model": DEMO,
    "num_accelerators": [2],
    "methods": ["hd_pissa", "lora", "pissa", "full", "frozen", "reference"],
    "r": 16,
    "slices": 8,
    "accumulation": 4,
    "micro_batch": 1,
    "max_length": 256,
    "steps": 3,
    "warmup": 2,
    "dtype": "fp32",
    "layers": None,
    "zero": {},
    "gradient_checkpointing": False,
}
FEW = ["hd_pissa", "frozen", "reference"]
GATHERED = {"stage3_param_persistence_threshold": 10**12}  # as in ds_configs/zero3_gathered.json
QUALITY_IS = {
    "model_name_or_path": DEMO,
    "dataset_name": "gsm8k_train.jsonl",
    "test_dataset_name": "gsm8k_test.jsonl",
    "steps": 6,
    "micro_batch": 1,
    "accumulation": 8,
    "max_length": 256,
    "train_rows": 1024,
    "eval_rows": 16,
    "eval_steps": 6,
    "r": 16,
    "slices": 8,
    "test_rows": 8,
    "max_new_tokens": 96,
    "dtype": "fp32",
}
FIGURES = (
    Figure("kernels compiled for A100, H100 and MI300", "aot", "aot_table.py", _aot),
    Figure(
        "CPU time of forward + backward, frozen base = 1, SmolLM2-135M, 1024 tokens, {dtype}",
        "cpu_layers_fp32",
        "cpu_layers.py --dtype fp32 --rounds 5",
        _cpu_layers,
        {"dtype": "fp32", "layers": None, "rounds": 5},
    ),
    Figure(
        "the same in {dtype}, which this CPU emulates",
        "cpu_layers_bf16",
        "cpu_layers.py --dtype bf16 --rounds 3",
        _cpu_layers,
        {"dtype": "bf16", "layers": None, "rounds": 3},
    ),
    Figure(
        "decomposing all targets of SmolLM2-135M, S = {slices}, r = {r}, by the clock with {threads} threads",
        "init",
        "init.py --threads 2",
        _init,
        {"model_name_or_path": DEMO, "layers": None, "r": 16, "slices": 8, "threads": 2},
    ),
    Figure(
        "decomposing larger matrices, S·r = {ranks[0]}",
        "svd_methods",
        "svd_methods.py --ranks 128",
        _svd,
        {"largest": 4096, "ranks": [128]},
    ),
    Figure(
        "CPU time of a start from the slice cache, the first start's = 100 %, S = {slices}, r = {r}",
        "slice_cache_start",
        "slice_cache_start.py",
        _cache,
        {"model": DEMO, "ranks": [1, 2], "r": 16, "slices": 8, "bf16": False},
    ),
    Figure(
        "loading a model of {gigabytes:g} GB, peak memory of a rank and time",
        "load_memory",
        "load_memory.py",
        _load,
        {"gigabytes": 3.0, "ranks": [2, 4]},
    ),
    Figure(
        "exporting a model of {gigabytes:g} GB, {ranks} ranks, peak memory",
        "export_memory",
        "export_memory.py",
        _export,
        {"gigabytes": 3.0, "ranks": 2, "r": 8, "slices": 8},
    ),
    Figure(
        "a checkpoint of SmolLM2-135M, S = {slices}, r = {r}, {ranks} ranks",
        "checkpoint",
        "checkpoint.py",
        _checkpoint,
        {"model": DEMO, "ranks": 2, "slices": 8, "r": 16, "rounds": 5},
    ),
    Figure(
        "what {ranks} processes of one core each reach, at the same time",
        "cpu_rates",
        "cpu_rates.py",
        _rates,
        {"ranks": 2, "weights": 134_515_008},
    ),
    Figure(
        "CPU time of a training step on {num_accelerators[0]} ranks, frozen base = 1, SmolLM2-135M, {dtype}, r = {r}, "
        "S = {slices}",
        "throughput_smollm2_135m_instruct_fp32",
        f"{THROUGHPUT} --steps 3 --warmup 2",
        _throughput,
        THROUGHPUT_IS,
    ),
    Figure(
        "the same runs: time of the published algorithm's step, HD-PiSSA's = 1; wanted are 3",
        "throughput_smollm2_135m_instruct_fp32",
        f"{THROUGHPUT} --steps 3 --warmup 2",
        _published,
        THROUGHPUT_IS,
    ),
    Figure(
        "the same with weights that stay gathered",
        "throughput_smollm2_135m_instruct_fp32_gathered",
        f"{THROUGHPUT} --steps 3 --warmup 2 --methods {' '.join(FEW)} "
        "--zero stage3_param_persistence_threshold=1000000000000 --label gathered",
        _published,
        THROUGHPUT_IS | {"methods": FEW, "zero": GATHERED},
    ),
    Figure(
        "the same in {dtype}, which this CPU emulates, S = 2, one micro-batch; wanted are 6",
        "throughput_smollm2_135m_instruct_bf16",
        f"throughput.py --model ~/.cache/hdpissa/{DEMO} --num_accelerators 2 --r 16 --max_length 256 --dtype bf16 "
        f"--steps 1 --warmup 1 --methods {' '.join(FEW)}",
        _published,
        {
            "model": DEMO,
            "num_accelerators": [2],
            "methods": FEW,
            "r": 16,
            "slices": None,
            "accumulation": 1,
            "micro_batch": 2,
            "max_length": 256,
            "dtype": "bf16",
            "steps": 1,
            "warmup": 1,
            "layers": None,
            "zero": {},
        },
    ),
    Figure(
        "the fp32 runs: peak memory of a rank",
        "throughput_smollm2_135m_instruct_fp32",
        f"{THROUGHPUT} --steps 3 --warmup 2",
        _memory,
        THROUGHPUT_IS,
    ),
    Figure(
        "test loss on GSM8K after {steps} steps of 8 rows, best of two learning rates, mean ± standard deviation of "
        "3 seeds (nats per answer token)",
        "quality",
        "quality.py --dataset_name gsm8k_train.jsonl --test_dataset_name gsm8k_test.jsonl --prompt_field question "
        "--response_field answer --steps 6 --eval_steps 6 --test_rows 8 --max_new_tokens 96 "
        "--rates lora_r16=2e-3,6e-3 lora_r128=2e-3,6e-3 pissa_r16=2e-4,6e-4 pissa_r128=2e-4,6e-4 "
        "hd_pissa_s8_r16=2e-4,6e-4 full=2e-4,6.67e-5",
        _quality,
        QUALITY_IS,
    ),
    Figure("bytes and FLOP of a step, counted and planned", "plan_counted", "projection.py", _counted),
    Figure(
        "rank of the change of W, r = {r}",
        "update_rank",
        "update_rank.py",
        _rank,
        {
            "model_name_or_path": DEMO,
            "dataset_name": None,
            "methods": ["lora", "pissa", "hd_pissa", "full"],
            "slices": [1, 2, 4, 8],
            "r": 16,
            "steps": [1, 3],
            "lr": 2e-4,
            "layers": [],
            "micro_batch": 1,
            "accumulation": 8,
        },
    ),
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
        yield f"| {figure.asked} | {said} | {source} |"


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
