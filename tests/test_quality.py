"""The comparison of what methods learn: its arithmetic, the order of its runs, and one of them for real."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import launch_runs
import pytest
import torch
from ranks import run_ranks

from hdpissa.benchmarks import apart, quality, quality_record, quality_report, quality_run, task
from hdpissa.benchmarks.quality import Arguments, make_arms
from hdpissa.engine import answers
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.generation import generate

# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is 3 + 4 = 7.\n#### 7\n", "x\n#### 7", True),
        ("#### 1,234", "#### 1234", True),
        ("#### $7.00.", "#### 7", True),
        ("#### 7\n#### 8", "#### 8", False),  # the first one counts
        ("#### 17", "#### 7", False),
        ("The answer is 7", "#### 7", False),  # the mark is part of the task
        ("####", "#### 7", False),
        ("yes", "yes", True),
        ("yes ", "no", False),
    ],
)
def test_an_answer_is_judged_by_its_result(answer, reference, right):
    assert answers.is_right(answer, reference) is right


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return launch_runs.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_batched_answers_are_those_of_each_alone(inputs):
    """In their order; padding on the left changes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = inputs["model_name_or_path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts = ["a b c d e f", "x", "What is 3 + 4?", "one two three four five"]
    ids, device = tokenizer(prompts)["input_ids"], torch.device("cpu")
    alone, batched = (
        generate(model, tokenizer, ids, batch_size=n, max_new_tokens=6, device=device) for n in (1, len(prompts))
    )
    assert alone == batched
    assert len(set(alone)) == len(prompts)


# --- one run ----------------------------------------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_method():
    """lr·t/warm-up, then 0.5·lr·(1 + cos(π (t − warm-up)/(total − warm-up))), t counted from 0."""
    rates = quality_run.learning_rates(3e-4, 20, 0.1)
    expected = [3e-4 * t / 2 if t < 2 else 1.5e-4 * (1 + math.cos(math.pi * (t - 2) / 18)) for t in range(20)]
    assert rates == pytest.approx(expected)
    assert quality_run.learning_rates(1.0, 4, 0.03)[0] == 1.0


@pytest.mark.parametrize("found", [2.1, math.nan])
def test_weights_that_are_not_the_trained_ones_are_noticed(found):
    with pytest.raises(RuntimeError, match="merged weights"):
        quality_run.refuse_other_model(found, 2.0, "fp32")
    quality_run.refuse_other_model(2.0001, 2.0, "fp32")


# --- the order of the runs --------------------------------------------------------------------------------------------


def arguments(**more) -> Arguments:
    return Arguments(model_name_or_path="m", arms=["lora_r16", "full"], seeds=[0, 1], **more)


def record(arm: str, lr: float, seed: int, loss: float | None, **more) -> dict:
    method = arm.split("_r")[0] if arm != "base" else None
    last = {"step": 2, "valid loss": loss, "test loss": loss, "test accuracy": more.get("accuracy", 0.5)}
    return {
        "run_info": {"experiment_name": quality_record.experiment(arm, lr, seed), "total_time": 9.0},
        "train_info": {
            "train_time": 5.0 + seed,
            "accelerator_memory_max": 2e9,
            "num_trainable_params": 7,
            "status": "success",
            "metrics": [{"step": 0, "valid loss": 9.0}, {"step": 2, "valid loss": loss}, last],
        },
        "meta_info": {"dataset_info": {"task": {"sha": more.get("rows", "1234")}}},
        "hdpissa": {"arm": arm, "method": method, "r": 16, "slices": 0, "lr": lr, "seed": seed}
        | {"configuration": quality.configuration(arguments()), "rows": {"train": 3, "truncated": 0}},
    }


def done(*records: dict) -> dict[str, dict]:
    return {r["run_info"]["experiment_name"]: r for r in records}


def test_arms_and_their_sweeps():
    arms = make_arms(Arguments(rate_scale=1.0))
    assert list(arms) == ["lora_r16", "lora_r128", "pissa_r16", "pissa_r128", "hd_pissa_s8_r16", "full"]
    assert arms["hd_pissa_s8_r16"].rates == pytest.approx((2e-5, 2e-5 / 3, 6e-5), rel=1e-2)
    assert arms["lora_r128"].rates[0] == pytest.approx(2e-4)
    assert {len(arm.rates) for arm in arms.values()} == {3}
    own = make_arms(Arguments(arms=["full"], rates=["full=1e-5,3e-5"]))
    assert own["full"].rates == (1e-5, 3e-5)


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"arms": ["dora"]}, "--arms dora"),
        ({"rates": ["dora=1"]}, "--rates dora"),
        ({"rates": ["full=1e-5"]}, "equally many"),
        ({"rates": ["full=a"]}, "ARM=RATE"),
        ({"rates": ["full=1e-5,1e-5,2e-5"]}, "different"),
    ],
)
def test_unfair_or_unknown_sweeps_are_refused(more, rule):
    with pytest.raises(ConfigError, match=rule):
        make_arms(Arguments(**more))


def test_all_first_rates_come_before_any_second_one():
    args = arguments(rates=["lora_r16=1e-4,1e-3", "full=1e-5,1e-4"])
    arms = make_arms(args)
    names = [job.experiment for job in quality.plan(args, arms, {})]
    first = ["lora_r16/lr_0.0001-seed_0", "full/lr_1e-05-seed_0"]
    assert names == ["base/lr_0-seed_0", *first, "lora_r16/lr_0.001-seed_0", "full/lr_0.0001-seed_0"]


