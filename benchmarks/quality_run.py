"""One run of `quality.py`, which starts it in a process of its own: trains, tests, writes its record."""

from __future__ import annotations

import datetime as calendar
import gc
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hdpissa.benchmarks import methods, task, throughput_worker, timing
from hdpissa.benchmarks.method_base import DivergedError
from hdpissa.benchmarks.quality_record import (
    Job,
    Log,
    Training,
    identity,
    mean,
    meta_info,
    run_info,
    samples,
    train_info,
    write_whole,
)
from hdpissa.engine import answers, zero3
from hdpissa.engine.generation import generate
from hdpissa.launch.alpaca import IGNORE

# Of a loss, between training's forward pass and a plain model's in fp32: rounding of W, and of activations to 8 bits.
MERGE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


# --- training ---------------------------------------------------------------------------------------------------------


def learning_rates(lr: float, steps: int, warmup_ratio: float) -> list[float]:
    """That of each step: linear warm-up from 0, then a cosine to 0, by transformers' schedule."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = get_scheduler("cosine", optimizer, int(warmup_ratio * steps), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def validate(method: methods.Method, batches: DataLoader) -> float:
    """Loss per target token."""
    total, tokens = 0.0, 0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        total += float(method.loss(batch)) * count if count else 0.0
        tokens += count
    return total / max(tokens, 1)


def train(method: methods.Method, job: Job, args: Training, work: task.Task, data: DataLoader, steps: int) -> Log:
    """All optimizer steps of a run, with the validation loss before, in between and at the end.

    A loss that is not finite, or a step that the method refuses, ends it; `Log.diverged` says so.
    """
    log, start = Log(), time.perf_counter()
    batches = work.batches(work.held_out, args.eval_batch)
    micro_batches = itertools.chain.from_iterable(itertools.repeat(data))
    rates = learning_rates(job.lr, steps, args.warmup_ratio)
    spent = tokens = 0.0
    for done in range(steps + 1):
        if done % args.eval_steps == 0 or done == steps:
            watch(log, "train" if done else "build")
            before = time.perf_counter()
            loss = validate(method, batches)
            row: dict[str, Any] = {"step": done, "valid loss": loss if math.isfinite(loss) else None}
            row |= {"train loss": mean(log.losses[-args.eval_steps :]), "train samples": done * samples(args)}
            row |= {"train time": spent, "eval time": time.perf_counter() - before}
            row |= {"tokens / sec": tokens / spent if spent else None, "elapsed time": time.perf_counter() - start}
            log.metrics.append(row)
            print(f"{job.experiment}: step {done}, valid loss {loss:.4f}", flush=True)
            watch(log, "validation")
            if not math.isfinite(loss):
                log.diverged = f"the validation loss after step {done} is {loss}"
                return log
            spent = tokens = 0.0
        if done < steps:
            before, losses = time.perf_counter(), []
            for batch in itertools.islice(micro_batches, args.accumulation):
                losses.append(method.micro_step(batch))
                tokens += int(batch["attention_mask"].sum())
                log.tokens += int(batch["attention_mask"].sum())
            log.losses.append(float(torch.stack(losses).mean()))
            try:
                if not math.isfinite(log.losses[-1]):
                    raise DivergedError(f"the training loss of step {done + 1} is {log.losses[-1]}")
                method.step(rates[done])
            except DivergedError as error:
                watch(log, "train")
                log.diverged = str(error)
                return log
            spent += time.perf_counter() - before
            log.train_time += time.perf_counter() - before
            log.memory.append(memory_now())
    return log


def memory_now() -> int:
    """Bytes held now: what torch has reserved on the GPU, else the process's resident memory."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def watch(log: Log, phase: str) -> None:
    """Notes the peak since the last call as that of a phase."""
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else throughput_worker.peak_bytes()
    log.peaks[phase] = max(log.peaks.get(phase, 0), peak)
    throughput_worker.restart_peak()


# --- testing ----------------------------------------------------------------------------------------------------------


def trained_weights(method: methods.Method) -> dict[str, Tensor]:
    """Every weight that training has changed, under its name in the base model."""
    found = dict(method.weights())
    if method.name == "full":  # and not its targets alone
        module = method.ds.module  # type: ignore[attr-defined]
        found |= {name: zero3.whole_value(p).cpu() for name, p in module.named_parameters() if name not in found}
    return found


def plain_model(args: Training, weights: dict[str, Tensor]) -> nn.Module:
    """The base model on this device with the weights in their places; no ZeRO-3, no adapters.

    fp32, whatever dtype was trained in: merged into a weight in bf16 most of an adapter's change would be rounded away.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"{len(unknown)} trained weights are not the base model's (first: {unknown[0]})")
    return model.to(zero3.device()).eval()


class Plain:
    """A plain model as `validate` wants it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.model(**zero3.to_device(batch)).loss


