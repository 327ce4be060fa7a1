"""The comparison of what methods learn: its arithmetic, the order of its runs, its table."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import launch_runs
import pytest
import torch
from quality_starts import start, table

from hdpissa.benchmarks import quality, quality_record, quality_report, quality_run, suite, task
from hdpissa.benchmarks.quality import Arguments, make_arms
from hdpissa.benchmarks.quality_record import Plan
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
    last = {"step": 2, "valid loss": loss}
    if loss is not None:
        last |= {"test loss": loss, "test accuracy": more.get("accuracy", 0.5)}
    own = {"arm": arm, "method": method, "r": 16, "slices": 0, "lr": lr, "seed": seed, "losses": [3.0, loss]}
    if "plan" in more:
        own |= {"plan": more["plan"].as_record(), "memory": {"start": 1e9, "build": 4e9, "train": 2.5e9}}
    return {
        "run_info": {"experiment_name": quality_record.experiment(arm, lr, seed), "total_time": 9.0}
        | {"created_at": f"2025-01-01T00:00:{more.get('second', 0):02}+00:00"},
        "train_info": {
            "train_time": 5.0 + seed,
            "accelerator_memory_max": 2e9,
            "num_trainable_params": 7,
            "status": "success",
            "metrics": [{"step": 0, "valid loss": 9.0}, {"step": 2, "valid loss": loss}, last],
        },
        "meta_info": {"dataset_info": {"task": {"sha": more.get("rows", "1234")}}},
        "hdpissa": own | {"configuration": quality.configuration(arguments()), "rows": {"train": 3, "truncated": 0}},
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


# --- a folder that holds more than one comparison ---------------------------------------------------------------------

RATES = {"lora_r16": (1e-4, 1e-3), "full": (1e-5, 1e-4)}


@pytest.fixture
def folder(tmp_path):
    """Two arms with their sweeps and two seeds, then a later run of one of them at other rates."""

    def fill(*, known=True, later: tuple[float, ...] = (1e-6, 1e-7)) -> Path:
        first, second = Plan(RATES, (0, 1)), Plan({"full": later}, (0, 1))
        runs = [("base", 0.0, 0, 9.0, first)]
        runs += [(arm, rate, 0, 2.0 + rate, first) for arm, rates in RATES.items() for rate in rates]
        runs += [("lora_r16", 1e-4, 1, 2.5, first), ("full", 1e-5, 1, 2.5, first)]
        runs += [("full", rate, 0, 1.0 + rate, second) for rate in later]
        for number, (*run, plan) in enumerate(runs):
            content = record(*run, second=number, **({"plan": plan} if known else {}))
            (tmp_path / f"{number}.json").write_text(json.dumps(content))
        return tmp_path

    return fill


def test_only_planned_rates_stand_in_the_table(folder, monkeypatch):
    """The later plan's; runs at other rates are counted in the remark, and --rates asks for the earlier ones."""
    path = folder()
    command = ["--report", "--output_dir", path, "--folder", path / "out"]
    assert start(monkeypatch, *command) == 0
    row = table(path)["full"]
    assert row["valid loss"] == 1.0 + 1e-7
    assert "incomplete: 1 of 2 seeds" in row["remark"]
    assert "3 run(s) at other rates" in row["remark"]
    assert start(monkeypatch, *command, "--rates", "full=1e-5,1e-4") == 0
    row = table(path)["full"]
    assert row["valid loss"] == pytest.approx(2.25, abs=1e-4)
    assert "incomplete" not in row["remark"]
    assert start(monkeypatch, *command, "--arms", "lora_r16") == 0
    assert list(table(path)) == ["base", "lora_r16"]
    assert start(monkeypatch, *command, "--seeds", 0) == 0
    assert table(path)["lora_r16"]["seeds"] == 1


