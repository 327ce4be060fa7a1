"""launch/train.py from the command line to the exported model, and what a run leaves behind however it ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from launch_runs import (
    command,
    finish,
    flags,
    make_inputs,
    read_json,
    read_metrics,
    start,
    train_and_raise,
    train_here,
    train_without_weights,
    wait_for,
    write_ds_config,
)
from ranks import run_ranks

from hdpissa.engine.recorder import Recorder
from hdpissa.launch import train, train_arguments, train_schedule

STEPS, LR = 8, 3e-3
# documented in engine/metrics.py and design; a reader of metrics.jsonl counts on them
STEP_KEYS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "mfu"}
STEP_KEYS |= {"peak_memory_bytes", "step_time_s", "applied", "refusal", "skipped_steps", "bytes_sent", "collectives"}
TEXTS = ("mfu", "refusal")  # null on a CPU, and a reason
EVAL_KEYS = {"step", "eval_loss", "perplexity", "eval_tokens"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


@pytest.fixture(scope="module")
def cache(folder):
    return str(folder / "cache")


def arguments(inputs, output, **changes):
    """A run of 8 steps, global batch 8, on two ranks."""
    chosen = {**inputs, "output_dir": str(output), "max_steps": STEPS, "learning_rate": LR, "warmup_ratio": 0.25}
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    return chosen | {"max_length": 128, "prompt_template": "none"} | changes


# --- three ways to start the same run --------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(folder, inputs):
    """The same run in fp32 under deepspeed; by `hdpissa train` under torchrun, from a YAML file in which it has the
    names of the reference; and as one plain process."""
    output = {name: folder / name for name in ("deepspeed", "torchrun", "python")}
    theirs = arguments(inputs, "elsewhere") | {"lr": LR, "batch_size": 2, "accumulation_steps": 4, "world_size": 2}
    ours = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
    (folder / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in theirs.items() if k not in ours}))
    two_slices = write_ds_config(folder / "two_slices.json", hd_pissa={"r": 4, "slices": 2})
    alone = arguments(inputs, output["python"], ds_config=two_slices, gradient_accumulation_steps=4)
    commands = {
        "deepspeed": command("deepspeed", arguments(inputs, output["deepspeed"])),
        "torchrun": command("hdpissa", {"config": folder / "run.yaml", "output_dir": output["torchrun"]}),
        "python": command("python", alone),
    }
    log = {name: folder / f"{name}.log" for name in commands}
    running = {name: start(line, folder / "home", log[name]) for name, line in commands.items()}
    codes = {name: finish(process) for name, process in running.items()}
    assert codes == dict.fromkeys(commands, 0), "\n".join(file.read_text() for file in log.values())
    return output


def test_metrics_have_a_row_for_every_step(launched):
    steps, evaluations = read_metrics(launched["deepspeed"])
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(set(row) == STEP_KEYS for row in steps)
    assert all(math.isfinite(value) for row in steps for name, value in row.items() if name not in TEXTS)
    assert {row["mfu"] for row in steps} == {None}  # no peak is known for a CPU
    assert [row["epoch"] for row in steps] == [step / 8 for step in range(1, STEPS + 1)]
    assert all(row["applied"] and row["tokens"] > 0 and row["bytes_sent"] > 0 for row in steps)
    assert [row["step"] for row in evaluations] == [0, STEPS]
    assert all(set(row) == EVAL_KEYS for row in evaluations)
    assert all(row["perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in evaluations)


def test_loss_falls(launched):
    steps, (before, after) = read_metrics(launched["deepspeed"])
    losses = [row["loss"] for row in steps]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1
    assert after["eval_loss"] < before["eval_loss"] - 0.1


@pytest.mark.parametrize("other", ["torchrun", "python"])
def test_slices_are_not_ranks_and_launchers_do_not_matter(launched, other):
    """Two ranks with a slice each, or one process with both: the same numbers but for fp32 rounding.

    Measured: training losses are bitwise the same, evaluation differs by 3e-8 (its batches are other rows).
    """
    steps, evaluations = read_metrics(launched["deepspeed"])
    other_steps, other_evaluations = read_metrics(launched[other])
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        assert [row[name] for row in other_steps] == pytest.approx([row[name] for row in steps], rel=1e-6), name
    for name in ("eval_loss", "eval_tokens"):
        assert [row[name] for row in other_evaluations] == pytest.approx([row[name] for row in evaluations], rel=1e-6)


def test_run_json_tells_what_was_run(launched, inputs):
    run = read_json(launched["deepspeed"] / "run.json")
    given = arguments(inputs, launched["deepspeed"])
    assert {name: run["arguments"][name] for name in given} == given
    assert run["ds_config"]["train_batch_size"] == 8
    assert run["ds_config"]["bf16"] == {"enabled": False}
    assert run["ds_config"]["hd_pissa"]["adam"] == {"betas": [0.9, 0.999], "eps": 1e-8}  # defaults are told, too
    assert (run["world_size"], run["slices"], run["total_steps"], run["targets"]) == (2, 2, STEPS, 14)
    assert run["rows"]["used"] == 64
    assert run["init"]["residual"] < 1e-4
    steps, _ = read_metrics(launched["deepspeed"])
    exchange = run["exchange"]
    assert (exchange["factor_targets"], exchange["dense_targets"], exchange["buckets"]) == (14, 0, 1)
    assert {(row["bytes_sent"], row["collectives"]) for row in steps} == {(exchange["bytes_per_step"], 3)}
    assert run["memory_bytes"]["buffers"] > 0
    assert run["device"] == "cpu"
    names = ("hdpissa", "torch", "deepspeed", "transformers", "datasets")
    assert run["versions"] == {name: version(name) for name in names}


def test_from_a_yaml_file_the_run_is_described_alike(launched, inputs):
    run, described = (read_json(launched[name] / "run.json") for name in ("deepspeed", "torchrun"))
    for arguments_, local_rank in ((run["arguments"], 0), (described["arguments"], -1)):
        assert arguments_.pop("local_rank") == local_rank  # only the deepspeed launcher gives it
        arguments_.pop("output_dir")
    assert described["arguments"] == run["arguments"]
    assert described["ds_config"] == run["ds_config"]
    assert not Path("elsewhere").exists()  # the command line's output folder won


def test_state_is_finished(launched):
    for output in launched.values():
        assert read_json(output / "run_state.json") == {"state": "finished", "step": STEPS, "message": ""}


def test_exported_model_has_the_last_evaluation_loss(launched, inputs):
    """In plain transformers, row by row without padding: fp32 rounding is all that may differ."""
    _, (before, after) = read_metrics(launched["deepspeed"])
    loss, tokens = plain_evaluation(launched["deepspeed"] / "model", inputs, torch.float32)
    assert loss == pytest.approx(after["eval_loss"], rel=1e-6)
    assert tokens == after["eval_tokens"]
    assert abs(before["eval_loss"] - loss) > 0.1


def plain_evaluation(model_folder: Path, inputs: dict, dtype: torch.dtype) -> tuple[float, int]:
    """(mean loss over the evaluation rows' answer tokens, their number) with nothing of ours but the data format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, count = 0.0, 0
    for line in Path(inputs["eval_dataset_name"]).read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["instruction"] + row["response"] + "\n" + tokenizer.eos_token)["input_ids"][:128]
        labels = torch.tensor([ids])
        labels[0, : len(tokenizer(row["instruction"])["input_ids"])] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * tokens
        count += tokens
    return total / count, count


