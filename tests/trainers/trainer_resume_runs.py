"""Runs of HDPissaTrainer that stop, fail or begin again; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import datasets
from engine_runs import whole_weights
from tiny import tiny_llama
from trainer_runs import arguments, rows
from transformers import TrainerCallback

EVERY = {"eval_strategy": "steps", "save_strategy": "steps"}


def make(folder: str, section: dict[str, Any], *, model: dict | None = None, callbacks: Any = (), **more: Any) -> Any:
    from hdpissa.launch.trainers import HDPissaTrainer

    data = {"eval_dataset": rows(10)} | {key: more.pop(key) for key in ("eval_dataset", "data_collator") if key in more}
    args = arguments(folder, section, **more)
    model = tiny_llama(**(model or {}))
    return HDPissaTrainer(model, args=args, train_dataset=rows(), callbacks=list(callbacks), **data)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def checkpoints(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


class Kill(TrainerCallback):
    """SIGTERM to the last rank during a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step - 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def best_then_preempted(folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """Dropout, a schedule that follows the evaluation, one checkpoint kept: stopped after step 3 of 6, and not."""
    more: dict[str, Any] = EVERY | {"eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    more |= {"load_best_model_at_end": True, "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0}
    more |= {"lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}, "model": {"attention_dropout": 0.2}}
    unbroken = make(f"{folder}/unbroken", section, **more)
    unbroken.train()
    stopped = make(f"{folder}/stopped", section, callbacks=[Kill(3)], **more)
    stopped.train()
    kept = checkpoints(f"{folder}/stopped")
    resumed = make(f"{folder}/stopped", section, **more)
    resumed.train(resume_from_checkpoint=True)
    return {
        "preempted": (stopped.preempted, stopped.state.global_step, kept),
        "rates": [row["learning_rate"] for row in unbroken.state.log_history if "learning_rate" in row],
        "rates again": [row["learning_rate"] for row in resumed.state.log_history if "learning_rate" in row],
        "losses": losses(unbroken),
        "losses again": losses(resumed),
    }


def finished_then_resumed(folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """Four steps of an epoch of ten; resumed at its end, and from its middle; two evaluation sets."""
    more: dict[str, Any] = EVERY | {"eval_steps": 1, "save_steps": 1}
    more["eval_dataset"] = datasets.DatasetDict({"a": rows(8), "b": rows(12)})
    more["metric_for_best_model"] = "eval_a_loss"
    first = make(folder, section, **more)
    first.train()
    found = {"weights": whole_weights(first.engine), "best": Path(folder, "best").read_text()}
    again = make(folder, section, **more)
    again.train(resume_from_checkpoint=True)
    found |= {"again": whole_weights(again.engine), "steps": again.state.global_step}

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["best at 2"] = Path(folder, "best").read_text()

    back = make(folder, section, callbacks=[Look()], **more)
    back.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return found | {"back": whole_weights(back.engine), "rows": Path(folder, "metrics.jsonl").read_text()}


def small_after_training(folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """The sums of a small checkpoint belong to the base model's weights, and this engine's are others by then."""
    trainer = make(folder, section, checkpoint_kind="small", save_strategy="steps", save_steps=2)
    trainer.train()
    before = whole_weights(trainer.engine)
    steps = trainer.engine.global_steps
    try:
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        error = ""
    except Exception as raised:
        error = type(raised).__name__
    after = whole_weights(trainer.engine)
    return {"error": error, "steps": (steps, trainer.engine.global_steps), "before": before, "after": after}


def best_not_saved(folder: str, section: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The evaluation after step 4 is the best (the highest loss is wanted here), and the disk is full just then."""
    from hdpissa.engine.distributed import faults

    class Wait(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:  # checkpoint-2 is not written during step 4
                trainer.engine.wait_for_checkpoint()

    faults._fault = faults.Fault.parse("save.write:0:4:ENOSPC")  # as the variable would, which is read at import
    more = {**EVERY, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-2, **more}
    more |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make(folder, section, callbacks=[Wait()], **more)
    trainer.train()
    found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return {"losses": found, "best": trainer.state.best_model_checkpoint, "after": trainer.evaluate()["eval_loss"]}


def best_elsewhere(folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """A run goes on in a folder of its own, where nothing is as good as what it came from."""
    more: dict[str, Any] = EVERY | {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_loss"}
    more |= {"load_best_model_at_end": True, "warmup_steps": 0}
    make(f"{folder}/a", section, max_steps=2, **more).train()
    trainer = make(f"{folder}/b", section, learning_rate=1.0, save_total_limit=1, **more)
    trainer.train(resume_from_checkpoint=f"{folder}/a/checkpoint-2")
    return {"best": trainer.state.best_model_checkpoint, "kept": checkpoints(f"{folder}/b")}


def second_pass(folder: str, section: dict[str, Any]) -> str:
    """The error of a run that is resumed in the second pass over a stream."""
    from hdpissa.launch.trainers import HDPissaTrainer

    more = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6, "gradient_accumulation_steps": 4}
    for resume in (None, f"{folder}/checkpoint-6"):
        args = arguments(folder, section, **more)
        trainer = HDPissaTrainer(tiny_llama(), args=args, train_dataset=rows().to_iterable_dataset())
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Exception as error:
            return type(error).__name__
    return "nothing"


def flat_rows(features: list[dict[str, Any]]) -> Any:
    """Rows one after the other in a single one, in a mapping that is no dict."""
    from transformers import BatchEncoding, DataCollatorWithFlattening

    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in features]
    return BatchEncoding(dict(DataCollatorWithFlattening(return_tensors="pt")(plain)))


def evaluated(folder: str, section: dict[str, Any]) -> dict[str, float]:
    """The loss of 23 rows in batches of 5, padded, flat and of a stream; and where a rank's is not finite."""
    found = {}
    stream = {"eval_dataset": rows(23).to_iterable_dataset()}
    for name, more in {"padded": {}, "stream": stream, "flat": {"data_collator": flat_rows}}.items():
        more = {"eval_dataset": rows(23), "per_device_eval_batch_size": 5} | more
        trainer = make(f"{folder}/{name}", section, **more)
        found[name] = trainer.evaluate()["eval_loss"]
    plain = trainer.compute_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss, outputs = plain(*args, **kwargs)
        return (loss * float("nan") if trainer.args.process_index else loss), outputs

    trainer.compute_loss = poisoned
    return found | {"nan": trainer.evaluate()["eval_loss"]}


def reported(folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """TensorBoard, whose writer fails from the second step on, as on a full disk."""
    import logging

    from transformers.integrations import TensorBoardCallback

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hdpissa.launch.trainers").addHandler(handler)
    os.environ["TENSORBOARD_LOGGING_DIR"] = f"{folder}/tb"
    trainer = make(folder, section, report_to="tensorboard")
    (reporter,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback))

    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and reporter.tb_writer is not None:
                reporter.tb_writer.add_scalar = lambda *args: 1 / 0

    trainer.add_callback(Fail())
    trainer.train()
    written = []
    if trainer.args.process_index == 0:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(f"{folder}/tb")
        events.Reload()
        written = [event.value for event in events.Scalars("train/loss")]
    return {"losses": losses(trainer), "written": written, "warnings": [w for w in told if "TensorBoard" in w]}
