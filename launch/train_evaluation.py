"""When train.py evaluates and asks, and what follows: which checkpoint is the best, whether the run ends early.

What is concluded is the same on every rank: it follows from figures that are summed over all ranks, and rank 0's is
taken. It stands in every checkpoint, so that a resumed run knows what was best before it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hdpissa.engine.metrics import AFTER_TRAINING
from hdpissa.launch.options_evaluation import METRICS, is_greater_better, metric_name, needs_best, strategy


@dataclass
class Best:
    """The best evaluation so far, and how long ago it was.

    Attributes:
        metric: name in an evaluation's row. greater: whether more is better.
        patience: evaluations without improvement that end the run; 0: never. threshold: what an improvement exceeds.
        value, step: of the best one that has, or will have, a checkpoint; None before the first.
        reached: the best value of all, which is what is waited for. seen: step of the last one.
        waited: evaluations since the last improvement.
        home: folder of the best one's checkpoint, where that is another run's.
    """

    metric: str
    greater: bool
    patience: int = 0
    threshold: float = 0.0
    value: float | None = None
    step: int | None = None
    seen: int = 0
    waited: int = 0
    reached: float | None = None
    home: str | None = None

    def see(self, step: int, value: float, *, keepable: bool = True) -> None:
        """Takes an evaluation into account, once.

        Args:
            keepable: whether there is, or will be, a checkpoint of this step; only such a one can be the best.
        """
        if step <= self.seen:  # a run that was resumed and has nothing left to train evaluates once more
            return
        self.seen = step
        improves = self._gain(value, self.reached) > self.threshold
        self.waited = 0 if improves else self.waited + 1
        if improves or self._gain(value, self.reached) > 0:
            self.reached = value
        if keepable and self._gain(value, self.value) > 0:
            self.value, self.step, self.home = value, step, None

    def _gain(self, value: float, than: float | None) -> float:
        """By how much a value is better than another, or than none; not at all when it is not finite."""
        if not math.isfinite(value):
            return -math.inf
        return math.inf if than is None else (value - than) * (1 if self.greater else -1)

    @property
    def stops(self) -> bool:
        """Whether the run has waited long enough."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return asdict(self)

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state, unless that compared by something else."""
        if (state.get("metric"), state.get("greater")) == (self.metric, self.greater):
            self.value, self.step, self.seen, self.waited = (state[k] for k in ("value", "step", "seen", "waited"))
            self.reached, self.home = state.get("reached", self.value), state.get("home")


class Evaluation:
    """One rank's evaluations in train.py.

    Args:
        evaluator: does them.
        checkpoints: saves; with --load_best_model_at_end only what it saves can be the best.
        data_offset: steps done when the data began; epochs are counted from there.
    """

    def __init__(
        self,
        args: Any,
        evaluator: Any,
        recorder: Any,
        checkpoints: Any,
        steps_per_epoch: int,
        data_offset: int = 0,
    ) -> None:
        self._args, self._evaluator, self._recorder, self._checkpoints = args, evaluator, recorder, checkpoints
        self._strategy, self._steps_per_epoch, self._offset = strategy(args), steps_per_epoch, data_offset
        self._best, self._tracks = checkpoints.best, needs_best(args)
        self._evaluated = self._best.seen or -1
        self._tell()

    @property
    def best(self) -> Best:
        return self._best

    def missed(self, start: int, total: int) -> bool:
        """Whether the checkpoint that the run goes on from was due to be evaluated, and was not: there was no time."""
        return 0 < start < total and self._best.seen < start and self.due(start, total)

    def before(self, engine: Any) -> dict[str, Any] | None:
        """Before training; returns the row, None where there is none."""
        row = self._evaluate(engine, 0, counts=False) if self._args.eval_on_start else None
        self._evaluator.sample(engine, self._recorder, step=0, title="before training")
        return row

    def due(self, done: int, total: int) -> bool:
        """Whether to evaluate after `done` optimizer steps."""
        if done == total:  # made after training, unless the checkpoint of this step depends on it
            return self._tracks
        if self._strategy == "epoch":
            return done > self._offset and (done - self._offset) % self._steps_per_epoch == 0
        return self._strategy == "steps" and bool(self._args.eval_steps) and done % self._args.eval_steps == 0

    def evaluate(self, engine: Any, done: int) -> dict[str, Any] | None:
        """Evaluates and decides; returns the row, None where there are no rows to evaluate on."""
        return self._evaluate(engine, done)

    def ask(self, engine: Any, done: int, total: int) -> None:
        """Keeps answers, where it is time to; not of weights that will be asked after training."""
        last = done == total or (self.stops and not self._args.load_best_model_at_end)
        if self._args.sample_steps and done % self._args.sample_steps == 0 and not last:
            self._evaluator.sample(engine, self._recorder, step=done)

    @property
    def stops(self) -> bool:
        """Whether the run should end early."""
        return self._best.stops

    def last(self, engine: Any) -> dict[str, Any] | None:
        """After the last step; returns the row, None where it has been made before, or there is none."""
        step = engine.global_steps
        if self._evaluated == step or self._is_recorded(step):
            return None
        row = self._evaluate(engine, step)
        if self._args.save_strategy == "best" and self._checkpoints.due(step):  # a callback has ended the run
            self._checkpoints.save(engine, step)
        return row

    def end(self, engine: Any) -> None:
        """After training: the best weights if they are wanted, the last answers."""
        step = engine.global_steps
        if self.stops:
            self._recorder.say(
                f"stopped after step {step}: {self._best.metric} has not improved in {self._best.waited} evaluations; "
                f"the best is {self._best.value} (step {self._best.step})"
            )
        if self._args.load_best_model_at_end:
            self._load_best(engine)
        self._evaluator.sample(engine, self._recorder, step=engine.global_steps, title=AFTER_TRAINING)

    def _evaluate(self, engine: Any, step: int, *, counts: bool = True) -> dict[str, Any] | None:
        row = None if self._strategy == "no" else self._evaluator.evaluate(engine, self._recorder, step=step)
        self._evaluated = step
        if row is not None and counts and self._tracks:
            keepable = not self._args.load_best_model_at_end or self._checkpoints.can_keep(step)
            self._best.see(step, _of_rank_0(row[self._best.metric]), keepable=keepable)
            self._tell()
        elif row is not None and counts:
            self._best.seen = step
        return row

    def _is_recorded(self, step: int) -> bool:
        """Whether an earlier run has this row: one that is resumed with nothing left to train; collective."""
        from hdpissa.engine.metrics import read_rows

        rows = read_rows(Path(self._args.output_dir) / "metrics.jsonl")
        return _of_rank_0(float(any("eval_loss" in row and row["step"] == step for row in rows))) > 0

    def _tell(self) -> None:
        if self._tracks and self._best.step is not None:
            found = {"best_metric": self._best.value, "best_global_step": self._best.step}
            if self._best.home or self._checkpoints.can_keep(self._best.step):
                found["best_model_checkpoint"] = str(self._checkpoints.best_folder)
            self._recorder.best(found)

    def _load_best(self, engine: Any) -> None:
        from hdpissa.engine.checkpoint_format import CheckpointError

        if self._best.step is None:
            self._recorder.say("warning: no evaluation has a checkpoint; the last weights are exported, not the best")
        elif self._best.step != engine.global_steps:
            try:
                engine.load_checkpoint(self._checkpoints.best_folder)
            except CheckpointError as error:  # on every rank
                self._recorder.say(f"warning: {error}; the last weights are exported, not the best")
                return
            self._recorder.say(
                f"loaded {self._checkpoints.best_folder}, the best: {self._best.metric} {self._best.value:.6g}"
            )


def make_evaluator(args: Any, job: Any) -> Any:
    """What evaluates, of all that the run has read."""
    from hdpissa.engine.batches import EvalBatches
    from hdpissa.engine.evaluate import Evaluator

    batches = job.rows.held_out and EvalBatches(
        job.rows.held_out.dataset,
        rank=job.plan.rank,
        world_size=job.plan.world_size,
        batch_size=args.per_device_eval_batch_size,
        pad_token_id=job.tokenizer.pad_token_id,
    )
    return Evaluator(
        batches,
        job.tokenizer,
        graded=job.graded,
        asked=job.asked,
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=args.max_new_tokens,
    )


def make_best(args: Any, reader: Any) -> Best:
    """What is known of the best evaluation at the start of a run."""
    name = METRICS[metric_name(args)]
    best = Best(name, is_greater_better(args), args.early_stopping_patience, args.early_stopping_threshold)
    if reader is not None:
        best.resume(reader.manifest.client_state.get("best", {}))
    return best


def best_home(args: Any, reader: Any, best: Best) -> Path:
    """Where the best checkpoint is: in the output folder, or in that of the run that this one goes on from."""
    own = Path(args.output_dir)
    if reader is None or best.step is None or (own / f"checkpoint-{best.step}").is_dir():
        return own
    home = Path(best.home) if best.home else reader.folder.parent
    best.home = str(home.resolve())  # for the checkpoints of this run, from which another may go on
    return home


def _of_rank_0(value: float) -> float:
    """Sums over ranks need not be the same to the last bit on all of them, and decisions must be."""
    import torch
    import torch.distributed as dist

    from hdpissa.engine import zero3

    told = torch.tensor([value], dtype=torch.float64, device=zero3.device())
    dist.broadcast(told, 0)
    return told.item()