def test_other_seeds_have_the_best_rate_of_a_complete_sweep():
    args = arguments(rates=["lora_r16=1e-4,1e-3", "full=1e-5,1e-4"])
    arms = make_arms(args)
    there = [record("base", 0.0, 0, 9.0), record("lora_r16", 1e-4, 0, 2.0), record("lora_r16", 1e-3, 0, 1.5)]
    there += [record("full", 1e-5, 0, 2.5)]
    job = quality.next_job(args, arms, done(*there), set())
    assert job is not None
    assert job.experiment == "full/lr_0.0001-seed_0"
    there += [record("full", 1e-4, 0, None)]  # diverged: not the best, but tried
    seeds = [job.experiment for job in quality.plan(args, arms, done(*there)) if job.seed == 1]
    assert seeds == ["lora_r16/lr_0.001-seed_1", "full/lr_1e-05-seed_1"]


def test_runs_of_another_configuration_are_refused(tmp_path):
    args = arguments(output_dir=str(tmp_path))
    found = record("full", 1e-5, 0, 2.0)
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert list(quality.read_records(args)) == ["full/lr_1e-05-seed_0"]
    (tmp_path / "b.json").write_text(json.dumps(found | {"train_info": {"status": "failed"}}))
    assert len(quality.read_records(args)) == 1  # to be tried again
    with pytest.raises(ConfigError, match=r"another configuration.*steps"):
        quality.read_records(arguments(output_dir=str(tmp_path), steps=21))
    assert quality.read_records(arguments(output_dir=str(tmp_path), steps=21), any_configuration=True)
    with pytest.raises(ConfigError, match="other rows"):
        quality.read_records(args, digest="5678")
    (tmp_path / "c.json").write_text(json.dumps(record("full", 1e-4, 0, 2.0, rows="5678")))
    with pytest.raises(ConfigError, match="other rows"):
        quality.read_records(args)


# --- the report -------------------------------------------------------------------------------------------------------


def test_mean_and_spread_are_over_the_seeds_of_the_best_rate():
    runs = [record("full", 1e-5, seed, loss) for seed, loss in ((0, 2.0), (1, 2.3), (2, 2.9))]
    runs += [record("full", 1e-4, 0, 2.4), record("full", 1e-6, 0, 2.2)]
    row = quality_report.summary("full", runs, 0)
    assert row["learning rate"] == 1e-5
    assert row["valid loss"] == pytest.approx(2.4)
    assert row["± valid"] == pytest.approx(statistics.stdev([2.0, 2.3, 2.9]))
    assert row["samples"]["train s"] == [5.0, 6.0, 7.0]
    assert row["remark"] == "best of 3 rates"
    assert quality_report.summary("full", runs[:4], 0)["remark"] == "best of 2 rates is the least"


def test_a_run_that_diverged_is_never_the_best():
    runs = [record("full", 1e-5, 0, None), record("full", 1e-6, 0, 3.0)]
    assert quality_report.summary("full", runs, 0)["valid loss"] == 3.0
    assert "finite" in quality_report.summary("full", runs[:1], 0)["remark"]


def test_curve_is_the_mean_over_runs():
    steps, mean, spread = quality_report.curve([record("full", 1e-5, 0, 2.0), record("full", 1e-5, 1, 4.0)])
    assert (steps, mean) == ([0, 2], [9.0, 3.0])
    assert spread == pytest.approx([0.0, math.sqrt(2)])


# --- for real ---------------------------------------------------------------------------------------------------------


def shown(folder: Path) -> list[str]:
    """The table without its last line, which names the process that wrote it."""
    return (folder / "quality.md").read_text().splitlines()[:-1]


def test_stops_goes_on_and_reports(inputs, tmp_path, monkeypatch, capsys):
    """A comparison with the base: stopped after its first run, gone on with to the end, shown again."""
    command = ["--model", inputs["model_name_or_path"], "--dataset_name", inputs["dataset_name"], "--r", "2"]
    command += ["--slices", "2", "--accumulation", "4", "--steps", "4", "--eval_steps", "2", "--seeds", "0"]
    command += ["--arms", "hd_pissa_s2_r2", "--rates", "hd_pissa_s2_r2=1e-2", "--eval_rows", "6"]
    command += ["--test_rows", "5", "--max_new_tokens", "8", "--folder", str(tmp_path), "--output_dir", f"{tmp_path}/o"]

    monkeypatch.setattr(apart, "call", lambda function, *args: run_ranks(1, function, *args)[0])  # a fork that is there

    def start(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quality.py", *command, *more])
        assert task.run(quality.main) == 0
        return capsys.readouterr().out

    assert "stopped after" in start("--time_limit", "0.001")
    assert "complete; 2 runs there, 0 missing" in (told := start())
    assert "base/lr_0-seed_0: done" not in told
    rows = {row["arm"]: row for row in json.loads((tmp_path / "quality.json").read_text())["rows"]}
    assert rows["hd_pissa_s2_r2"]["valid loss"] < rows["base"]["valid loss"]
    kept = (tmp_path / "o" / "answers" / "hd_pissa_s2_r2--lr_0.01-seed_0.jsonl").read_text().splitlines()
    assert len(kept) == 5
    assert {"run_info", "train_info", "meta_info"} < json.loads(
        (tmp_path / "o" / "hd_pissa_s2_r2--lr_0.01-seed_0.json").read_text()
    ).keys()
    before = shown(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quality.py", *command, "--report"])
    assert task.run(quality.main) == 0
    assert shown(tmp_path) == before
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["quality.py", *command, "--steps", "5"])
    assert task.run(quality.main) == 2
    assert "another configuration" in capsys.readouterr().err
