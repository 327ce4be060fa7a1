"""Comparisons of what methods learn for real: two steps of four methods, and how they are told and stored."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from pathlib import Path

import launch_runs
import pytest
from quality_starts import start, table
from ranks import run_ranks

from hdpissa.benchmarks import apart, quality, quality_record
from hdpissa.benchmarks.quality import Arguments, make_arms


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return launch_runs.make_inputs(tmp_path_factory.mktemp("inputs"))


REAL = ("lora_r2", "pissa_r2", "hd_pissa_s2_r2", "full")

# What PEFT's comparison (method_comparison/processing.py) takes from a record, and the type it gives a column.
PEFT_COLUMNS = {
    ("run_info", "experiment_name"): "string",
    ("run_info", "train_config", "model_id"): "string",
    ("run_info", "total_time"): float,
    ("run_info", "peft_branch"): "string",
    ("run_info", "created_at"): "string",
    ("train_info", "accelerator_memory_reserved_avg"): int,
    ("train_info", "accelerator_memory_max"): int,
    ("train_info", "accelerator_memory_reserved_99th"): int,
    ("train_info", "train_time"): float,
    ("train_info", "file_size"): int,
    ("train_info", "metrics", -1, "test accuracy"): float,
    ("train_info", "metrics", -1, "train loss"): float,
    ("train_info", "metrics", -1, "train samples"): int,
    ("train_info", "metrics", -1, "train total tokens"): int,
    ("meta_info", "package_info"): "string",
    ("meta_info", "package_info", "peft-version"): "string",
    ("meta_info", "package_info", "transformers-version"): "string",
    ("meta_info", "package_info", "datasets-version"): "string",
    ("meta_info", "package_info", "torch-version"): "string",
    ("meta_info", "package_info", "bitsandbytes-version"): "string",
    ("meta_info", "system_info"): "string",
}


def peft_frame(folder: Path):
    """The records of a folder as PEFT's comparison loads them: the successful ones, but it looks into all."""
    import pandas

    rows = []
    for content in (json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))):
        kind = content["run_info"]["peft_config"]
        row = {("peft_type",): kind["peft_type"] if kind else "full-finetuning"}
        assert content["meta_info"]
        if content["train_info"]["status"] == "success":
            for path in PEFT_COLUMNS:
                row[path] = functools.reduce(operator.getitem, path, content)
            rows.append(row)
    frame = pandas.DataFrame([{"/".join(map(str, path)): value for path, value in row.items()} for row in rows])
    return frame.astype({"/".join(map(str, path)): kind for path, kind in PEFT_COLUMNS.items()})


