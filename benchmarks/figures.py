"""README's table of figures, made from the committed results: no number is typed by hand.

    python benchmarks/figures.py          prints the table
    python benchmarks/figures.py --write  puts it into README.md, between its two marks

tests/benchmarks/test_figures.py holds that README says what the results say, and that each result is of the
configuration that its row names. A result that is not there yet is said to be missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpissa.benchmarks import figure_words
from hdpissa.benchmarks.figure_words import Rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: python benchmarks/figures.py --write -->", "<!-- end of figures -->"


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
        """The question with its values; {rows} is how many rows a slice has in a step."""
        return self.question.format(**self.configuration, rows=rows_per_slice(self.configuration))

    def others(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """What the stored configuration says otherwise; key → its value. Older results hold their values as text."""
        both = {key: value for key, value in self.configuration.items() if key in stored}
        return {key: stored[key] for key, value in both.items() if str(stored[key]) != str(value)}

    def not_told(self, stored: Mapping[str, Any]) -> list[str]:
        """What the stored configuration does not say."""
        return [key for key in self.configuration if key not in stored]


def rows_per_slice(configuration: Mapping[str, Any]) -> str:
    """Of a step of throughput.py, in words; nothing for other configurations."""
    if "num_accelerators" not in configuration or "micro_batch" not in configuration:
        return ""
    ranks = configuration["num_accelerators"][-1]
    rows = ranks * configuration["accumulation"] * configuration["micro_batch"]
    count = rows // (configuration["slices"] or ranks)
    return f"{count} row{'s' if count > 1 else ''} per slice"


DEMO = "smollm2-135m-instruct"
THROUGHPUT = (
    f"throughput.py --model ~/.cache/hdpissa/{DEMO} --num_accelerators 2 --r 16 --slices 8 --accumulation 4"
    " --micro_batch 1 --max_length 256 --steps 2 --warmup 1 --rounds 3"
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
    "steps": 2,
    "warmup": 1,
    "rounds": 3,
    "dtype": "fp32",
    "layers": None,
    "zero": {},
    "gradient_checkpointing": False,
}
FEW = ["hd_pissa", "frozen", "reference"]
GATHERED = {"stage3_param_persistence_threshold": 10**12}  # as in ds_configs/zero3_gathered.json
FEW_GATHERED = f"--methods {' '.join(FEW)} --zero stage3_param_persistence_threshold=1000000000000 --label gathered"
STAY_GATHERED = f"{THROUGHPUT} {FEW_GATHERED}"
LONG_ROWS_ARE = {"micro_batch": 2, "max_length": 512, "steps": 1, "warmup": 1, "rounds": 1}
LONG_ROWS = (
    f"throughput.py --model ~/.cache/hdpissa/{DEMO} --num_accelerators 2 --r 16 --slices 8 --accumulation 4"
    " --micro_batch 2 --max_length 512 --steps 1 --warmup 1 --dtype bf16"
    f" {FEW_GATHERED.removesuffix('gathered')}long_rows"
)
IN_BF16 = f"{THROUGHPUT.replace('--rounds 3', '--rounds 2')} --dtype bf16"
IN_BF16_IS = THROUGHPUT_IS | {"dtype": "bf16", "rounds": 2}
FIGURES = (
    Figure(
        "kernels compiled for A100, H100 and MI300",
        "aot",
        "aot_table.py",
        figure_words.tell_aot,
        {"targets": ["sm_80", "sm_90", "gfx942"], "sample": False},
    ),
    Figure(
        "CPU time of forward + backward, frozen base = 1, SmolLM2-135M, 1024 tokens, {dtype}",
        "cpu_layers_fp32",
        "cpu_layers.py --dtype fp32 --rounds 5",
        figure_words.tell_cpu_layers,
        {"dtype": "fp32", "layers": None, "rounds": 5},
    ),
    Figure(
        "the same in {dtype}",
        "cpu_layers_bf16",
        "cpu_layers.py --dtype bf16 --rounds 3",
        figure_words.tell_cpu_layers,
        {"dtype": "bf16", "layers": None, "rounds": 3},
    ),
    Figure(
        "decomposing all targets of SmolLM2-135M, S = {slices}, r = {r}, by the clock with {threads} threads",
        "init",
        "init.py --threads 2",
        figure_words.tell_init,
        {"model_name_or_path": DEMO, "layers": None, "r": 16, "slices": 8, "threads": 2},
    ),
    Figure(
        "decomposing larger matrices, S·r = {ranks[0]}",
        "svd_methods",
        "svd_methods.py --ranks 128",
        figure_words.tell_svd,
        {"largest": 4096, "ranks": [128]},
    ),
    Figure(
        "CPU time of a start from the slice cache, the first start's = 100 %, S = {slices}, r = {r}",
        "slice_cache_start",
        "slice_cache_start.py",
        figure_words.tell_cache,
        {"model": DEMO, "ranks": [1, 2], "r": 16, "slices": 8, "bf16": False},
    ),
    Figure(
        "loading a model of {gigabytes:g} GB, peak memory of a rank and time",
        "load_memory",
        "load_memory.py",
        figure_words.tell_load,
        {"gigabytes": 3.0, "ranks": [2, 4]},
    ),
    Figure(
        "exporting a model of {gigabytes:g} GB, {ranks} ranks, peak memory",
        "export_memory",
        "export_memory.py",
        figure_words.tell_export,
        {"gigabytes": 3.0, "ranks": 2, "r": 8, "slices": 8},
    ),
    Figure(
        "a checkpoint of SmolLM2-135M, S = {slices}, r = {r}, {ranks} ranks",
        "checkpoint",
        "checkpoint.py",
        figure_words.tell_checkpoint,
        {"model": DEMO, "ranks": 2, "slices": 8, "r": 16, "rounds": 5},
    ),
    Figure(
        "what {ranks} processes of one core each reach, at the same time",
        "cpu_rates",
        "cpu_rates.py",
        figure_words.tell_rates,
        {"ranks": 2, "weights": 134_515_008},
    ),
    Figure(
        "CPU time of a training step on {num_accelerators[0]} ranks, frozen base = 1, SmolLM2-135M, {dtype}, r = {r}, "
        "S = {slices}, {rows}",
        "throughput_smollm2_135m_instruct_fp32",
        THROUGHPUT,
        figure_words.tell_throughput,
        THROUGHPUT_IS,
    ),
    Figure(
        "the same runs: time of the published algorithm's step, HD-PiSSA's = 1; the goal is 3",
        "throughput_smollm2_135m_instruct_fp32",
        THROUGHPUT,
        figure_words.tell_published,
        THROUGHPUT_IS,
    ),
    Figure(
        "the same runs: time of the published algorithm's update alone (exchange and apply), HD-PiSSA's = 1; it leaves "
        "the new W on every rank, HD-PiSSA's leaves shards, which the next passes gather",
        "throughput_smollm2_135m_instruct_fp32",
        THROUGHPUT,
        figure_words.tell_update,
        THROUGHPUT_IS,
    ),
    Figure(
        "the update alone with weights that stay gathered: both leave the new W on every rank, {rows}",
        "throughput_smollm2_135m_instruct_fp32_gathered",
        STAY_GATHERED,
        figure_words.tell_update,
        THROUGHPUT_IS | {"methods": FEW, "zero": GATHERED},
    ),
    Figure(
        "whole steps with weights that stay gathered, {rows}",
        "throughput_smollm2_135m_instruct_fp32_gathered",
        STAY_GATHERED,
        figure_words.tell_published,
        THROUGHPUT_IS | {"methods": FEW, "zero": GATHERED},
    ),
    Figure(
        "CPU time of the same step in {dtype}, frozen base = 1",
        "throughput_smollm2_135m_instruct_bf16",
        IN_BF16,
        figure_words.tell_throughput,
        IN_BF16_IS,
    ),
    Figure(
        "the same runs in {dtype}: time of the published algorithm's step (fp32, as published), HD-PiSSA's = 1; the "
        "goal is 6",
        "throughput_smollm2_135m_instruct_bf16",
        IN_BF16,
        figure_words.tell_published,
        IN_BF16_IS,
    ),
    Figure(
        "whole steps in {dtype} with weights that stay gathered, {rows}; the goal is 6",
        "throughput_smollm2_135m_instruct_bf16_gathered",
        f"{THROUGHPUT} --dtype bf16 {FEW_GATHERED}",
        figure_words.tell_published,
        THROUGHPUT_IS | {"methods": FEW, "zero": GATHERED, "dtype": "bf16"},
    ),
    Figure(
        "the same with longer rows, {micro_batch} of up to {max_length} tokens in a micro-batch, as published, {rows}; "
        "the goal is 6",
        "throughput_smollm2_135m_instruct_bf16_long_rows",
        LONG_ROWS,
        figure_words.tell_published,
        THROUGHPUT_IS | {"methods": FEW, "zero": GATHERED, "dtype": "bf16"} | LONG_ROWS_ARE,
    ),
    Figure(
        "the fp32 runs: peak memory of a rank",
        "throughput_smollm2_135m_instruct_fp32",
        THROUGHPUT,
        figure_words.tell_memory,
        THROUGHPUT_IS,
    ),
    Figure(
        "bytes and FLOP of a step of a tiny model, counted and planned",
        "plan_counted",
        "projection.py",
        figure_words.tell_counted,
        {"num_accelerators": [1, 2, 4]},
    ),
    Figure(
        "rank of the change of W, r = {r}",
        "update_rank",
        "update_rank.py",
        figure_words.tell_rank,
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
