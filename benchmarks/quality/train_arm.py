"""One run of a campaign, in a process of its own: trains an arm, measures it, leaves a record.

The record has the fields of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA: run_info,
train_info, meta_info), so that both lie in one table; `hdpissa` holds what that schema has no place for. All arms of a
seed see the same rows in each step, and are measured by the same function: mean loss over all target tokens.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config

from hdpissa.engine.directions import svd
from hdpissa.engine.sharding.slicing import SlicePlan
from hdpissa.launch.evaluation import answers
from hdpissa.launch.trainers import HDPissaTrainer, HDPissaTrainingArguments
from hdpissa.launch.trainers.sampler import SliceOrder, SliceSampler

from . import pretrain
from .campaign import Run
from .rungs import Arm, Rung

PLAIN_ROWS = 128  # blocks of plain text on which forgetting is measured
NAMES = {"question": "query", "answer": "response"}
Rows = list[dict[str, list[int]]]


# --- data ---------------------------------------------------------------------------------------------------------


def model_folder(rung: Rung) -> str:
    from hdpissa.launch.demo_model import ensure_demo_model

    made = {"pretrained": lambda: str(pretrain.ensure()), "demo": lambda: str(ensure_demo_model())}
    return made.get(rung.model, lambda: rung.model)()


def encode(rows: list[dict[str, str]], tokenizer: Any, rung: Rung) -> Rows:
    """Question and answer as tokens, EOS at the end; the question counts in the loss where the rung says so."""
    found = []
    for row in rows:
        if rung.max_characters and len(f"{row['question']} {row['answer']}") > rung.max_characters:
            continue
        question = prompt_of(row, tokenizer, rung)
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = (question if rung.whole_sequence else [-100] * len(question)) + answer
        ids = (question + answer)[: rung.max_length]
        found.append({"input_ids": ids, "labels": labels[: rung.max_length], "attention_mask": [1] * len(ids)})
    return [row for row in found if any(label != -100 for label in row["labels"])]


def prompt_of(row: dict[str, str], tokenizer: Any, rung: Rung) -> list[int]:
    """With BOS, of a tokenizer that has one at the beginning of a text."""
    return tokenizer(rung.prompt.format(question=row["question"]))["input_ids"]


def plain_text(rung: Rung, folder: str, tokenizer: Any) -> Rows:
    """Text that has nothing to do with the task: what the small model was pre-trained on, else docstrings."""
    if rung.model == "pretrained":
        from safetensors.torch import load_file

        blocks = load_file(Path(folder) / pretrain.HELD_OUT_FILE)["input_ids"].tolist()
    else:
        ids = tokenizer("\n\n".join(sorted(set(pretrain.docstrings(["numpy.lib"])))))["input_ids"]
        blocks = [ids[at : at + 128] for at in range(0, 128 * PLAIN_ROWS, 128)]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in blocks[:PLAIN_ROWS]]


class Collator:
    """Pads on the right."""

    def __init__(self, pad: int) -> None:
        self._fill = {"input_ids": pad, "labels": -100, "attention_mask": 0}

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
            for key, fill in self._fill.items()
        }


class Seen:
    """A collator that keeps account of the rows of each step; all arms of a seed are to have the same.

    Args:
        rows: of a step.
    """

    def __init__(self, collate: Collator, rows: int) -> None:
        self._collate, self._rows = collate, rows
        self._digests, self._tokens = list[bytes](), list[int]()

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        self._digests += [hashlib.sha256(repr(row["input_ids"]).encode()).digest() for row in rows]
        self._tokens += [len(row["input_ids"]) for row in rows]
        return self._collate(rows)

    def tokens(self, steps: int) -> int:
        return sum(self._tokens[: steps * self._rows])

    def digest(self, steps: int) -> str:
        """Of the set of rows of each step; accelerate fetches some that no step uses."""
        steps_of = (sorted(self._digests[at * self._rows :][: self._rows]) for at in range(steps))
        return hashlib.sha256(b"".join(map(b"".join, steps_of))).hexdigest()


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows, collate: Collator, dtype: str, batch: int = 16) -> float:
    """Over all target tokens, products in `dtype`."""
    was, total, tokens = model.training, 0.0, 0
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for at in range(0, len(rows), batch):
        inputs = collate(ordered[at : at + batch])
        labels = inputs.pop("labels").to(next(model.parameters()).device)
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(**{key: value.to(labels.device) for key, value in inputs.items()}).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        )
        total, tokens = total + loss.item(), tokens + int((labels[:, 1:] != -100).sum())
    model.train(was)
    return total / tokens


def exact_match(model: nn.Module, rows: list[dict[str, str]], tokenizer: Any, rung: Rung) -> float:
    """Share of rows whose generated answer ends in the right number."""
    from hdpissa.launch.common.generation import generate

    prompts = [prompt_of(row, tokenizer, rung) for row in rows]
    model.eval()
    device = next(model.parameters()).device
    found = generate(model, tokenizer, prompts, max_new_tokens=rung.new_tokens, batch_size=16, device=device)
    return sum(is_right(text, row["answer"]) for text, row in zip(found, rows, strict=True)) / len(rows)


def is_right(answer: str, reference: str) -> bool:
    """By the number after GSM8K's mark, or after MetaMathQA's."""
    _, stated, number = answer.rpartition("The answer is: ")
    return answers.is_right(answer, reference) or bool(stated and answers.is_right(f"#### {number}", reference))


# --- arms ---------------------------------------------------------------------------------------------------------


class SameRows(Trainer):
    """Stock Trainer with the rows of each step that our sampler gives, so that all arms learn from the same ones."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        order = SliceOrder(SlicePlan(1, 1, 0), args.gradient_accumulation_steps, args.per_device_train_batch_size)
        return SliceSampler(len(self.train_dataset), order, args.seed)  # type: ignore[arg-type]  # it has a length