@pytest.fixture(scope="module")
def compared(inputs, tmp_path_factory):
    """Two steps of four methods with two seeds and the base, every run in a process of its own."""
    folder = tmp_path_factory.mktemp("quality")
    command = ["--model", inputs["model_name_or_path"], "--dataset_name", inputs["dataset_name"], "--r", "2"]
    command += ["--slices", "2", "--accumulation", "2", "--steps", "2", "--eval_steps", "1", "--seeds", "0", "1"]
    command += ["--eval_rows", "6", "--test_rows", "5", "--max_new_tokens", "4", "--warmup_ratio", "0"]
    command += ["--folder", folder / "out", "--output_dir", folder]
    rates = ["--rates", *(f"{arm}={'1e-2' if 'lora' in arm else '3e-3'}" for arm in REAL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "call", lambda function, *args: run_ranks(1, function, *args)[0])  # a fork that is there
        assert start(patch, *command, "--arms", *REAL, *rates, "--time_limit", "0.001") == 0
        assert len(list(folder.glob("*.json"))) == 1
        assert start(patch, *command, "--arms", *REAL, *rates) == 0
    return folder, command


def stored(folder: Path, experiment: str) -> dict:
    return json.loads((folder / f"{experiment.replace('/', '--')}.json").read_text())


def test_a_comparison_of_four_methods_with_two_seeds(compared):
    """Went on after its first run to the end. All start at the base's loss, learn something else with another seed,
    and the plain model with the merged weights has the loss that training ended at."""
    folder, _ = compared
    rows = table(folder)
    assert list(rows) == ["base", *REAL]
    for arm in REAL:
        assert rows[arm]["seeds"] == len(rows[arm]["samples"]["valid loss"]) == 2
        assert "incomplete" not in rows[arm]["remark"]
        assert rows[arm]["± valid"] > 0
        assert rows[arm]["valid loss"] < rows["base"]["valid loss"]
        own = stored(folder, quality_record.experiment(arm, rows[arm]["learning rate"], 1))
        first, _, trained, last = own["train_info"]["metrics"]
        assert first["valid loss"] == pytest.approx(rows["base"]["valid loss"], rel=1e-4)
        assert last["valid loss"] == pytest.approx(trained["valid loss"], rel=1e-3)
        assert last["train loss"] == own["hdpissa"]["losses"][-1]  # of the last --eval_steps, as in PEFT's
        memory = own["hdpissa"]["memory"]
        assert 0 < memory["start"] < min(memory["build"], memory["train"], memory["validation"])
        answers = folder / "answers" / f"{arm}--lr_{rows[arm]['learning rate']:g}-seed_1.jsonl"
        assert len(answers.read_text().splitlines()) == 5
    assert (folder / "out" / "quality.png").stat().st_size > 10_000


def test_records_load_as_those_of_peft(compared, monkeypatch):
    """With the run that was killed beside them: file sizes are those of the trained numbers in fp32."""
    folder, _ = compared
    args = Arguments(model_name_or_path="m", output_dir=str(folder))

    def killed(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(apart, "call", killed)
    arms = make_arms(args)
    job = quality.make_job(args, arms["lora_r128"], 1.0, 0, quality.plan_of(args, arms))
    try:
        assert quality.run_job(job, "1234") == "failed: RuntimeError: out of memory"
        frame = peft_frame(folder)
    finally:
        Path(job.record).unlink()
    assert len(frame) == 1 + 2 * len(REAL)
    sizes = dict(zip(frame["run_info/experiment_name"], frame["train_info/file_size"], strict=True))
    for name, size in sizes.items():
        assert size == 4 * stored(folder, name)["train_info"]["num_trainable_params"]
        assert size > 0 or name.startswith("base")
    assert (frame["train_info/accelerator_memory_reserved_avg"] < frame["train_info/accelerator_memory_max"] + 1).all()


def test_reports_what_is_there(compared, monkeypatch, capsys):
    """The same table, without any option of the runs; runs of other settings do not go into the folder."""
    folder, command = compared
    before = (folder / "out" / "quality.md").read_text().splitlines()[:-1]  # the last line names the process
    assert start(monkeypatch, "--report", "--output_dir", folder, "--folder", folder / "out") == 0
    assert "9 runs there, 0 missing" in capsys.readouterr().out
    assert (folder / "out" / "quality.md").read_text().splitlines()[:-1] == before
    assert start(monkeypatch, *command, "--arms", "full", "--steps", "5") == 2
    assert "another configuration" in capsys.readouterr().err


def test_runs_that_diverge_are_told_apart_from_runs_that_fail(compared, tmp_path, monkeypatch, capsys):
    """HD-PiSSA refuses such a step, AdamW takes it; both have diverged, are not tried again, and have a row."""
    folder, command = compared
    shutil.copytree(folder, tmp_path / "more")
    command = [tmp_path / "more" if part == folder else part for part in command]
    command += ["--arms", "hd_pissa_s2_r2", "full", "--rates", "hd_pissa_s2_r2=1e30", "full=1e30"]
    monkeypatch.setattr(apart, "call", lambda function, *args: run_ranks(1, function, *args)[0])
    assert start(monkeypatch, *command) == 0
    assert "complete; 3 runs there, 0 missing" in capsys.readouterr().out
    for arm, words in (("hd_pissa_s2_r2", "refused: learning rate"), ("full", "loss")):
        own = stored(tmp_path / "more", f"{arm}/lr_1e+30-seed_0")
        assert own["train_info"]["status"] == "diverged"
        assert words in own["run_info"]["error_msg"]
    rows = json.loads((folder / "out" / "quality.json").read_text())["rows"]
    assert all("no learning rate gave a finite loss" in row["remark"] for row in rows[1:])
    assert "2 run(s) at other rates" in rows[1]["remark"]
    assert len(peft_frame(tmp_path / "more")) == 1 + 2 * len(REAL)