def test_unequal_sweeps_in_one_folder_are_refused(folder, monkeypatch, capsys):
    """By the report, and by a run before it starts."""
    path = folder(later=(1e-6, 1e-7, 1e-8))
    assert start(monkeypatch, "--report", "--output_dir", path, "--folder", path / "out") == 2
    assert "sweeps of 2 rates (lora_r16) and of 3 (full)" in capsys.readouterr().err
    command = ["--model", "m", "--output_dir", path, "--folder", path / "out", "--arms", "pissa_r16"]
    assert start(monkeypatch, *command, "--rates", "pissa_r16=1e-3") == 2
    assert "give every arm equally many" in capsys.readouterr().err
    assert start(monkeypatch, "--report", "--output_dir", path, "--rates", "dora=1") == 2
    assert "--rates dora" in capsys.readouterr().err


def test_records_that_do_not_say_what_was_planned_are_reported_with_a_remark(folder, monkeypatch):
    path = folder(known=False)
    assert start(monkeypatch, "--report", "--output_dir", path, "--folder", path / "out", "--seeds", 0, 1) == 0
    assert "best of 4 rates is the least; incomplete: 1 of 2 seeds" in table(path)["full"]["remark"]
    assert all("planned rates not recorded" in table(path)[arm]["remark"] for arm in RATES)


def test_presets(monkeypatch):
    """The full one where there is a GPU, or by name; the command line before both."""
    assert task.parse(Arguments, ["--model", "m"], presets=quality.PRESETS).steps == 20
    full = task.parse(Arguments, ["--model", "m", "--preset", "full", "--r", "4"], presets=quality.PRESETS)
    assert (full.steps, full.dtype, full.test_rows, full.r) == (0, "bf16", 1319, 4)
    assert {"preset", "r"} <= full.given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = task.parse(Arguments, ["--model", "m", "--dtype", "fp32"], presets=quality.PRESETS)
    assert (here.steps, here.dtype) == (0, "fp32")
    assert task.parse(Arguments, ["--model", "m", "--preset", "small"], presets=quality.PRESETS).steps == 20
    with pytest.raises(ConfigError, match="--preset is large: must be one of small, full"):
        task.parse(Arguments, ["--model", "m", "--preset", "large"], presets=quality.PRESETS)


# --- the report -------------------------------------------------------------------------------------------------------


def test_mean_and_spread_are_over_the_seeds_of_the_best_rate():
    runs = [record("full", 1e-5, seed, loss) for seed, loss in ((0, 2.0), (1, 2.3), (2, 2.9))]
    runs += [record("full", 1e-4, 0, 2.4), record("full", 1e-6, 0, 2.2)]
    row = quality_report.summary("full", runs, Plan({"full": (1e-5, 1e-4, 1e-6)}, (0, 1, 2)))
    assert row["learning rate"] == 1e-5
    assert row["valid loss"] == pytest.approx(2.4)
    assert row["± valid"] == pytest.approx(statistics.stdev([2.0, 2.3, 2.9]))
    assert row["samples"]["train s"] == [5.0, 6.0, 7.0]
    assert row["remark"] == "best of 3 rates"
    row = quality_report.summary("full", runs[:4], Plan({"full": (1e-5, 1e-4)}, (0, 1, 2)))
    assert row["remark"] == "best of 2 rates is the least"


def test_cpu_seconds_and_differences_by_seed_are_columns():
    """Of the second seed only one arm came to its end."""
    plan = Plan({"full": (1e-5,), "hd_pissa_s8_r16": (1e-4,)}, (0, 1, 2))
    full = [record("full", 1e-5, seed, loss) for seed, loss in ((0, 2.0), (1, 1.0), (2, 2.4))]
    ours = [record("hd_pissa_s8_r16", 1e-4, seed, loss) for seed, loss in ((0, 2.1), (1, None), (2, 2.7))]
    for run in full:
        run["hdpissa"]["cpu_time"] = {"start": 1.0, "build": 2.0, "train": 3.0, "test": 4.0}
    rows = [quality_report.summary(arm, runs, plan) for arm, runs in (("full", full), ("hd_pissa_s8_r16", ours))]
    quality_report.add_differences(rows)
    assert rows[0]["CPU s"] == 10.0
    assert "CPU s" not in rows[1]
    assert rows[0]["HD-PiSSA − it"] == pytest.approx(0.2)
    assert rows[0]["± paired"] == pytest.approx(statistics.stdev([0.1, 0.3]))
    assert {"CPU s", "HD-PiSSA − it", "± paired"} <= set(quality_report.COLUMNS)


