"""One run of `quality.py`, which starts it in a process of its own: trains, tests, writes its record.

The record has the fields of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA: run_info,
train_info, meta_info), so that both can be laid side by side, and in `hdpissa` what that schema has no place for. On a
CPU the memory fields are of the process's resident memory. `file_size` is null: nothing is saved. The status "diverged"
is a loss that was not finite; such a run is over, and has no test.
"""

from __future__ import annotations

import datetime as calendar
import gc
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from hdpissa.benchmarks import answers, methods, task, timing
from hdpissa.engine import zero3
from hdpissa.engine.batches import EvalBatches, count_target_tokens
from hdpissa.launch.command_line import option

# Of a loss, between training's forward pass and a plain model's in fp32: rounding of W, and of activations to 8 bits.
MERGE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


@dataclass
class Training(task.TaskArguments):
    """What all runs of a comparison have in common."""

    dtype: str = option("fp32", "of compute: fp32 or bf16")
    steps: int = option(20, "optimizer steps of a run; 0: as --num_train_epochs says")
    num_train_epochs: float = option(1.0, "epochs, where --steps is 0")
    warmup_ratio: float = option(0.03, "share of all steps, rounded down, that warm up; then a cosine down to 0")
    r: int = option(16, "rank of an adapter, and of a slice")
    slices: int = option(8, "HD-PiSSA's slices; the wide adapters have rank r times this")
    pissa_init: str = option("pissa", "PEFT's initialisation for PiSSA: pissa (exact) or pissa_niter_16 (quick)")
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    eval_rows: int = option(16, "rows held out to choose learning rates by, the last ones before those of the test")
    eval_steps: int = option(10, "optimizer steps between two validation losses")
    eval_batch: int = option(16, "rows of a batch in validation and generation")
    test_rows: int = option(32, "rows to test with: the last ones of the file, or the first ones of the test file")
    test_dataset_name: str | None = option(None, "file or hub name with the rows to test with")
    max_new_tokens: int = option(64, "length of a generated answer")


@dataclass(frozen=True)
class Job:
    """One run: a method with its rank, learning rate and seed; `method` None is the base model, untrained."""

    arm: str
    method: str | None
    r: int
    slices: int
    lr: float
    seed: int
    arguments: dict[str, Any]
    configuration: dict[str, Any]
    record: str
    answers: str

    @property
    def experiment(self) -> str:
        return experiment(self.arm, self.lr, self.seed)


def experiment(arm: str, lr: float, seed: int) -> str:
    """PEFT's experiment_name: method/setting."""
    return f"{arm}/lr_{lr:g}-seed_{seed}"


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Log:
    """What a run leaves behind beside the model."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    train_time: float = 0.0
    tokens: int = 0
    diverged: bool = False


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


def validate(method: methods.Method, batches: EvalBatches) -> float:
    """Loss per target token."""
    total, tokens = 0.0, 0
    for batch, _ in batches:
        count = count_target_tokens(batch["labels"])
        total += float(method.loss(batch)) * count if count else 0.0
        tokens += count
    return total / max(tokens, 1)


def train(method: methods.Method, job: Job, args: Training, work: task.Task, order: task.Order, steps: int) -> Log:
    """All optimizer steps of a run, with the validation loss before, in between and at the end."""
    log, start = Log(), time.perf_counter()
    batches = eval_batches(work.held_out, args, work.tokenizer)
    rates = learning_rates(job.lr, steps, args.warmup_ratio)
    spent = tokens = 0.0
    for done in range(steps + 1):
        if done % args.eval_steps == 0 or done == steps:
            before = time.perf_counter()
            row: dict[str, Any] = {"step": done, "valid loss": validate(method, batches)}
            row |= {"train loss": mean(log.losses[-args.eval_steps :]), "train samples": done * samples(args)}
            row |= {"train time": spent, "eval time": time.perf_counter() - before}
            row |= {"tokens / sec": tokens / spent if spent else None, "elapsed time": time.perf_counter() - start}
            log.metrics.append(row)
            print(f"{job.experiment}: step {done}, valid loss {row['valid loss']:.4f}", flush=True)
            spent = tokens = 0.0
        if done < steps:
            before, losses = time.perf_counter(), []
            for batch in order.micro_batches(done):
                losses.append(method.micro_step(batch))
                tokens += int(batch["attention_mask"].sum())
                log.tokens += int(batch["attention_mask"].sum())
            log.losses.append(float(torch.stack(losses).mean()))
            if not math.isfinite(log.losses[-1]):
                log.diverged = True
                return log
            method.step(rates[done])
            spent += time.perf_counter() - before
            log.train_time += time.perf_counter() - before
            log.memory.append(memory_now())
    return log


def samples(args: Training) -> int:
    """Rows of an optimizer step."""
    return args.micro_batch * args.accumulation


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def eval_batches(rows: Any, args: Training, tokenizer: Any) -> EvalBatches:
    return EvalBatches(
        rows.dataset, rank=0, world_size=1, batch_size=args.eval_batch, pad_token_id=tokenizer.pad_token_id
    )


def memory_now() -> int:
    """Bytes held now: what torch has reserved on the GPU, else the process's resident memory."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def memory_peak() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else zero3.peak_memory_bytes()


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
    loss = validate(Plain(model), eval_batches(work.test, args, work.tokenizer))  # type: ignore[arg-type]
    prompts = [work.template.render(str(text)) for text in work.test_rows[args.prompt_field]]
    references = [str(text) for text in work.test_rows[args.response_field]]
    found = answers.generate(model, work.tokenizer, prompts, batch=args.eval_batch, max_new_tokens=args.max_new_tokens)
    rows: list[dict[str, Any]] = [
        {"prompt": p, "reference": r, "answer": a, "result": answers.extract(a), "right": answers.is_right(a, r)}
        for p, r, a in zip(prompts, references, found, strict=True)
    ]
    write_whole(Path(job.answers), "".join(json.dumps(row) + "\n" for row in rows))
    right = sum(row["right"] for row in rows)
    return {"test accuracy": right / len(rows), "test loss": loss, "test time": time.perf_counter() - start}


