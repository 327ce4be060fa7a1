"""One run with all that evaluation can do: right answers, the best checkpoint, an early end; and what reports hold."""

from __future__ import annotations

import json
import math

import pytest
from launch_runs import assert_success, flags, make_inputs, read_json, read_metrics, small_run, train_ranks
from ranks import run_ranks
from reporter_runs import assert_history, numbers, silent_server, train_with_reports
from wandb_file import described, offline_run

from hdpissa.launch import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


def arguments(inputs, output, **changes):
    """The loss falls, and what is asked for is a large one: the first evaluation is the best, the run ends early."""
    chosen = {"max_steps": 12, "learning_rate": 0.01, "warmup_ratio": 0, "lr_scheduler_type": "constant"}
    chosen |= {"eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    chosen |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "eval_on_start": False}
    chosen |= {"metric_for_best_model": "eval_loss", "greater_is_better": "True"}
    chosen |= {"eval_exact_match": True, "eval_max_samples": 3, "max_new_tokens": 3, "disable_tqdm": True}
    chosen |= {"sample_steps": 3, "num_samples": 2, "slice_metrics_steps": 2, "integrity_steps": 3}
    chosen |= {"logging_steps": 2, "logging_first_step": True, "run_name": "all of it"}
    return small_run(inputs, output, **chosen | changes)


@pytest.fixture(scope="module")
def whole(folder, inputs):
    output = folder / "whole"
    with silent_server() as url:
        results = run_ranks(2, train_with_reports, flags(arguments(inputs, output)), str(folder / "cache"), url)
    assert_success(results, 2)
    return output


def rows_of(output, name="metrics.jsonl"):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def test_the_run_ends_early_and_exports_the_best(whole, capsys):
    steps, evaluations = read_metrics(whole)
    losses = {row["step"]: row["eval_loss"] for row in evaluations}
    best = max(losses, key=losses.get)
    assert (best, list(losses)) == (2, [2, 4, 6])  # no evaluation before training, two more after the best
    state = read_json(whole / "run_state.json")
    assert (state["state"], state["step"]) == ("finished", max(losses))
    assert (state["best_metric"], state["best_global_step"]) == (losses[best], best)
    assert state["best_model_checkpoint"] == str(whole / f"checkpoint-{best}")
    assert (whole / "best").read_text() == f"checkpoint-{best}\n"
    kept = sorted(path.name for path in whole.glob("checkpoint-*"))
    assert kept == sorted(f"checkpoint-{step}" for step in (best, max(losses)))
    assert steps[-1]["step"] == max(losses)
    # the exported model is that of the best evaluation, by launch/evaluate.py, which reads the data as the run did
    evaluate.main(["--model", str(whole), "--eval_exact_match", "--eval_max_samples", "3", "--max_new_tokens", "3"])
    told = " ".join(capsys.readouterr().out.splitlines()[-2:]).split()
    figures = dict(zip(told[::2], map(float, told[1::2]), strict=True))
    assert figures["loss"] == pytest.approx(losses[best], rel=1e-5)
    row = next(row for row in evaluations if row["step"] == best)
    assert (figures["exact_match"], figures["samples"]) == (row["eval_exact_match"], 3)
    assert figures["tokens"] == row["eval_tokens"]


def test_rows_of_all_kinds(whole):
    rows = rows_of(whole)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps[:3] == [1, 2, 4]
    looks = [row for row in rows if "slice_grad_norms" in row]
    assert [row["step"] for row in looks] == list(range(2, steps[-1] + 1, 2))
    norms = {row["step"]: row["grad_norm"] for row in rows if "loss" in row}
    for row in looks:
        assert len(row["slice_grad_norms"]) == len(row["slice_delta_norms"]) == 2
        assert math.hypot(*row["slice_grad_norms"]) == pytest.approx(norms[row["step"]], rel=1e-6)
        assert min(row["slice_delta_norms"]) > 0
        assert 0.5 < row["bf16_moved"] < 1  # at this learning rate
    assert [row["step"] for row in rows if "integrity" in row] == list(range(3, steps[-1] + 1, 3))
    samples = rows_of(whole, "samples.jsonl")
    best = read_json(whole / "run_state.json")["best_global_step"]
    asked = [row["step"] for row in samples]
    assert asked == sorted([*range(0, steps[-1] + 1, 3)] * 2) + [best] * 2
    assert [row.get("when") for row in samples] == [
        *["before training"] * 2, *[None] * (len(samples) - 4), *["after training"] * 2
    ]  # fmt: skip
    assert all({*row} - {"when"} == {"step", "prompt", "answer", "reference"} for row in samples)
    assert "#### " in samples[0]["reference"]


def test_tensorboard_and_wandb_have_every_row(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = rows_of(whole)
    assert_history(whole, rows)
    assert offline_run(whole).parent.name.startswith("offline-run-")
    project, name, config = described(offline_run(whole))
    assert (project, name, config["total_steps"]) == ("molehills", "all of it", 12)
    (event_file,) = (whole / "runs").rglob("events*")
    events = EventAccumulator(str(event_file), size_guidance={"scalars": 0}).Reload()
    found = {(e.step, tag.split("/", 1)[1]): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    wanted = {(row["step"], k.removeprefix("eval_")): v for row in rows for k, v in numbers(row).items()}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_resumed_run_knows_what_was_best(whole, folder, inputs):
    """From the best checkpoint, in a folder of its own: no evaluation is better, and the run ends where it did."""
    best = read_json(whole / "run_state.json")["best_global_step"]
    more = {"resume_from_checkpoint": str(whole / f"checkpoint-{best}"), "sample_prompt": "How many?", "num_samples": 1}
    output = folder / "resumed"
    train_ranks(2, arguments(inputs, output, **more), folder / "cache")
    then, now = read_json(whole / "run_state.json"), read_json(output / "run_state.json")
    assert now == then
    later = [row for row in read_metrics(whole)[1] if row["step"] > best]
    assert read_metrics(output)[1] == later
    assert read_json(output / "model" / "hdpissa_export.json")["step"] == best
    models = [(f / "model" / "model.safetensors").read_bytes() for f in (whole, output)]
    assert models[0] == models[1]
    assert not list(output.rglob("*.wandb"))
    samples = rows_of(output, "samples.jsonl")
    assert {row["prompt"] for row in samples} == {"How many?"}
    assert read_json(output / "sample_after_training.json")["answer"] == samples[-1]["answer"]
