"""When train.py saves, what it resumes from, and how it ends when it is asked to.

The engine's part is its state; this module adds what belongs to the command: the arguments, and which data the
steps so far have seen. A step's batches are a function of the step and nothing else (`engine.batches`), so the
position in the data is the step, provided that the data are the same; that is compared.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hdpissa.engine.ds_config import AGREED
from hdpissa.engine.errors import ConfigError, StopError
from hdpissa.launch.options_evaluation import needs_best
from hdpissa.launch.train_checks import AUTO, Job
from hdpissa.launch.train_description import local_names
from hdpissa.launch.train_evaluation import best_home, make_best

PREEMPTED = 143  # 128 + SIGTERM: what schedulers take for "ended because it was asked to"


# --- resuming --------------------------------------------------------------------------------------


def find_checkpoint(args: Any, job: Job) -> Any:
    """The checkpoint to resume from, its files compared with their checksums; None for a new run. Collective.

    Raises:
        CheckpointError: there is none, all of them are damaged, or it is of another run's data.
    """
    from hdpissa.engine import checkpoint, folders, pulse

    pulse.reach("start.checkpoint", slow=True)
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    automatic = wanted in AUTO
    path = Path(args.output_dir if automatic else wanted)
    if automatic and not _anywhere(folders.candidates(path) if path.is_dir() else []):
        return None
    reader = checkpoint.open_checkpoint(path, fall_back=automatic)
    compare_slices(reader, job)
    if not args.ignore_data_skip:
        compare_data(reader, describe_data(args, job))
    return reader


def compare_slices(reader: Any, job: Job) -> None:
    """Raises CheckpointError for another S: "auto" is the number of processes, which may have changed."""
    from hdpissa.engine.checkpoint_format import CheckpointError

    there, plan = reader.manifest.slices, job.plan
    if there != plan.slices:
        remedy = f'set "slices": {there} in the JSON'
        if there > plan.world_size:
            remedy += f", and gradient_accumulation_steps to a multiple of {there // plan.world_size}"
        raise CheckpointError(
            f"{reader.folder} does not fit this run: hd_pissa.slices is {there} in the checkpoint, {plan.slices} here "
            f"with {plan.world_size} processes; {remedy}, such that a slice's micro-batches per step stay the same"
        )


def _anywhere(found: list[Path]) -> bool:
    """Whether any rank has found something: all of them must decide alike."""
    import torch
    import torch.distributed as dist

    from hdpissa.engine import zero3

    count = torch.tensor([len(found)], device=zero3.device())
    dist.all_reduce(count)
    return bool(count.item())


def describe_data(args: Any, job: Job) -> dict[str, Any]:
    """What the order and the content of the batches depend on."""
    return {
        "seed": args.seed,
        "slices": job.plan.slices,
        "rows of a micro-batch": job.data.micro_batch_size,
        "micro-batches of a slice and step": job.data.micro_batches_per_slice,
        **job.data.identity(),
    }


def compare_data(reader: Any, here: dict[str, Any]) -> None:
    """Raises CheckpointError where the steps so far have seen other data than this run would have given them."""
    from hdpissa.engine.checkpoint_format import CheckpointError

    other = other_data(reader, here)
    if other:
        raise CheckpointError(
            f"{reader.folder} was trained on other data, or in another order ({'; '.join(other)}): give the same "
            f"again, or --ignore_data_skip to begin the data anew"
        )


def other_data(reader: Any, here: dict[str, Any]) -> list[str]:
    """In what a checkpoint's data are others than these."""
    from hdpissa.engine.batches import SHUFFLED

    there = {"order": SHUFFLED} | reader.manifest.client_state.get("data", {})
    return [f"{k}: {there.get(k)} then, {v} now" for k, v in here.items() if there.get(k) != v]