def test_a_row_with_fewer_rates_or_seeds_than_planned_says_so():
    runs = [record("full", 1e-5, 0, 2.0), record("full", 1e-5, 1, 2.0)]
    row = quality_report.summary("full", runs, Plan({"full": (1e-5, 1e-4)}, (0, 1, 2), set_aside={"full": 4}))
    assert "incomplete: 2 of 3 seeds" in row["remark"]
    assert "incomplete: 1 of 2 rates" in row["remark"]
    assert "4 run(s) at other rates" in row["remark"]
    diverged = [record("full", 1e-5, 0, None)]
    assert "1 of 2 rates" in quality_report.summary("full", diverged, Plan({"full": (1e-5, 1e-4)}, (0,)))["remark"]


def test_peaks_of_building_and_training_stand_apart():
    plan = Plan({"full": (1e-5,)}, (0,))
    row = quality_report.summary("full", [record("full", 1e-5, 0, 2.0, plan=plan)], plan)
    assert (row["peak memory GB"], row["of building GB"], row["of training GB"]) == (2.0, 3.0, 1.5)
    assert "of building GB" not in quality_report.summary("full", [record("full", 1e-5, 0, 2.0)], plan)


def test_a_run_that_diverged_is_never_the_best():
    runs = [record("full", 1e-5, 0, None), record("full", 1e-6, 0, 3.0)]
    plan = Plan({"full": (1e-5, 1e-6)}, (0,))
    assert quality_report.summary("full", runs, plan)["valid loss"] == 3.0
    assert "finite" in quality_report.summary("full", runs[:1], plan)["remark"]


@pytest.mark.parametrize("left", [1, 2])
def test_a_seed_that_diverged_at_the_best_rate_is_told_and_left_out(left, tmp_path):
    """The whole report, with as many finite seeds: means over these, and JSON without NaN."""
    plan = Plan({"full": (1e-5, 1e-4)}, (0, 1, 2))
    losses = [2.0, None, 3.0 if left == 2 else None]
    runs = [record("full", 1e-5, seed, loss, plan=plan) for seed, loss in enumerate(losses)]
    runs += [record("full", 1e-4, 0, None, plan=plan), record("base", 0.0, 0, 9.0, plan=plan)]
    rows = {row["arm"]: row for row in quality_report.report(done(*runs), plan, [], name="q", folder=tmp_path)}
    assert rows["full"]["seeds"] == left
    assert rows["full"]["valid loss"] == (2.5 if left == 2 else 2.0)
    assert rows["full"].get("± valid") == (pytest.approx(math.sqrt(0.5)) if left == 2 else None)
    assert f"{3 - left} of 3 seeds diverged" in rows["full"]["remark"]

    def refuse(constant):
        raise AssertionError(constant)

    written = [json.loads((tmp_path / f"{n}.json").read_text(), parse_constant=refuse) for n in ("q", "q_rates")]
    assert written[0]["configuration"]["rates"] == {"full": [1e-5, 1e-4]}
    [finite, diverged] = written[1]["rows"]
    assert finite["valid loss"] == 2.0
    assert "valid loss" not in diverged
    assert diverged["remark"] == "diverged"


def test_curve_is_the_mean_over_runs():
    steps, mean, spread = quality_report.curve([record("full", 1e-5, 0, 2.0), record("full", 1e-5, 1, 4.0)])
    assert (steps, mean) == ([0, 2], [9.0, 3.0])
    assert spread == pytest.approx([0.0, math.sqrt(2)])
    assert quality_report.curve([record("full", 1e-5, 0, None), record("full", 1e-5, 1, 4.0)])[1] == [9.0, 4.0]


def test_the_suite_takes_the_small_form():
    [step] = [step for step in suite.STEPS if step.script == "quality.py"]
    assert task.parse(Arguments, ["--model", "m", *step.arguments], presets=quality.PRESETS).preset == "small"
