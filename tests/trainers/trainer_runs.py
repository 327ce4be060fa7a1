"""What the ranks of the trainer tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from engine_runs import all_trained, whole_weights
from tiny import tiny_llama

SEED, LR, MICRO = 3, 1e-3, 2


def rows(count: int = 40, length: int = 9, vocab: int = 61) -> datasets.Dataset:
    """Rows of token ids, some labels masked, so that means over micro-batches and over tokens differ."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, vocab, (count, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) < 0.3] = -100
    columns = {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    return datasets.Dataset.from_dict(columns)


def config(**hd_pissa: Any) -> dict[str, Any]:
    """A DeepSpeed JSON in which TrainingArguments own what they can."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "hd_pissa": {"r": 2, **hd_pissa},
    }


def arguments(folder: str, section: dict[str, Any], **more: Any) -> Any:
    from hdpissa.launch.trainers import HDPissaTrainingArguments

    settings = {
        "per_device_train_batch_size": MICRO, "learning_rate": LR, "lr_scheduler_type": "cosine", "warmup_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": SEED, "max_grad_norm": 0.0,
        "max_steps": 4, "disable_tqdm": True, "loss_normalization": "mean", "hang_timeout": 0,
    }  # fmt: skip
    return HDPissaTrainingArguments(folder, deepspeed=config(**section), **{**settings, **more})


def trainer_run(
    folder: str,
    section: dict[str, Any],
    *,
    model: dict | None = None,
    resume: Any = None,
    stream: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Trains a tiny Llama in HDPissaTrainer; losses as logged, weights on rank 0."""
    from hdpissa.launch.trainers import HDPissaTrainer

    args, data = arguments(folder, section, **more), rows()
    trainer = HDPissaTrainer(
        tiny_llama(**(model or {})), args=args, train_dataset=data.to_iterable_dataset() if stream else data
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "weights": all_trained(trainer.engine),
        "names": [name for name, _ in trainer.model.named_parameters()],
        "steps": trainer.state.global_step,
    }


def bare_run(
    section: dict[str, Any], *, accumulation: int, steps: int = 4, bf16: bool = False, stream: bool = False, **more: Any
):
    """The same rows through `initialize`, `backward`, `step`, in the order of method.md."""
    from transformers import get_scheduler

    from hdpissa.engine import initialize

    settings = {
        **config(**section),
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
    }
    settings["bf16"] = {"enabled": bf16}
    model = tiny_llama()
    if more.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = initialize(model=model, config=settings, lr=LR)
    scheduler = get_scheduler("cosine", engine.optimizer, num_warmup_steps=1, num_training_steps=steps)
    data = (rows() if stream else rows().shuffle(seed=SEED)).with_format("torch")
    per_slice = engine.plan.micro_batches_per_slice(accumulation)
    per_epoch = len(data) // (engine.plan.slices * per_slice * MICRO)
    losses = []
    for step in range(steps):
        for slice_id, micro in engine.plan.schedule(accumulation):
            first = (step % per_epoch * per_slice + micro) * MICRO
            batch = data[[slice_id + engine.plan.slices * row for row in range(first, first + MICRO)]]
            engine.backward(engine(**batch).loss)
            result = engine.step()
        scheduler.step()
        losses.append(result.loss)
    return {"losses": losses, "weights": all_trained(engine)}


def resumed_run(folder: str, section: dict[str, Any], *, stop_at: int, world_again: int | None = None, **more: Any):
    """A run that is ended after `stop_at` steps by a callback, as by a signal."""
    import os
    import signal

    from transformers import TrainerCallback

    from hdpissa.launch.trainers import HDPissaTrainer

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop_at - 1 and args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # one rank is asked, in the middle of a step; all save after it

    args = arguments(folder, section, save_strategy="steps", save_steps=100, **more)
    trainer = HDPissaTrainer(tiny_llama(), args=args, train_dataset=rows(), callbacks=[Kill()])
    trainer.train()
    return trainer.state.global_step, trainer.preempted, sorted(os.listdir(f"{folder}/checkpoint-{stop_at}"))


# --- TRL -------------------------------------------------------------------------------------------


def prepare_trl(folder: str) -> None:
    """No network: TRL asks the hub for nothing it needs."""
    import os

    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=f"{folder}/cache")


