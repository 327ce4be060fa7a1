"""What a run of `quality.py` is, and the record that it leaves.

The record has the fields of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA: run_info,
train_info, meta_info), so that both can be laid side by side, and in `hdpissa` what that schema has no place for. On a
CPU the memory fields are of the process's resident memory; all of them are beyond the run's start, and the maximum is
that of building, training and validation, which `hdpissa.memory` has apart. `file_size` is the bytes of what training
leaves, counted, not saved: adapters and whole models in the dtype of compute, HD-PiSSA's sums of ΔA and ΔB in fp32.
`cpu_time` is in seconds over all threads, by part; validation counts as training. The status "diverged" is a loss that
was not finite, or a step that was refused because its numbers would leave fp32; such a run is over, and has no test;
`error_msg` says what it was. `hdpissa.plan` is the comparison that the run was a part of.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.benchmarks import task
from hdpissa.launch.command_line import option


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
    plan: dict[str, Any]

    @property
    def experiment(self) -> str:
        return experiment(self.arm, self.lr, self.seed)


def experiment(arm: str, lr: float, seed: int) -> str:
    """PEFT's experiment_name: method/setting."""
    return f"{arm}/lr_{lr:g}-seed_{seed}"


@dataclass(frozen=True)
class Plan:
    """What a comparison is to hold.

    Attributes:
        rates: each arm's learning rates, the usual one first.
        seeds: the first one is that of the sweeps.
        guessed: arms whose runs, of an earlier revision, do not say what was planned: `rates` has those that are there.
        set_aside: arm → number of its runs that are in the folder, and no part of this.
    """

    rates: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    guessed: frozenset[str] = frozenset()
    set_aside: dict[str, int] = field(default_factory=dict)

    def experiments(self) -> set[str]:
        """Of all runs that may belong to it."""
        every = {
            experiment(arm, rate, seed) for arm, rates in self.rates.items() for rate in rates for seed in self.seeds
        }
        return every | {experiment("base", 0.0, self.seeds[0])}

    def as_record(self) -> dict[str, Any]:
        return {"rates": {arm: list(rates) for arm, rates in self.rates.items()}, "seeds": list(self.seeds)}


@dataclass
class Log:
    """What a run leaves behind beside the model.

    `peaks` are bytes by phase (build, train, validation); `diverged` says why a run ended early.
    """

    metrics: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    train_time: float = 0.0
    tokens: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    diverged: str = ""


def samples(args: Training) -> int:
    """Rows of an optimizer step."""
    return args.micro_batch * args.accumulation


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- fields of the schema ---------------------------------------------------------------------------------------------


def run_info(job: Job, started: str, seconds: float, *, steps: int = 0, error: str = "") -> dict[str, Any]:
    """PEFT's fields; what is not ours to say (its branch) is null. Without a peft_config it means full fine-tuning."""
    args = Training(**job.arguments)
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
            "max_steps": steps or args.steps,
            "eval_steps": args.eval_steps,
            "compile": False,
            "use_gc": args.gradient_checkpointing,
            "query_template": args.prompt_template,
            "seed": job.seed,
            "grad_norm_clip": 0.0,
            "optimizer_type": "HD-PiSSA" if job.method == "hd_pissa" else "AdamW",
            "optimizer_kwargs": {"lr": job.lr, "weight_decay": 0.0},
            "lr_scheduler": "cosine",
            "use_amp": False,
            "autocast_adapter_dtype": False,
            "attn_implementation": "sdpa",
            "init_kv_cache_prefix": None,
            "generation_kwargs": {"max_new_tokens": args.max_new_tokens, "do_sample": False},
        },
        "peft_config": None if job.method == "full" else adapter,
        "error_msg": error,
    }


def identity(job: Job) -> dict[str, Any]:
    """Which run it is, and of which comparison."""
    return {name: value for name, value in asdict(job).items() if name not in ("arguments", "record", "answers")}


def train_info(
    job: Job, log: Log, model: nn.Module, weights: dict[str, Tensor], *, initial: int, itemsize: int
) -> dict[str, Any]:
    """PEFT's fields; `num_trainable_params` of HD-PiSSA is the numbers in all slices' A and B."""
    every = sum(p.numel() for p in model.parameters())
    thin = max(1, job.slices) * job.r * sum(sum(w.shape) for w in weights.values())
    trained = {"full": every, None: 0}.get(job.method, thin)
    held = torch.tensor(log.memory or [initial], dtype=torch.float64) - initial
    peak = max(log.peaks.values(), default=initial) - initial
    return {
        "accelerator_memory_reserved_avg": int(held.mean()),
        "accelerator_memory_max": int(max(0, peak)),
        "accelerator_memory_reserved_99th": int(held.quantile(0.99)),
        "train_time": log.train_time,
        "file_size": trained * itemsize,
        "num_trainable_params": trained,
        "num_total_params": every,
        "status": "diverged" if log.diverged else "success",
        "metrics": log.metrics,
    }


def meta_info(digest: str) -> dict[str, Any]:
    """PEFT's fields; `digest` is the task's, for the SHA of a data set."""
    packages = ("transformers", "peft", "datasets", "torch", "deepspeed")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    system = platform.uname()
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {"task": {"sha": digest, "created_at": None}},
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