# --- bf16, evaluation in between, a generated answer -----------------------------------------------


@pytest.fixture(scope="module")
def bf16_run(folder, inputs, cache):
    options = {"bf16": True, "lr_scheduler_type": "linear", "eval_steps": 3, "logging_steps": 3}
    options |= {"sample_prompt": "How many apples?", "max_new_tokens": 4, "export_format": "both", "export_rank": 12}
    results = run_ranks(2, train_here, flags(arguments(inputs, folder / "bf16", **options)), cache)
    assert [(result["code"], result["error"]) for result in results] == [(0, None)] * 2, results
    return folder / "bf16"


def test_rows_every_third_step_and_the_last(bf16_run):
    steps, evaluations = read_metrics(bf16_run)
    assert [row["step"] for row in steps] == [3, 6, STEPS]
    assert [row["step"] for row in evaluations] == [0, 3, 6, STEPS]
    assert [row["learning_rate"] for row in steps] == pytest.approx([linear(step - 1, 2) for step in (3, 6, STEPS)])
    for title in ("before", "after"):
        assert isinstance(read_json(bf16_run / f"sample_{title}_training.json")["answer"], str)


def test_bf16_export_has_the_last_evaluation_loss(bf16_run, inputs):
    """A logit of up to 8 is off by up to 2^-6 in bf16, at random: 1e-2 in a token's loss, which over the 600 tokens
    averages to 4e-4. Here rows are computed alone, in training padded in batches. Measured 3e-5; training changed
    the loss by 0.27.
    """
    _, evaluations = read_metrics(bf16_run)
    loss, tokens = plain_evaluation(bf16_run / "model", inputs, torch.bfloat16)
    assert loss == pytest.approx(evaluations[-1]["eval_loss"], abs=1e-3)
    assert tokens == evaluations[-1]["eval_tokens"]
    assert evaluations[0]["eval_loss"] - loss > 0.1
    assert read_json(bf16_run / "model" / "config.json")["dtype"] == "bfloat16"


