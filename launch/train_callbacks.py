"""Callbacks of train.py: transformers' `TrainerCallback`, called by `fit` where Trainer would call it.

What a callback wants (`control.should_log`, `should_evaluate`, `should_save`, `should_training_stop`) is wanted on all
ranks as soon as one rank wants it: the ranks agree after on_step_end, and once more at the end of a step in which
there was another event. Without callbacks nothing is called and nothing communicates.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hdpissa.engine.errors import ConfigError, StopError
from hdpissa.launch.options_evaluation import METRICS, is_greater_better, metric_name, strategy

CALLED: tuple[str, ...] = ("init_end", "train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end")
CALLED += ("log", "evaluate", "save")
FLAGS = ("should_log", "should_evaluate", "should_save", "should_training_stop", "should_epoch_stop")


def load(names: Sequence[str]) -> list[Any]:
    """Instances of the classes that --callbacks names: "package.module:Class" or "path/to/file.py:Class".

    Raises:
        ConfigError: what cannot be imported, is no TrainerCallback, or cannot be made without arguments.
    """
    return [_load(name) for name in names]


def _load(name: str) -> Any:
    from transformers import TrainerCallback

    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ConfigError(f"--callbacks {name}: must be package.module:Class, or path/to/file.py:Class")
    try:
        found = getattr(_import(where), attribute)
    except Exception as error:  # a person's own code may raise anything
        raise ConfigError(f"--callbacks {name}: cannot be imported ({_told(error)}); correct it") from None
    if not (isinstance(found, type) and issubclass(found, TrainerCallback)):
        raise ConfigError(
            f"--callbacks {name}: must be a subclass of transformers.TrainerCallback; derive it from that"
        )
    try:
        return found()
    except Exception as error:
        raise ConfigError(
            f"--callbacks {name}: {attribute}() fails ({_told(error)}); give a class that needs no arguments"
        ) from None


def _import(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    where = os.path.abspath(os.path.expanduser(where))
    name = f"hdpissa_callbacks_{zlib.crc32(os.fsencode(where)):08x}"
    spec = importlib.util.spec_from_file_location(name, where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, and pickle, look for what is defined in it
    spec.loader.exec_module(module)
    return module


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class Callbacks:
    """All callbacks of a run, and what they want.

    Args:
        callbacks: instances. With none every method is a matter of nanoseconds.
        args: they get a copy in which nothing is left to a default, as Trainer's arguments have none left.
        scheduler, tokenizer: handed to them, as Trainer does; and the engine, as `engine`.
        data_offset: steps done when the data began; epochs are counted from there.
    """

    def __init__(
        self, callbacks: Sequence[Any], args: Any, job: Any, *, engine: Any, scheduler: Any, data_offset: int = 0
    ) -> None:
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState

        class Flow(DefaultFlowCallback):
            """Trainer's own decides when to log, evaluate and save; here `fit` does."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

        resolved = {"metric_for_best_model": metric_name(args), "greater_is_better": is_greater_better(args)}
        self._args = replace(args, **resolved, eval_strategy=strategy(args))
        self._engine, self._epoch, self._offset = engine, job.data.steps_per_epoch, data_offset
        self._handler = CallbackHandler([Flow, *callbacks], engine.module, job.tokenizer, engine.optimizer, scheduler)
        self.any, self.control = bool(callbacks), TrainerControl()
        self.state = TrainerState(
            global_step=engine.global_steps,
            epoch=(engine.global_steps - data_offset) / self._epoch,
            max_steps=job.total_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.per_device_train_batch_size,
            num_train_epochs=-((data_offset - job.total_steps) // self._epoch),
            is_world_process_zero=job.plan.rank == 0,
            is_local_process_zero=os.environ.get("LOCAL_RANK", "0") == "0",
        )
        self._happened = False  # an event since the ranks last agreed
        self._in_epoch = False
        self._tell("init_end")

    def never_called(self) -> list[str]:
        """Events that a callback has a method for, and that do not exist here."""
        from transformers import TrainerCallback

        events = [e for e in vars(TrainerCallback) if e.startswith("on_") and e.removeprefix("on_") not in CALLED]
        mine = [type(callback) for callback in self._handler.callbacks[1:]]
        return [f"{c.__name__}.{e}" for c in mine for e in events if getattr(c, e) is not getattr(TrainerCallback, e)]

    # --- events --------------------------------------------------------------------------------------

    def train_begin(self) -> None:
        self._tell("train_begin")

    def train_end(self) -> None:
        self._end_epoch()
        self._tell("train_end")

    def step_begin(self, step: int) -> None:
        """Before the first micro-batch of step `step`, counted from 0."""
        if not self._in_epoch:  # also in the middle of one, where a run goes on
            self._in_epoch = True
            self._tell("epoch_begin")
        self._tell("step_begin")

    def step_end(self, done: int, tokens: int, **wanted: bool) -> Any:
        """After an optimizer step: what is to happen now, on all ranks alike.

        Args:
            wanted: should_log, should_evaluate, should_save as the command line has it; callbacks see and change it.
        """
        seen = done - self._offset
        self.state.global_step, self.state.epoch = done, seen / self._epoch
        self.state.num_input_tokens_seen += tokens
        for name, value in wanted.items():
            setattr(self.control, name, value)
        self._tell("step_end")
        if seen % self._epoch == 0 or done == self.state.max_steps:
            self._end_epoch()
        self._agree()
        return type(self.control)(**{name: getattr(self.control, name) for name in FLAGS})

    def log(self, row: Mapping[str, Any]) -> None:
        """After a row was logged."""
        self.state.log_history.append(dict(row))
        self._tell("log", logs=dict(row))

    def evaluate(self, row: Mapping[str, Any] | None, best: Any) -> None:
        """After an evaluation; None where there is nothing to evaluate on.

        Args:
            best: the best one so far, this one included; callbacks are told of it afterwards, as Trainer does: one that
                compares (`EarlyStoppingCallback`) would else compare the figure with itself.
        """
        if row is not None:
            self.log(row)
            as_trainer = {f"eval_{name}": row[name] for name in METRICS.values() & row.keys() if name[:5] != "eval_"}
            self._tell("evaluate", metrics={**row, **as_trainer})
            self.state.best_metric, self.state.best_global_step = best.value, best.step

    def wants(self, flag: str) -> bool:
        """Whether a callback has set a flag since the step's end; collective where there was an event."""
        if self._happened:
            self._agree()
        return getattr(self.control, flag)

    def save(self) -> None:
        """After a checkpoint was saved, or has begun to be."""
        self.control.should_save = False
        self._tell("save")

    def should_stop(self) -> bool:
        """Whether any rank's callback wants the training to stop; collective where there was an event."""
        if self._happened:
            self._agree()
        return self.control.should_training_stop

    def _end_epoch(self) -> None:
        if self._in_epoch:
            self._in_epoch = False
            self._tell("epoch_end")

    def _tell(self, event: str, **more: Any) -> None:
        if self.any:
            told = getattr(self._handler, f"on_{event}")
            self.control = told(self._args, self.state, self.control, engine=self._engine, **more)
            self._happened = True

    def _agree(self) -> None:
        """What one rank wants, all want."""
        if not self.any:
            return
        import torch
        import torch.distributed as dist

        from hdpissa.engine import zero3

        flags = torch.tensor([float(getattr(self.control, name)) for name in FLAGS], device=zero3.device())
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        for name, value in zip(FLAGS, flags.tolist(), strict=True):
            setattr(self.control, name, value > 0)
        if self.control.should_epoch_stop:
            raise StopError(
                "a callback has set should_epoch_stop: an epoch cannot be left here, because what a step trains on "
                "follows from its number; set should_training_stop"
            )
        self._happened = False