def pairs(count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"{a} + {a} = ", "chosen": f"{2 * a}", "rejected": f"{2 * a + 1}"} for a in range(count)]


def trl_data(kind: str) -> datasets.Dataset:
    found = pairs()
    if kind == "sft":
        found = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in found]
    elif kind == "kto":
        found = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in found
            for side in ("chosen", "rejected")
        ]
    elif kind == "grpo":
        found = [{"prompt": row["prompt"]} for row in found]
    return datasets.Dataset.from_list(found)


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs within a group: the share of a completion's characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) + 0.01 * len(set(text)) for text in completions]


def late_digits(completions: list[str], **kwargs: Any) -> list[float]:
    """`digits`, once it has taken longer than the run may stand still."""
    import time

    if not hasattr(late_digits, "late"):
        late_digits.late = True  # type: ignore[attr-defined]
        time.sleep(20)
    return digits(completions)


def trl_run(
    kind: str, model: str, folder: str, section: dict[str, Any], *, file: str = "", resume: Any = None, **more: Any
):
    """Three steps of one of TRL's trainers on a model given by name; `file`: of rows, else they are made here."""
    prepare_trl(folder)
    from hdpissa.launch import trainers

    name = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "reward": "Reward"}[kind]
    settings = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "max_steps": 3, "disable_tqdm": True, "bf16": False, "seed": SEED,
        "gradient_checkpointing": False,
    }  # fmt: skip
    if kind in ("kto", "reward"):  # each step sees all rows
        settings |= {"per_device_train_batch_size": len(trl_data(kind)) // 2}
    if kind == "grpo":
        settings |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    data = datasets.load_dataset("json", data_files=file, split="train") if file else trl_data(kind)
    args = getattr(trainers, f"HDPissa{name}Config")(folder, deepspeed=config(**section), **{**settings, **more})
    extra = {"reward_funcs": late_digits if more.get("hang_timeout") else digits} if kind == "grpo" else {}
    trainer = getattr(trainers, f"HDPissa{name}Trainer")(model=model, args=args, train_dataset=data, **extra)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "weights": whole_weights(trainer.engine),
    }


def recorded_run(
    folder: str, section: dict[str, Any], *, poison: int = 0, twice: bool = False, **more: Any
) -> dict[str, Any]:
    """A run with evaluation; `poison`: from this step on one rank's loss is not finite."""
    import json
    import os
    from pathlib import Path

    from hdpissa.engine.sharding import zero3
    from hdpissa.launch.trainers import HDPissaTrainer

    class Poisoned(HDPissaTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            bad = poison and self.state.global_step + 1 >= poison and self.args.process_index == 0
            return loss * float("nan") if bad and self.model.training else loss

    data = rows(23)
    trainer = Poisoned(tiny_llama(), args=arguments(folder, section, **more), train_dataset=rows(), eval_dataset=data)
    trainer.train()
    if twice:
        trainer.train()
    found = trainer.evaluate()
    trainer.save_model(f"{folder}/model")
    zero3.barrier()
    read = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {
        "eval_loss": found["eval_loss"],
        "rows": read,
        "state": json.loads(Path(folder, "run_state.json").read_text()),
        "run": json.loads(Path(folder, "run.json").read_text()),
        "weights": whole_weights(trainer.engine),
        "skipped": trainer.engine.skipped_steps,
        "listing": sorted(os.listdir(folder)),
    }


def refusals(folder: str, cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]]) -> dict[str, str]:
    """Case → the type of error that a trainer's constructor raises; a weight read on the way is another error."""
    from transformers import PreTrainedModel

    from hdpissa.launch import trainers

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was read")

    PreTrainedModel._load_pretrained_model = forbidden
    found = {}
    for name, (kind, changes, more) in cases.items():
        settings = {"report_to": "none", "bf16": False} | more
        ds = {key: value for key, value in (config() | changes).items() if value is not None}
        args = getattr(trainers, f"HDPissa{kind}Config")(folder, deepspeed=ds, **settings)
        try:
            getattr(trainers, f"HDPissa{kind}Trainer")(model=folder, args=args, train_dataset=trl_data(kind.lower()))
            found[name] = "nothing"
        except Exception as error:
            found[name] = type(error).__name__
    return found


