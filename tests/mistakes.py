"""Mistakes in a command line: how they are written down, run in one process, and judged.

What counts for each is the same: one line with value, rule and remedy, exit code 2, before any weight is read.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch_runs import flags, forbid_weights, listing, train_here, write_ds_config
from ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """One mistake in a command line that is otherwise right.

    Attributes:
        mistake: what was done, in words.
        words: what the message has to contain: the value, the rule, the remedy.
        arguments: replaces command-line arguments; None leaves one out. "DIR" is the folder of all files.
        ds: replaces top-level keys of the DeepSpeed JSON.
        environment: a launcher's variables.
    """

    mistake: str
    words: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    ds: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def argument(mistake: str, words: tuple[str, ...], **arguments: Any) -> Case:
    return Case(mistake, words, arguments=arguments)


def deepspeed(mistake: str, words: tuple[str, ...], **ds: Any) -> Case:
    return Case(mistake, words, ds=ds)


def section(mistake: str, words: tuple[str, ...], **hd_pissa: Any) -> Case:
    return Case(mistake, words, ds={"hd_pissa": {"r": 4, **hd_pissa}})


def without_gpu(mistake: str, words: tuple[str, ...], **kernels: Any) -> Case:
    """As on a machine where nobody has asked for Triton's interpreter."""
    return Case(mistake, words, ds={"hd_pissa": {"r": 4, "kernels": kernels}}, environment={"TRITON_INTERPRET": "0"})


def zero(mistake: str, words: tuple[str, ...], **keys: Any) -> Case:
    return Case(mistake, words, ds={"zero_optimization": {"stage": 3, **keys}})


# --- the files that are wrong ----------------------------------------------------------------------


def make_broken_files(folder: Path) -> None:
    """Files that several tables of cases call "DIR/…", beside those of `make_inputs`."""
    row = '{"instruction": "1 + 1", "response": "2"}\n'
    texts = {
        "key.yaml": "learning_rat: 1e-4\n",
        "type.yaml": "max_steps: many\n",
        "list.yaml": "- max_steps\n",
        "broken.yaml": "max_steps: 1\nseed: [1\n",
        "twice.yaml": "ds_config: a.json\ndeepspeed: b.json\n",
        "broken.json": '{"bf16": {"enabled": true},\n "hd_pissa": {"r": 4},}',
        "twice.json": '{"zero_optimization": {"stage": 2, "stage": 3}}',
        "notes.txt": "Nothing to see here.\n",
        "broken.jsonl": row + '{"instruction": \n',
        "empty.jsonl": "",
        "hole.jsonl": row + '{"instruction": "2 + 2", "response": null}\n',
        "bare/readme.md": "",
        "broken_model/config.json": '{"model_type": ',
        "t5/config.json": '{"model_type": "t5"}',
        "used/run.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("mute", "no_eos"):
        shutil.copytree(folder / "model", folder / name)
    for path in (folder / "mute").glob("token*"):
        path.unlink()
    settings = folder / "no_eos" / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "eos_token"}))


# --- all cases in one process ----------------------------------------------------------------------


def collect(cases: list[Case], folder: Path, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Runs every case in one process: mistake → exit code, standard error with DIR for the folder, `written`."""
    runs = {}
    for number, case in enumerate(cases):
        arguments = _arguments(case, number, folder, inputs)
        runs[case.mistake] = (flags(arguments), case.environment, arguments.get("output_dir", ""))
    (results,) = run_ranks(1, run_all, runs, str(folder / "cache"))
    for result in results.values():
        result["stderr"] = result["stderr"].replace(str(folder), "DIR")
    return results


def _arguments(case: Case, number: int, folder: Path, inputs: dict[str, str]) -> dict[str, Any]:
    """The arguments of a run that would be fine but for the case's mistake."""
    right = {**inputs, "output_dir": "DIR/out", "max_steps": 2}
    right |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    if case.ds:
        right["ds_config"] = str(write_ds_config(folder / f"ds_{number}.json", **case.ds))
    wanted = {k: v for k, v in (right | case.arguments).items() if v is not None}
    return {k: v.replace("DIR", str(folder)) if isinstance(v, str) else v for k, v in wanted.items()}


def run_all(cases: dict[str, tuple[list[str], dict[str, str], str]], cache: str) -> dict[str, dict[str, Any]]:
    """On a rank: each case's exit code and standard error, and whether it left something in its output folder.

    Args:
        cases: name → (argv, environment, output folder).
    """
    forbid_weights("weights were read before the mistake was found")
    return {name: _run(*case, cache) for name, case in cases.items()}


def _run(argv: list[str], environment: dict[str, str], output: str, cache: str) -> dict[str, Any]:
    before, saved = listing(output), dict(os.environ)
    os.environ.update(environment)
    result = train_here(argv, cache)
    os.environ.clear()
    os.environ.update(saved)
    return {**result, "written": listing(output) != before}


# --- what counts -----------------------------------------------------------------------------------


def assert_told(case: Case, result: dict[str, Any]) -> None:
    """Exit code 2, one line with all words, nothing written, no weights read (see `run_all`)."""
    assert (result["code"], result["error"]) == (2, None), result["stderr"]
    lines = result["stderr"].splitlines()
    assert len(lines) == 1, result["stderr"]
    assert lines[0].startswith("error: "), lines[0]
    assert [word for word in case.words if word not in lines[0]] == [], lines[0]
    assert not result["written"]


def print_table(cases: list[Case], results: dict[str, dict[str, Any]]) -> None:
    """Inputs and messages as Markdown."""
    print("| input | message |\n| --- | --- |")
    for case in cases:
        message = results[case.mistake]["stderr"].strip().removeprefix("error: ")
        print(f"| {case.mistake} | {message.replace('|', chr(92) + '|')} |")