def _plain(value: Any) -> Any:
    """A path may hold bytes that are no text."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


SCHEDULE = {"learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "warmup_ratio", "warmup_steps"}
SCHEDULE |= {"lr_scheduler_kwargs"}


def changed_arguments(reader: Any, args: Any) -> dict[str, str]:
    """The arguments that are not the checkpoint's → how they changed, for people."""
    state, here = reader.manifest.client_state, asdict(args)
    there = state.get("arguments", {})
    quiet = {"resume_from_checkpoint", "overwrite_output_dir", "local_rank", "output_dir", "ds_config"}
    if "local" not in state:  # of 0.1, which kept the command line's defaults of what the JSON had said
        quiet |= {*AGREED}
    return {k: f"{k} {there[k]} → {v}" for k, v in here.items() if k not in quiet and k in there and there[k] != v}


def resumptions(reader: Any, args: Any) -> list[dict[str, Any]]:
    """When the run went on with other arguments: after which step, and what changed; the earliest first."""
    if reader is None:
        return []
    earlier, changed = reader.manifest.client_state.get("resumed", []), changed_arguments(reader, args)
    now = {"step": reader.manifest.step, "changed": [_plain(text) for text in changed.values()]}
    return [*earlier, now] if changed else [*earlier]


def describe_start(args: Any, engine: Any, reader: Any, total_steps: int) -> str:
    """Where the slices came from, and where the run goes on."""
    residual = f"residual {engine.init_report.residual:.1e}"
    if reader is None:
        done = "read from the cache" if engine.init_report.cached else "computed"
        told = f"slices of all {len(engine.targets)} weights {done}, {residual}"
        if engine.plan.slices == 1:
            told += "; one slice only: --slices 8, with 8 times the accumulation, does on one process what 8 GPUs do"
        return told
    other = changed_arguments(reader, args)
    text = f"resumed {reader.folder} after step {engine.global_steps}"
    if other:
        text += f"; changed since: {', '.join(other.values())}"
    if SCHEDULE & other.keys():
        text += f"; so the schedule of learning rates is a new one, of {total_steps} steps"
    return (
        text if engine.global_steps < total_steps else f"{text}; all {total_steps} steps are done, nothing is trained"
    )


# --- saving ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stopped:
    """How a run ended that was asked to."""

    saved: bool
    words: str


def data_offset(args: Any, job: Job, reader: Any) -> int:
    """Steps done when the data began; not 0 after --ignore_data_skip, and then for the rest of the run."""
    if reader is None:
        return 0
    # other data begin anew, once: the runs after this one find their own data in its checkpoints
    if other_data(reader, describe_data(args, job)):
        return reader.manifest.step
    return reader.manifest.client_state.get("data_offset", 0)


def count_from_the_data(args: Any, job: Job, reader: Any) -> Job:
    """The job, whose --num_train_epochs are those of the data that begin anew; --max_steps counts all steps.

    Raises:
        ConfigError: the checkpoint is further than that.
    """
    option = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    if option == "num_train_epochs":
        job = replace(job, total_steps=data_offset(args, job, reader) + job.total_steps)
    if reader is not None and reader.manifest.step > job.total_steps:
        raise ConfigError(
            f"--{option} is {getattr(args, option)}, that is {job.total_steps} steps in all, and {reader.folder} is "
            f"after step {reader.manifest.step}: nothing is left to train; raise it, or go on from an earlier one"
        )
    return job