class Curve(TrainerCallback):
    """Test loss after each third of a run's steps; of a short run none."""

    def __init__(self, measure: Callable[[], float], run: Run) -> None:
        self._measure, self._at = measure, {run.steps // 3, 2 * run.steps // 3} if run.last else set()
        self.metrics: list[dict[str, Any]] = []
        self.seconds = self.cpu = 0.0  # that measuring has taken

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._at:
            begun, cpu = time.perf_counter(), time.process_time()
            self.metrics.append({"step": state.global_step, "valid loss": finite(self._measure())})
            self.seconds += time.perf_counter() - begun
            self.cpu += time.process_time() - cpu


class Memory(TrainerCallback):
    """Bytes that torch holds on the GPU after each step, or the process on a CPU; `cpu`, seconds before the first."""

    def __init__(self) -> None:
        self._bytes: list[int] = []
        self.cpu = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.cpu = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            self._bytes.append(torch.cuda.memory_reserved())
        else:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._bytes.append(pages * resource.getpagesize())

    def figures(self) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = torch.tensor(self._bytes or [0], dtype=torch.float64)
        return {
            "accelerator_memory_reserved_avg": int(found.mean()),
            "accelerator_memory_max": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak,
            "accelerator_memory_reserved_99th": int(found.quantile(0.99)),
        }


def weight_decay_of(arm: Arm, rung: Rung) -> float:
    return 0.0 if arm.method == "hd_pissa" else rung.weight_decay


def arguments(run: Run, rung: Rung, folder: str, slices: int, **more: Any) -> HDPissaTrainingArguments:
    """For stock Trainer, too: they allow bf16 on a CPU."""
    micro = min(rung.micro, run.batch // slices)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": run.batch // micro,
        "max_steps": run.steps, "learning_rate": run.rate, "lr_scheduler_type": "cosine",
        "warmup_steps": int(rung.warmup * run.steps), "max_grad_norm": rung.clip, "seed": run.seed,
        "logging_steps": min(10, run.steps), "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_nan_inf_filter": False, "bf16": rung.dtype == "bfloat16",
        "weight_decay": weight_decay_of(run.arm, rung),
    }  # fmt: skip
    return HDPissaTrainingArguments(folder, **settings, **more)


def powered_factors(
    slice_factors: Callable[..., tuple[Tensor, Tensor]], power: float, triplets: svd.Triplets, r: int
) -> tuple[Tensor, Tensor]:
    """A_i = diag(σ_i^power) V_iᵀ and B_i = U_i diag(σ_i^power): as published, of σ to twice the power in σ's place."""
    return slice_factors(dataclasses.replace(triplets, sigma=triplets.sigma ** (2 * power)), r)


def ours(run: Run, rung: Rung, output: str) -> tuple[type, Any]:
    arm = run.arm
    section = {"r": arm.r, "slices": arm.slices, "target_modules": list(arm.target_modules)}
    ds = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    ds |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "hd_pissa": section}
    more = {"deepspeed": ds, "hang_timeout": 0}
    if arm.sigma_power != 0.5:
        svd.slice_factors = functools.partial(powered_factors, svd.slice_factors, arm.sigma_power)
    return HDPissaTrainer, arguments(run, rung, output, arm.slices, **more)