def test_both_exports(bf16_run):
    """The adapter beside the model, cut as asked, with what it leaves out, and the tokenizer."""
    report = read_json(bf16_run / "adapter" / "hdpissa_export.json")
    assert 0 < report["residual"]["overall"] < 1
    assert report["r"] == 12
    assert read_json(bf16_run / "adapter" / "adapter_config.json")["r"] == 12
    for folder in ("model", "adapter"):
        assert (bf16_run / folder / "tokenizer.json").exists()


# --- learning rate ---------------------------------------------------------------------------------


def cosine(step: int, warmup: int) -> float:
    if step < warmup:
        return LR * step / warmup
    return 0.5 * LR * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def linear(step: int, warmup: int) -> float:
    return LR * step / warmup if step < warmup else LR * (STEPS - step) / (STEPS - warmup)


def constant(step: int, warmup: int) -> float:
    return LR


def constant_with_warmup(step: int, warmup: int) -> float:
    return LR * min(1.0, step / warmup) if warmup else LR


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("schedule", [cosine, linear, constant, constant_with_warmup])
def test_schedules(schedule, warmup):
    """Step t, counted from 0, has the rate of the method's formula."""
    args = train_arguments.TrainArguments(lr_scheduler_type=schedule.__name__, warmup_ratio=warmup / STEPS)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = train.make_scheduler(args, optimizer, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([schedule(step, warmup) for step in range(STEPS)], rel=1e-12)
    if warmup and schedule is not constant:
        assert rates[0] == 0


def test_learning_rate_column(launched):
    """The rate that the step used, so 0 in the first step of a warm-up."""
    steps, _ = read_metrics(launched["deepspeed"])
    assert steps[0]["learning_rate"] == 0
    assert [row["learning_rate"] for row in steps] == pytest.approx([cosine(step, 2) for step in range(STEPS)])


def test_warmup_steps_win_over_the_ratio():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    train.make_scheduler(train_arguments.TrainArguments(warmup_ratio=0, warmup_steps=4), optimizer, STEPS)
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(("given", "steps"), [("0.25", 3), ("0.9", 9), ("0", 0), ("3", 3), ("1.0", 1)])
def test_warmup_steps_below_one_are_a_share(inputs, given, steps):
    """As in transformers' own TrainingArguments."""
    from transformers import TrainingArguments

    words = flags({**inputs, "output_dir": "out", "warmup_steps": given})
    args, _ = train_arguments.parse(words)
    assert train_schedule.warmup_steps(args, 10) == steps
    assert TrainingArguments(warmup_steps=float(given), use_cpu=True).get_warmup_steps(10) == steps


# --- how a run ends --------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_state_tells_when_the_launcher_was_killed(folder, inputs):
    """`deepspeed` returns 0 when its inner launcher dies of SIGKILL, and the rank goes on: trust the file."""
    output = folder / "killed"
    endless = arguments(inputs, output, max_steps=100_000)
    process = start(command("deepspeed", endless, ranks=1), folder / "home", folder / "killed.log")
    state = output / "run_state.json"
    try:
        wait_for(lambda: state.exists() and read_json(state)["step"] >= 1, process)
        (inner,) = psutil.Process(process.pid).children()
        assert "deepspeed.launcher.launch" in inner.cmdline()
        ranks = inner.children()
        inner.kill()
        assert finish(process) == 0
        assert len(ranks) == 1
        assert ranks[0].is_running()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(ranks, timeout=10)
    assert read_json(state)["state"] == "running"
    assert read_json(state)["step"] < 100_000
    assert not (output / "model").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_run_state_tells_an_error_in_the_middle(folder, inputs, cache, rank):
    """The error itself, whichever rank had it, and not what followed from it; the other rank says that in one line."""
    output = folder / f"failed{rank}"
    how = {"rank": rank, "step": 3, "lost_peer": True}
    results = run_ranks(2, train_and_raise, flags(arguments(inputs, output)), cache, **how)
    other = results.pop(1 - rank)
    assert results[0]["error"] == "RuntimeError: the disk is on fire"
    message = ("rank 1: " if rank else "") + "RuntimeError: the disk is on fire"
    assert read_json(output / "run_state.json") == {"state": "failed", "step": 2, "message": message}
    assert (other["code"], other["error"]) == (1, None)
    (line,) = [line for line in other["stderr"].splitlines() if line.startswith("error: ")]
    assert f"rank {1 - rank} on " in line
    assert f"lost its peers after step 2: rank {rank} on " in line
    steps, _ = read_metrics(output)
    assert [row["step"] for row in steps] == [1, 2]
    assert not (output / "model").exists()


def test_metrics_stay_json_when_a_loss_is_not_finite(tmp_path):
    recorder = Recorder(tmp_path, total_steps=2, weights=1, device_name="cpu", devices=1, rank=0)
    figures = {"step": 1, "loss": math.nan, "learning_rate": LR, "tokens": 1, "grad_norm": math.inf, "applied": False}
    recorder.step(figures, log=True)
    recorder.evaluation({"step": 1, "eval_loss": math.nan, "perplexity": math.inf, "eval_tokens": 1})
    recorder.close()
    (step,), (evaluation,) = read_metrics(tmp_path)
    assert (step["loss"], step["grad_norm"]) == (None, None)
    assert (evaluation["eval_loss"], evaluation["perplexity"]) == (None, None)


@pytest.fixture
def used(tmp_path):
    """The folder of an earlier run."""
    (tmp_path / "run.json").write_text('{"total_steps": 99}')
    (tmp_path / "run_state.json").write_text('{"state": "finished", "step": 99, "message": ""}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    return tmp_path


def test_overwriting_replaces_the_earlier_run(used, inputs, cache):
    """Constant rate, no warm-up, no evaluation, in one process."""
    options = {"lr_scheduler_type": "constant", "warmup_ratio": 0, "max_steps": 3, "overwrite_output_dir": True}
    chosen = {k: v for k, v in arguments(inputs, used, **options).items() if k != "eval_dataset_name"}
    (result,) = run_ranks(1, train_here, flags(chosen), cache)
    assert (result["code"], result["error"]) == (0, None), result
    steps, evaluations = read_metrics(used)
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["learning_rate"] for row in steps] == [LR] * 3
    assert evaluations == []
    assert read_json(used / "run.json")["total_steps"] == 3
    assert read_json(used / "run_state.json") == {"state": "finished", "step": 3, "message": ""}


def test_overwriting_and_failing_leaves_no_old_success(used, inputs, cache):
    """The new run ends while it reads the weights: the state file must not say "finished" from the last time.

    The earlier run's record is there until the new one stands.
    """
    (result,) = run_ranks(1, train_without_weights, flags(arguments(inputs, used, overwrite_output_dir=True)), cache)
    assert result["error"] == "RuntimeError: the weights are gone"
    expected = {"state": "failed", "step": 0, "message": "RuntimeError: the weights are gone"}
    assert read_json(used / "run_state.json") == expected
    assert [row["step"] for row in read_metrics(used)[0]] == [99]