def test_trained(model: nn.Module, job: Job, args: Training, work: task.Task, log: Log) -> dict[str, Any]:
    """The last row of a record's metrics: loss of the validation again, loss and answers of the test."""
    loss = validate(Plain(model), eval_batches(work.held_out, args, work.tokenizer))  # type: ignore[arg-type]
    if job.method:
        refuse_other_model(loss, log.metrics[-1]["valid loss"], args.dtype)
    return {"valid loss": loss, "train loss": mean(log.losses), **test(model, job, args, work)}


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
    order = work.order(args, slices=args.slices, seed=job.seed)
    steps = count_steps(args, order) if job.method else 0
    initial, log = memory_now(), Log()
    weights: dict[str, Tensor] = {}
    building = peak = 0.0
    if job.method:
        before = time.perf_counter()
        method = methods.build(job.method, setting_of(job, args))
        building = time.perf_counter() - before
        log = train(method, job, args, work, order, steps)
        peak = memory_peak()
        weights = trained_weights(method)
        del method
        gc.collect()
    model = plain_model(args, weights)
    last: dict[str, Any] = {"step": steps, "train samples": steps * samples(args), "train total tokens": log.tokens}
    if log.diverged:
        last |= {"step": len(log.losses), "valid loss": None}
    else:
        last |= test_trained(model, job, args, work, log)
    log.metrics.append(last)
    return {
        "run_info": run_info(job, args, started, time.perf_counter() - begin),
        "train_info": train_info(job, log, model, weights, memory=(initial, peak)),
        "meta_info": meta_info(work),
        "hdpissa": {
            **{name: value for name, value in asdict(job).items() if name not in ("arguments", "record", "answers")},
            "build_time": building,
            "losses": log.losses,
            "rows": {"train": len(work.train.dataset), "truncated": work.train.truncated},
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


def count_steps(args: Training, order: task.Order) -> int:
    return args.steps or max(1, int(args.num_train_epochs * order.data.steps_per_epoch))


def run_info(job: Job, args: Training, started: str, seconds: float) -> dict[str, Any]:
    """PEFT's fields; what is not ours to say (its branch) is null. Without a peft_config it means full fine-tuning."""
    kind = {"hd_pissa": "HD_PISSA", None: "NONE"}.get(job.method, "LORA")
    adapter = {"peft_type": kind, "r": job.r, "slices": job.slices, "lora_alpha": job.r, "lora_dropout": 0.0}
    if kind == "LORA":
        adapter |= {"init_lora_weights": args.pissa_init if job.method == "pissa" else True}
    return {
        "created_at": started,
        "total_time": seconds,
        "experiment_name": job.experiment,
        "peft_branch": None,
        "train_config": {
            "model_id": Path(args.model_name_or_path).name,
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[args.dtype],
            "max_seq_length": args.max_length,
            "batch_size": samples(args),
            "batch_size_eval": args.eval_batch,
            "max_steps": args.steps,
            "eval_steps": args.eval_steps,
            "query_template": args.prompt_template,
            "seed": job.seed,
            "grad_norm_clip": 0.0,
            "optimizer_type": "HD-PiSSA" if job.method == "hd_pissa" else "AdamW",
            "optimizer_kwargs": {"lr": job.lr, "weight_decay": 0.0},
            "lr_scheduler": "cosine",
            "generation_kwargs": {"max_new_tokens": args.max_new_tokens, "do_sample": False},
        },
        "peft_config": None if job.method == "full" else adapter,
        "error_msg": "",
    }


def train_info(
    job: Job, log: Log, model: nn.Module, weights: dict[str, Tensor], *, memory: tuple[int, float]
) -> dict[str, Any]:
    """PEFT's fields; `num_trainable_params` of HD-PiSSA is the numbers in all slices' A and B."""
    every = sum(p.numel() for p in model.parameters())
    thin = max(1, job.slices) * job.r * sum(sum(w.shape) for w in weights.values())
    initial, peak = memory
    held = torch.tensor(log.memory or [0], dtype=torch.float64)
    return {
        "accelerator_memory_reserved_avg": int(held.mean()),
        "accelerator_memory_max": int(max(0, peak - initial)),
        "accelerator_memory_reserved_99th": int(held.quantile(0.99)),
        "train_time": log.train_time,
        "file_size": None,
        "num_trainable_params": {"full": every, None: 0}.get(job.method, thin),
        "num_total_params": every,
        "status": "diverged" if log.diverged else "success",
        "metrics": log.metrics,
    }


def meta_info(work: task.Task) -> dict[str, Any]:
    packages = ("transformers", "peft", "datasets", "torch", "deepspeed")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    system = platform.uname()
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {"task": {"sha": work.digest, "created_at": None}},
        "package_info": {f"{name}-version": version(name) for name in packages} | {"bitsandbytes-version": None},
        "system_info": {
            "system": system.system,
            "release": system.release,
            "version": system.version,
            "machine": system.machine,
            "processor": system.processor,
            "accelerator": gpu or "N/A",
        },
        "pytorch_info": torch.__config__.show(),
    }


def write_whole(path: Path, text: str) -> None:
    """A file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def run_and_write(job: Job) -> None:
    """The whole life of a run's process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    write_whole(Path(job.record), json.dumps(run(job), indent=1) + "\n")
    zero3.shut_down()