def stock(model: nn.Module, arm: Arm) -> nn.Module:
    """PEFT's adapter, or the target weights as they are."""
    if arm.method == "full":
        for name, param in model.named_parameters():
            param.requires_grad_(name.removesuffix(".weight").rpartition(".")[2] in arm.target_modules)
        return model
    from peft import LoraConfig, get_peft_model

    how: Any = "pissa" if arm.method == "pissa" else True
    alpha, targets = arm.lora_alpha or arm.r, list(arm.target_modules)
    config = LoraConfig(r=arm.r, lora_alpha=alpha, target_modules=targets, init_lora_weights=how)
    return get_peft_model(model, config)


# --- one run ------------------------------------------------------------------------------------------------------


class Task:
    """What all arms of a rung learn from and are measured by."""

    def __init__(self, rung: Rung, train_file: str, test_file: str) -> None:
        self.rung, self.folder = rung, model_folder(rung)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.questions = read(test_file)[: rung.test_rows]
        self.train = encode(read(train_file), self.tokenizer, rung)
        self.test = encode(self.questions, self.tokenizer, rung)
        self.text = plain_text(rung, self.folder, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.collate = Collator(self.tokenizer.eos_token_id if pad is None else pad)

    def loss(self, model: nn.Module, rows: Rows) -> float:
        return mean_loss(model, rows, self.collate, self.rung.dtype)

    def measure(self, model: nn.Module, run: Run, before: float | None) -> dict[str, float | None]:
        """The last metrics of a run; None for what it is too short for.

        Args:
            before: loss on plain text of the model that nobody has trained.
        """
        found: dict[str, float | None] = {"test loss": self.loss(model, self.test)}
        found |= {"forgetting": None, "test accuracy": None}
        if before is not None:
            found["forgetting"] = self.loss(model, self.text) - before
        if run.last and self.rung.exact_match:
            found["test accuracy"] = exact_match(
                model, self.questions[: self.rung.exact_match], self.tokenizer, self.rung
            )
        return found


def train(run: Run, rung: Rung, train_file: str, test_file: str, scratch: str) -> dict[str, Any]:
    """Trains and measures; returns the record."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    begun, created = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat()
    task = Task(rung, train_file, test_file)
    model: Any = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, attn_implementation="sdpa")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = {"test loss": task.loss(model, task.test), "plain": task.loss(model, task.text)} if run.last else {}
    total = sum(p.numel() for p in model.parameters())
    if run.arm.method == "hd_pissa":
        kind, args = ours(run, rung, scratch)
    else:
        args = arguments(run, rung, scratch, 1)
        kind, model = SameRows, stock(model, run.arm)
    curve, seen, memory = Curve(lambda: task.loss(model, task.test), run), Seen(task.collate, run.batch), Memory()
    rows = datasets.Dataset.from_list(task.train)
    trainer = kind(model, args=args, train_dataset=rows, data_collator=seen, callbacks=[memory, curve])
    start, cpu = time.perf_counter(), time.process_time()
    error = trained(trainer)
    cost = cost_of(run, model, getattr(trainer, "engine", None))
    cost |= {"cpu seconds of a step": (time.process_time() - memory.cpu - curve.cpu) / run.steps}
    cost |= {"cpu seconds of the start": memory.cpu - cpu}
    train_info: dict[str, Any] = {**memory.figures(), "train_time": time.perf_counter() - start - curve.seconds}
    train_info |= {"file_size": 4 * cost["trained numbers"], "num_trainable_params": cost["trained numbers"]}
    last: dict[str, float | None] = {"test loss": None, "forgetting": None, "test accuracy": None}
    if not error:
        last = task.measure(plain(model, getattr(trainer, "engine", None), scratch), run, before.get("plain"))
    if not all(math.isfinite(value) for value in last.values() if value is not None):
        error, last = "the loss is not finite", dict.fromkeys(last)
    losses = [{"step": r["step"], "train loss": finite(r["loss"])} for r in trainer.state.log_history if "loss" in r]
    of_all: dict[str, Any] = {"train samples": run.steps * run.batch, "train total tokens": seen.tokens(run.steps)}
    of_all["train loss"] = losses[-1]["train loss"] if losses else None
    metrics = [*losses, *curve.metrics, {"step": run.steps, **last, **of_all}]
    train_info |= {"num_total_params": total, "status": "failed" if error else "success", "metrics": metrics}
    own = {"run": dataclasses.asdict(run), "before": before, "rows": seen.digest(run.steps), "cost": cost}
    return {
        "run_info": run_info(run, rung, created, time.perf_counter() - begun, error),
        "train_info": train_info,
        "meta_info": meta_info(),
        "hdpissa": own,
    }


def finite(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None


def trained(trainer: Trainer) -> str:
    """Trains; returns how it diverged, or nothing. What else goes wrong is raised: such a run is to be made again."""
    try:
        trainer.train()
        if isinstance(trainer, HDPissaTrainer):
            trainer.engine.check_weights()
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        return " ".join(str(error).split())[:200]
    return ""


def plain(model: nn.Module, engine: Any, scratch: str) -> nn.Module:
    """The trained model with parameters in fp32; ours as its export gives it, so that all arms are measured alike."""
    if engine is None:
        return model
    folder = Path(scratch) / "export"
    engine.export(folder, dtype="fp32")
    unset_hf_deepspeed_config()  # or the model would be cut into shards
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return found.to(next(model.parameters()).device)


def cost_of(run: Run, model: nn.Module, engine: Any) -> dict[str, Any]:
    """Numbers that are trained, and the bytes of their optimizer's state; the engine's own counts for ours."""
    if engine is None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"trained numbers": trained, "state bytes": 8 * trained}
    trained = run.arm.slices * run.arm.r * sum(t.rows + t.cols for t in engine.targets)
    return {"trained numbers": trained, "state bytes": 8 * trained, "memory bytes": engine.memory_bytes()}


def read(path: str) -> list[dict[str, str]]:
    """Rows with `question` and `answer`; MetaMathQA calls them `query` and `response`."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{name: row.get(name) or row[other] for name, other in NAMES.items()} for row in rows]


def run_info(run: Run, rung: Rung, created: str, seconds: float, error: str) -> dict[str, Any]:
    arm = run.arm
    kind = "HD_PISSA" if arm.method == "hd_pissa" else "LORA"
    adapter = {"peft_type": kind, "r": arm.r, "lora_alpha": arm.lora_alpha or arm.r}
    adapter["target_modules"] = list(arm.target_modules)
    if arm.method == "hd_pissa":
        adapter |= {"slices": arm.slices, "sigma_power": arm.sigma_power}
    elif arm.method == "pissa":
        adapter |= {"init_lora_weights": "pissa"}
    return {
        "created_at": created,
        "total_time": seconds,
        "experiment_name": f"{arm.name}/batch{run.batch}-steps{run.steps}-lr{run.rate:g}-seed{run.seed}",
        "peft_branch": None,
        "train_config": {
            "model_id": Path(rung.model).name if Path(rung.model).is_dir() else rung.model,
            "dtype": rung.dtype,
            "max_seq_length": rung.max_length,
            "batch_size": run.batch,
            "max_steps": run.steps,
            "seed": run.seed,
            "grad_norm_clip": rung.clip,
            "optimizer_type": "HD-PiSSA" if arm.method == "hd_pissa" else "AdamW",
            "optimizer_kwargs": {"lr": run.rate, "weight_decay": weight_decay_of(arm, rung)},
            "lr_scheduler": "cosine",
            "attn_implementation": "sdpa",
        },
        "peft_config": None if arm.method == "full" else adapter,
        "error_msg": error,
    }


def meta_info() -> dict[str, Any]:
    packages = ("transformers", "peft", "datasets", "torch", "deepspeed", "hdpissa")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "N/A"
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {},
        "package_info": {f"{name}-version": version(name) for name in packages} | {"bitsandbytes-version": None},
        "system_info": {"system": platform.system(), "machine": platform.machine(), "accelerator": device},
        "pytorch_info": None,
    }


def write(record: dict[str, Any], path: Path) -> None:
    """A record that is there is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