def test(model: nn.Module, job: Job, args: Training, work: task.Task) -> dict[str, Any]:
    """Test loss and share of right answers; the answers go to their file."""
    start = time.perf_counter()
    assert work.test is not None
    assert work.test_rows is not None
    loss = validate(Plain(model), work.batches(work.test, args.eval_batch))  # type: ignore[arg-type]
    prompts = [work.template.render(str(text)) for text in work.test_rows[args.prompt_field]]
    references = [str(text) for text in work.test_rows[args.response_field]]
    found = generate(
        model,
        work.tokenizer,
        work.tokenizer(prompts)["input_ids"],
        batch_size=args.eval_batch,
        max_new_tokens=args.max_new_tokens,
        device=zero3.device(),
    )
    rows: list[dict[str, Any]] = [
        {"prompt": p, "reference": r, "answer": a, "result": answers.extract(a), "right": answers.is_right(a, r)}
        for p, r, a in zip(prompts, references, found, strict=True)
    ]
    write_whole(Path(job.answers), "".join(json.dumps(row) + "\n" for row in rows))
    right = sum(row["right"] for row in rows)
    return {"test accuracy": right / len(rows), "test loss": loss, "test time": time.perf_counter() - start}


def test_trained(model: nn.Module, job: Job, args: Training, work: task.Task, log: Log) -> dict[str, Any]:
    """The last row of a record's metrics: loss of the validation again, loss and answers of the test."""
    loss = validate(Plain(model), work.batches(work.held_out, args.eval_batch))  # type: ignore[arg-type]
    if job.method:
        refuse_other_model(loss, log.metrics[-1]["valid loss"], args.dtype)
    return {"valid loss": loss, "train loss": mean(log.losses[-args.eval_steps :]), **test(model, job, args, work)}


def refuse_other_model(found: float, expected: float, dtype: str) -> None:
    """The plain model has to be the trained one: merged weights that were put wrong would pass for a bad method."""
    if not abs(found - expected) <= MERGE_TOLERANCE[dtype] * abs(expected):
        raise RuntimeError(
            f"the merged weights have a validation loss of {found:.6g}, training ended at {expected:.6g}"
        )


# --- the record -------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    """Trains and tests; returns the record."""
    started, begin = calendar.datetime.now(calendar.UTC).isoformat(timespec="seconds"), time.perf_counter()
    args = Training(**job.arguments)
    work = task.make_task(args, test_rows=args.test_rows, test_dataset_name=args.test_dataset_name)
    data = work.micro_batches(args, slices=args.slices, seed=job.seed)
    steps = count_steps(args, data) if job.method else 0
    throughput_worker.restart_peak()
    initial, log = memory_now(), Log()
    weights: dict[str, Tensor] = {}
    cpu = [time.process_time()]
    if job.method:
        method = methods.build(job.method, setting_of(job, args))
        cpu.append(time.process_time())
        log = train(method, job, args, work, data, steps)
        cpu.append(time.process_time())
        weights = trained_weights(method)
        del method
        gc.collect()
    model = plain_model(args, weights)
    truncated = sum(ids[-1] != work.tokenizer.eos_token_id for ids in work.train["input_ids"])
    last: dict[str, Any] = {"step": steps, "train samples": steps * samples(args), "train total tokens": log.tokens}
    if log.diverged:
        last |= {"step": len(log.losses), "valid loss": None}
    else:
        last |= test_trained(model, job, args, work, log)
    log.metrics.append(last)
    cpu.append(time.process_time())
    phases = ("start", "build", "train", "test") if job.method else ("start", "test")
    error = f"diverged: {log.diverged}" if log.diverged else ""
    itemsize = (torch.float32 if job.method == "hd_pissa" else methods.DTYPES[args.dtype]).itemsize
    return {
        "run_info": run_info(job, started, time.perf_counter() - begin, steps=steps, error=error),
        "train_info": train_info(job, log, model, weights, initial=initial, itemsize=itemsize),
        "meta_info": meta_info(work.digest),
        "hdpissa": {
            **identity(job),
            "cpu_time": {name: after - before for name, before, after in zip(phases, [0.0, *cpu], cpu, strict=False)},
            "losses": [loss if math.isfinite(loss) else None for loss in log.losses],
            "memory": {"start": initial, **log.peaks},
            "rows": {"train": len(work.train), "truncated": truncated},
            "revision": timing.environment()["revision"],
            "device": timing.environment()["device"],
        },
    }


def setting_of(job: Job, args: Training) -> methods.Setting:
    return methods.Setting(
        model=args.model_name_or_path,
        dtype=args.dtype,
        r=job.r,
        slices=job.slices or None,
        lr=job.lr,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        seed=job.seed,
        pissa=args.pissa_init,
        checkpointing=args.gradient_checkpointing,
    )


def count_steps(args: Training, data: DataLoader) -> int:
    return args.steps or max(1, int(args.num_train_epochs * (len(data) // args.accumulation)))


def run_and_write(job: Job) -> None:
    """The whole life of a run's process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    write_whole(Path(job.record), json.dumps(run(job), indent=1) + "\n")
    zero3.shut_down()
