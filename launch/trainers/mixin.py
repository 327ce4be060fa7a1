"""`HDPissaMixin`: HD-PiSSA inside `transformers.Trainer` and every trainer of TRL.

    class HDPissaSFTTrainer(HDPissaMixin, SFTTrainer): ...

Trainer's loop is untouched. What differs from a stock DeepSpeed run, in the order of a run:

1. arguments and JSON are checked before a weight is read; a model given by name is read in shards;
2. `_prepare_for_training` makes the engine (or resumes one) in place of `accelerator.prepare`; accelerate's own wrapper
   then talks to it by DeepSpeed's names: `backward`, `step`, `get_global_grad_norm`;
3. `SliceSampler` gives each slice its rows, whatever the number of ranks;
4. checkpoints are the engine's, written by all ranks, with the trainer's state in the same rename;
5. `save_model` writes the trained model, streamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState

from hdpissa.engine import HDPissaEngine, StepResult, initialize
from hdpissa.engine.checkpoint.state import generators, set_generators
from hdpissa.engine.checkpoint.writer import SaveError
from hdpissa.engine.distributed import heartbeat
from hdpissa.engine.distributed.rank_status import is_loss
from hdpissa.engine.errors import ConfigError, StopError
from hdpissa.engine.sharding import zero3
from hdpissa.engine.sharding.sharded_load import reading_own_rows
from hdpissa.launch.trainers.lock import lock_folder

from . import config as run_config
from .accelerate_cpu import check_world_size
from .arguments import option
from .callbacks import SliceGuard, StopOnSignals, keep_from_ending_the_run
from .resume import (
    existing,
    find_checkpoint,
    point_to_best,
    refuse_fewer_steps,
    refuse_other_data,
    refuse_passes,
    sample,
)
from .run_record import RunRecord
from .sampler import SliceOrder, SliceSampler, SliceStream
from .watchdog import Watchdog

_Base: Any = Trainer if TYPE_CHECKING else object  # the Trainer class that follows it in the bases
logger = logging.getLogger(__name__)
TRAINER_STATE = "trainer_state.json"

# Methods of Trainer that are replaced and not public, with their parameters: transformers may change them.
_REPLACED = {
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_best_model": ["self"],
    "_load_rng_state": ["self", "checkpoint"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
}
for _name, _parameters in _REPLACED.items():
    if list(inspect.signature(getattr(Trainer, _name)).parameters) != _parameters:
        raise ImportError(f"transformers.Trainer.{_name} has changed: use transformers >=5.17,<5.25")


class HDPissaMixin(_Base):
    """Put before a Trainer class; `TrainingArguments(deepspeed=…)` with a section `hd_pissa` is all it needs.

    Attributes:
        engine: None until `train` has made it.
        slice_order: whether this trainer's rows come in the order of slices; False where it has a sampler of its own.
        section_defaults: keys of `hd_pissa` that the class sets where the JSON is silent.
        new_modules: of the model that a base by name need not hold.
    """

    engine: HDPissaEngine = None  # type: ignore[assignment]
    train_dataset: Any
    lr_scheduler: Any
    slice_order = True
    section_defaults: ClassVar[dict[str, Any]] = {}
    new_modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *positional: Any, **named: Any) -> None:
        given = inspect.signature(super().__init__).bind(*positional, **named).arguments
        more = {**given.pop("kwargs", {}), **given}
        model, args = more.get("model"), more.get("args")
        if args is None:
            raise ConfigError("args is not given: TrainingArguments(deepspeed=…) say where the section hd_pissa is")
        for name in ("peft_config", "quantization_config", "optimizer_cls_and_kwargs", "model_init"):
            if more.get(name) is not None:
                raise ConfigError(f"{name} is given: W itself is trained here, by slices of its own; leave it out")
        if any(given is not None for given in more.get("optimizers") or ()):
            raise ConfigError("optimizers is given: slices have their own Adam; say lr_scheduler_type, or leave it out")
        check_world_size(args.world_size)
        self.run_config = run_config.read(args, self.section_defaults)
        self._check(args)
        run_config.check_targets(model, self.run_config, getattr(args, "model_init_kwargs", None) or {})
        self._check_rows(args, more.get("train_dataset"))
        zero3.init_distributed(args.ddp_timeout)  # the group is there; DeepSpeed's own gets the same time-out
        self._sample = sample(more.get("train_dataset"))
        with self._sharded_loading(model, args):
            super().__init__(**more)
        for callback in self.callback_handler.callbacks:
            if type(callback).__module__.startswith("transformers.integrations"):
                keep_from_ending_the_run(callback)
        self._signals, self.run_record = StopOnSignals(self), RunRecord(self)
        for callback in (self._signals, self.run_record, SliceGuard(self)):
            self.add_callback(callback)

    def _check(self, args: TrainingArguments) -> None:
        """Refuses what the class cannot train, before a weight is read; raises ConfigError."""

    def _check_rows(self, args: TrainingArguments, dataset: Any) -> None:
        """Raises ConfigError for fewer rows than a step takes; where they are packed their number shows later."""
        if self.slice_order and hasattr(dataset, "__len__") and not getattr(args, "packing", False):
            plan, micro = self.run_config.plan, args.per_device_train_batch_size
            SliceSampler(len(dataset), SliceOrder(plan, args.gradient_accumulation_steps, micro), None)

    @contextlib.contextmanager
    def _sharded_loading(self, model: Any, args: TrainingArguments) -> Iterator[None]:
        """A model that TRL loads by name is read in shards, in the dtype that the run computes in."""
        if not isinstance(model, str):
            yield
            return
        dtype = "bfloat16" if args.bf16 else "float32"
        of_trl: Any = args  # only TRL's configs have this field, and only its trainers take a name
        of_trl.model_init_kwargs = {**(of_trl.model_init_kwargs or {}), "dtype": dtype}
        with reading_own_rows(self.new_modules):
            yield

    # --- the engine ------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes the engine at the first call and returns its optimizer."""
        if self.optimizer is None:
            self._make_engine(None)
        return self.optimizer

    def _make_engine(self, resume_from: Any) -> None:
        if (reference := getattr(self, "_precompute_engine", None)) is not None:
            reference.destroy()  # TRL's, around the same model, for the log-probabilities of the reference
            self._precompute_engine = None
        ds = self.run_config.ds
        self.engine = initialize(self.model, ds, lr=self.args.learning_rate, resume_from=resume_from)
        self.optimizer = DeepSpeedOptimizerWrapper(self.engine.optimizer)
        self.accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(self.engine)
        self.accelerator._models = [self.engine.ds]  # or an evaluation would wrap the model once more
        self.model_wrapped = self.deepspeed = self.engine.ds

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Sets up engine, optimizer and schedule, new or from a checkpoint."""
        self.lr_scheduler, self._created_lr_scheduler = None, False
        reader = self._reader
        if reader is not None:
            refuse_fewer_steps(reader, max_steps)
            if not self.args.ignore_data_skip:
                refuse_other_data(reader, self._data_identity())
                refuse_passes(reader)
            if getattr(self.args, "sync_ref_model", False):
                raise ConfigError(
                    "sync_ref_model: the moving reference is in no checkpoint; begin anew without resuming"
                )
        self._make_engine(reader)
        self._generators = generators()
        point_to_best(Path(self.args.output_dir), self.state.best_model_checkpoint)
        self._create_schedule(max_steps, reader)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = train_dataloader
        return self.engine.ds, train_dataloader

    def _create_schedule(self, max_steps: int, reader: Any) -> None:
        """Creates the schedule of the current arguments, advanced to the resumed step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("peak_lr", self.args.learning_rate)
            group.pop("initial_lr", None)
        scheduler = self.create_scheduler(max_steps, self.optimizer)
        if reader is None:
            return
        saved = json.loads(reader.manifest.client_state["scheduler"])
        if not isinstance(scheduler, LambdaLR):  # its rate follows from what it has seen, not from the step
            scheduler.load_state_dict(saved)
            for group, lr in zip(self.optimizer.param_groups, saved["_last_lr"], strict=True):
                group["lr"] = lr
            return
        scheduler.load_state_dict({**saved, "base_lrs": scheduler.base_lrs})
        for group, base, factor in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; `resume_from_checkpoint` may also be "auto": the newest sound checkpoint, if there is one.

        A second call is another run on the current weights. A run that SIGTERM or SIGUSR1 stops returns after saving,
        with `self.preempted` set.
        """
        self.preempted = False
        self.model_wrapped = self.model  # of an earlier run it is DeepSpeed's engine
        self.accelerator.deepspeed_engine_wrapped = None  # accelerate would destroy it
        lock_folder(Path(self.args.output_dir), self.args.process_index)
        self._reader = find_checkpoint(resume_from_checkpoint, Path(self.args.output_dir))
        self._steps_since_log: list[StepResult] = []
        self._passes = -1  # over the rows, that are complete
        eval_on_start = self.args.eval_on_start
        if self._reader is not None:
            self.args.eval_on_start = False  # that was before the first step
        with self._signals.listening(), self._watching():
            try:
                return super().train(None if self._reader is None else str(self._reader.folder), *args, **kwargs)
            except BaseException as error:
                if self.engine is not None and not is_loss(error):
                    self.run_record.failed(error)
                raise
            finally:
                self.args.eval_on_start = eval_on_start

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed
            self.control.should_training_stop = True
            return
        self._passes += 1
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Trainer loads the best checkpoint; with save_total_limit=1 it would remove all others of the folder."""
        self._finish_saves()
        best = None if self.preempted else self.state.best_model_checkpoint
        self.state.best_model_checkpoint = existing(best, Path(self._get_output_dir(trial=trial)))
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the engine has seen to it
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _watching(self) -> contextlib.AbstractContextManager:
        hang_s = option(self.args, "hang_timeout")
        hang_s = min(self.args.ddp_timeout, 600) if hang_s is None else hang_s
        if hang_s == 0:
            return contextlib.nullcontext()
        return Watchdog(
            self.args.ddp_timeout,
            hang_s,
            steps_done=lambda: self.state.global_step,
            on_lost=lambda lost: self.run_record.failed(lost, lost=True),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        heartbeat.at_step(self.state.global_step + 1)
        heartbeat.beat("step.data")
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        heartbeat.beat("step.forward")
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.engine.global_steps > self.state.global_step:
            self._after_step(self.engine.last_step)
        return loss

    def _after_step(self, step: Any) -> None:
        self._steps_since_log.append(step)
        if step.failed_save:
            self._save_failed(step.failed_save)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._count_tokens(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        if self.model.training and self.engine is not None:
            self.engine.count_tokens(inputs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if option(self.args, "loss_normalization") == "mean":
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The loss is the engine's own mean over ranks: a skipped step's is what it was, not an average of others."""
        if "loss" in logs and self.engine is not None and (steps := self._steps_since_log):
            logs["loss"] = sum(s.loss for s in steps) / len(steps)
            if self.engine.skipped_steps:
                logs["skipped_steps"] = self.engine.skipped_steps
            self._steps_since_log = []
        super().log(logs, *args, **kwargs)

    # --- data ------------------------------------------------------------------------------------------

    def _order(self) -> SliceOrder:
        return SliceOrder(self.run_config.plan, self.args.gradient_accumulation_steps, self._train_batch_size)

    def _data_seed(self) -> int | None:
        """What the rows are shuffled with; None where they are not."""
        if getattr(self.args, "train_sampling_strategy", "random") == "sequential":  # KTO's default
            return None
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.slice_order or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        sampler = SliceSampler(len(dataset), self._order(), self._data_seed())
        if sampler.dropped and self.is_world_process_zero():
            logger.warning("%d rows of each epoch fill no whole step and are left out", sampler.dropped)
        return sampler

    def get_train_dataloader(self) -> Any:
        if not (self.slice_order and isinstance(self.train_dataset, IterableDataset)):
            return super().get_train_dataloader()
        stream, self.train_dataset = self.train_dataset, SliceStream(self.train_dataset, self._order())
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = stream

    def _data_identity(self) -> dict[str, Any]:
        """What the order of a slice's rows depends on; a checkpoint of other data is not resumed."""
        order, plan = self._order(), self.run_config.plan
        known = hasattr(self.train_dataset, "__len__")
        return {
            "seed": self._data_seed(),
            "slices": plan.slices,
            "rows of a micro-batch": self._train_batch_size,
            "rows of a step": order.rows,
            "rows": len(self.train_dataset) if known else None,
            "workers of a stream": None if known else self.args.dataloader_num_workers,
            "sample": self._sample,
        }

    # --- evaluation ------------------------------------------------------------------------------------

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Counts each row and token once: accelerate fills the last batches up with rows that were there before."""
        heartbeat.beat("eval", slow=True)
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return super().prediction_step(model, inputs, *args, **kwargs)
        labels = self._without_fill(labels, inputs.get("position_ids"))
        found = super().prediction_step(model, {**inputs, "labels": labels}, *args, **kwargs)
        shifted = getattr(self, "_loss_shifts_labels", True)
        tokens = ((labels[:, 1:] if shifted else labels) != -100).sum()
        if found[0] is not None:
            loss = torch.where(tokens > 0, found[0].double() * tokens, 0.0)  # of no tokens it is 0 / 0
            self._evaluated += torch.stack([loss, tokens]).to(self._evaluated)
        return found

    def _without_fill(self, labels: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Labels (rows × length) in which the rows that only fill the last batches up count for nothing.

        Args:
            positions: where rows stand one after the other in a single one (`padding_free`), they begin at its zeros.
        """
        state, rows = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not (state.end_of_dataloader and state.remainder > 0):
            return labels
        row = torch.arange(len(labels), device=labels.device)[:, None]
        if len(labels) == 1 != rows and positions is not None:
            row = (positions == 0).cumsum(-1) - 1
            if row.max() + 1 != rows:  # packed: where a row of the dataset begins is not known any more
                return labels
        else:
            rows = len(labels)  # of a stream's last batch each rank has an equal part, which may be smaller
        return labels.where(self.args.process_index * rows + row < state.remainder, -100)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`eval_loss` is the mean over all target tokens, not a mean of batches' means."""
        if self.engine is None:  # before training
            self._make_engine(None)
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a preempted run skips an evaluation; its dropout must not differ
            output = super().evaluation_loop(*args, **kwargs)
        dist.all_reduce(self._evaluated)
        total, tokens = self._evaluated.tolist()
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if tokens and name in output.metrics:
            output.metrics[name] = total / tokens
        return output

    # --- checkpoints -----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The engine's checkpoint, crash-safe, with the trainer's state in it; no model folder and no pickle."""
        state, args = self.state, self.args
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        best = bool(state.best_global_step) and state.best_global_step == state.global_step
        before = state.best_model_checkpoint
        if best:
            state.best_model_checkpoint = str(run_dir / f"checkpoint-{state.global_step}")
        for callback in [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]:
            name, own = type(callback).__name__, callback.state()
            kept = state.stateful_callbacks.get(name)
            if isinstance(kept, list):
                kept.append(own)
            else:
                state.stateful_callbacks[name] = own
        text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"
        # As text: the best loss of a schedule that follows it begins at infinity.
        scheduler = json.dumps(_plain(self.lr_scheduler.state_dict()))
        client_state: dict[str, Any] = {"scheduler": scheduler, "data": self._data_identity()}
        if not hasattr(self.train_dataset, "__len__"):
            client_state["passes"] = self._passes
        client_state |= self.run_record.described
        save = functools.partial(
            self.engine.save_checkpoint,
            run_dir,
            f"checkpoint-{state.global_step}",
            client_state,
            kind=option(args, "checkpoint_kind"),
            async_save=option(args, "async_save") and not self.preempted,  # that one must be known to be there
            save_total_limit=args.save_total_limit,
            best=best,
            extra_files={TRAINER_STATE: text},
        )
        try:
            save()
        except SaveError as error:
            state.best_model_checkpoint = before
            self._save_failed(str(error))
            if self.preempted:  # there is no other step to save after
                self._save_last(save)

    def _save_last(self, save: Callable[[], Any]) -> None:
        try:
            save()
        except SaveError as error:
            self.run_record.message = f"asked to stop after step {self.state.global_step}, and not saved: {error}"

    def _save_failed(self, message: str) -> None:
        if option(self.args, "stop_on_save_error"):
            raise StopError(f"{message}; the run stops (stop_on_save_error)")
        if self.is_world_process_zero():
            logger.warning("%s; training continues", message)

    def _finish_saves(self) -> None:
        try:
            self.engine.wait_for_checkpoint()
        except SaveError as error:
            self._save_failed(str(error))

    def _load_best_model(self) -> None:
        self.engine.load_checkpoint(self.state.best_model_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Once more as the engine has restored them: fetching rows has drawn; transformers would unpickle a file."""
        set_generators(*self._generators)

    # --- results ---------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained model as a Hugging Face folder, streamed from the shards; collective."""
        if self.engine is None:
            raise RuntimeError("save_model before train: nothing has been trained yet")
        folder = Path(output_dir or self.args.output_dir)
        heartbeat.beat("export", slow=True)
        self.engine.export(folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state as JSON has it; LambdaLR keeps the attributes of its functions, which have none."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | (
        {"lr_lambdas": [None] * len(state["lr_lambdas"])} if "lr_lambdas" in state else {}
    )
