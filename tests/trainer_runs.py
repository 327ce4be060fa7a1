"""What the ranks of the trainer tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from engine_runs import whole_weights
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
        "weights": whole_weights(trainer.engine),
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
    return {"losses": losses, "weights": whole_weights(engine)}