class Checkpoints:
    """Saves a run when it is time to; the same decisions on every rank.

    Args:
        reader: the checkpoint that the run goes on from, or None.

    Attributes:
        data_offset: steps done when the data began.
        best: the best evaluation so far; it stands in every checkpoint.
    """

    def __init__(self, args: Any, job: Job, recorder: Any, reader: Any) -> None:
        from hdpissa.engine import folders

        self._args, self._recorder, self._total = args, recorder, job.total_steps
        self._steps_per_epoch = job.data.steps_per_epoch
        self.data_offset = data_offset(args, job, reader)
        arguments = {k: _plain(v) for k, v in asdict(args).items()}
        data = describe_data(args, job)
        self._client_state = {"arguments": arguments, "data": data, "data_offset": self.data_offset}
        # for the card of an export: how a question was put, and which names mean nothing elsewhere
        local = [_plain(name) for name in local_names(args)]
        self._client_state |= {"template": _plain(job.rows.template.text), "local": local}
        self._client_state["resumed"] = resumptions(reader, args)
        if args.chat_template is not None:  # its text: an export has neither the run's tokenizer nor its Jinja file
            self._client_state["chat_template"] = _plain(job.tokenizer.chat_template)
        if job.rows.stops:  # for an export, which runs no template
            self._client_state["stop_token_ids"] = job.rows.stops
        self._saved_at = -1
        self.best, self._tracks = make_best(args, reader), needs_best(args)
        self._best_home = best_home(args, reader, self.best)
        self._found_before = self.best.step
        if self._tracks and job.plan.rank == 0:  # a run that goes on from further back has left others behind
            here = self.best.step is not None and self.best_folder.is_dir() and self._best_home == Path(args.output_dir)
            folders.point_to_best(Path(args.output_dir), self.best_folder.name if here else None)

    @property
    def best_folder(self) -> Path:
        """The best checkpoint's folder; there is one once `best` has a step."""
        home = self._best_home if self.best.step == self._found_before else Path(self._args.output_dir)
        return home / f"checkpoint-{self.best.step}"

    def can_keep(self, done: int) -> bool:
        """Whether an evaluation after `done` steps would have its checkpoint, if it is the best."""
        return self._args.save_strategy == "best" or self._scheduled(done)

    def due(self, done: int) -> bool:
        """Whether `done` optimizer steps are a moment to save; with a strategy the end is one, too, as in Trainer."""
        if self._args.save_strategy in ("best", "no"):
            return self._args.save_strategy == "best" and self.best.step == done
        return self._scheduled(done) or self.best.stops

    def _scheduled(self, done: int) -> bool:
        if self._args.save_strategy == "no":
            return False
        if self._args.save_strategy == "epoch":
            return (done - self.data_offset) % self._steps_per_epoch == 0 or done == self._total
        return done % self._args.save_steps == 0 or done == self._total

    def save(self, engine: Any, done: int) -> None:
        """Saves; a failure is told, and ends the run only with --stop_on_save_error."""
        from hdpissa.engine.saver import SaveError

        start = time.perf_counter()
        try:
            folder = self._save(engine, background=self._args.async_save)
        except SaveError as error:
            self.failed(str(error))
            return
        how = "is being saved" if self._args.async_save else "saved"
        self._recorder.say(f"{folder} {how}; training paused for {time.perf_counter() - start:.2f} s")
        self._recorder.resume_clock()

    def _save(self, engine: Any, *, background: bool) -> Path:
        args = self._args
        folder = engine.save_checkpoint(
            args.output_dir,
            client_state=self._client_state | {"best": self.best.state()},
            kind=args.checkpoint_kind,
            async_save=background,
            save_total_limit=args.save_total_limit,
            best=self._tracks and self.best.step == engine.global_steps,
        )
        self._saved_at = engine.global_steps
        return folder

    def finish(self, engine: Any) -> None:
        """Waits for what is being saved in the background."""
        from hdpissa.engine.saver import SaveError

        try:
            engine.wait_for_checkpoint()
        except SaveError as error:
            self._saved_at = -1
            self.failed(str(error))

    def last_save(self, engine: Any) -> Stopped:
        """Saves a run that was asked to stop, at once, and once more where that fails. Call after `finish`."""
        from hdpissa.engine.saver import SaveError

        step, problem = engine.global_steps, ""
        for _ in range(2):
            if self._saved_at != step:
                try:
                    self._save(engine, background=False)
                except SaveError as error:
                    problem = str(error)
        if self._saved_at == step:
            words = f"asked to stop: saved after step {step}; go on with --resume_from_checkpoint auto"
            return Stopped(True, words)
        return Stopped(False, f"asked to stop after step {step}, and not saved: {problem}")

    def failed(self, message: str) -> None:
        """A checkpoint could not be saved."""
        if self._args.stop_on_save_error:
            raise StopError(f"{message}; the run stops (--stop_on_save_error)")
        self._recorder.say(f"warning: {message}; training goes on")


@contextlib.contextmanager
def stopping_on_signals(engine: Any) -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 do not end the process, but ask all ranks to stop after the step.

    Schedulers send one of them some time before they kill (Slurm: `--signal=USR1@300`).
    """
    former = {s: signal.signal(s, lambda *_: engine.request_stop()) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