def best_run(folder: str, section: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Evaluates and saves at every step, with a rate that makes it worse in the end; the best comes back."""
    import os

    from transformers import EarlyStoppingCallback

    from hdpissa.launch.trainers import HDPissaTrainer

    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
    args = arguments(folder, section, **schedule, **best, **more)
    trainer = HDPissaTrainer(
        tiny_llama(),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(10),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return {
        "losses": losses,
        "after": trainer.evaluate()["eval_loss"],
        "kept": sorted(name for name in os.listdir(folder) if name.startswith("checkpoint-")),
        "best": trainer.state.best_model_checkpoint,
    }


def trl_script(name: str, model: str, data: str, folder: str, ds: str, **more: Any) -> list[float]:
    """TRL's own script with our class in place of TRL's, and nothing else; its logged losses."""
    prepare_trl(folder)
    import json
    import runpy
    import sys
    from pathlib import Path

    import trl

    from hdpissa.launch import trainers

    kind = name.upper()
    setattr(trl, f"{kind}Trainer", getattr(trainers, f"HDPissa{kind}Trainer"))
    settings = {
        "model_name_or_path": model, "dataset_name": data, "output_dir": folder, "deepspeed": ds, "bf16": False,
        "dtype": "float32", "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "logging_steps": 1,
        "disable_tqdm": True, "learning_rate": 1e-3, **more,
    }  # fmt: skip
    sys.argv = [f"{name}.py", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__")
    written = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in written if "loss" in row]


def synced_weights(model: str, folder: str, section: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What TRL's weight sync would send to vLLM after two steps of GRPO, by name; the model is exported to `folder`."""
    prepare_trl(folder)
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    from hdpissa.launch import trainers

    more = {"num_generations": 2, "max_completion_length": 4, "max_steps": 2, "report_to": "none", "bf16": False}
    more |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    args = trainers.HDPissaGRPOConfig(folder, deepspeed=config(**section), **more)
    trainer = trainers.HDPissaGRPOTrainer(model=model, args=args, train_dataset=trl_data("grpo"), reward_funcs=digits)
    trainer.train()
    trainer.save_model(folder)
    sent: dict[str, torch.Tensor] = {}

    class Client:
        def update_named_params(self, metadata: list, params: Any) -> None:
            told = [name for name, _, _ in metadata]
            sent.update({name: param.detach().clone() for name, param in params})
            assert list(sent) == told

        def reset_prefix_cache(self) -> None:
            pass

    sync = object.__new__(VLLMGeneration)  # its constructor wants vLLM; what it sends does not
    sync.mode, sync.accelerator, sync.model = "server", trainer.accelerator, trainer.model
    sync.enable_sleep_mode, sync._weight_metadata, sync.vllm_client = False, None, Client()
    sync._dist = DistributedBackend(trainer.accelerator)
    sync.sync_weights()
    return sent


def load_incomplete(folder: str, output: str) -> str:
    """The error of a trainer on a base whose files lack a weight."""
    from hdpissa.launch import trainers

    prepare_trl(output)
    args = trainers.HDPissaSFTConfig(output, deepspeed=config(), report_to="none", bf16=False)
    try:
        trainers.HDPissaSFTTrainer(model=folder, args=args, train_dataset=trl_data("sft"))
    except Exception as error:
        return type(error).__name__
    return "nothing"
