"""Writes metrics.jsonl, run.json and run_state.json into the output folder.

    metrics.jsonl    a JSON object for each logged step, each evaluation, each check; null for what is not finite
    run.json         what is needed to know, and to repeat, what was run
    run_state.json   "running", "finished", "preempted" or "failed", the step, and why. A launcher can return 0 for a
                     run that was killed; its state is still "running"

Nothing of an earlier run in the folder is touched before the engine is in place: until then a mistake costs nothing.
Rank 0 writes; when a run fails it may be rank 0 that was lost, so then others write run_state.json, too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hdpissa.engine.distributed import heartbeat
from hdpissa.engine.errors import StopError
from hdpissa.engine.files import atomic
from hdpissa.engine.sharding import zero3
from hdpissa.launch.common.metrics import finite_row, keep_rows, peak_flops
from hdpissa.launch.planning.model_work import active_weights

logger = logging.getLogger(__name__)
METRICS, RUN, STATE = "metrics.jsonl", "run.json", "run_state.json"
PACKAGES = ("hdpissa", "torch", "deepspeed", "transformers", "trl", "accelerate", "datasets")


class RunRecord(TrainerCallback):
    """Writes the three files of a trainer's run.

    Args:
        trainer: with its engine by the time training begins.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._folder, self._rank = Path(trainer.args.output_dir), trainer.args.process_index
        self.described: dict[str, Any] = {}
        self.message = ""  # of run_state.json
        self._step, self._begun = 0, 0.0
        self._seconds, self._steps, self._tokens = 0.0, 0, 0  # since the last row

    def describe(self, **more: Any) -> None:
        """Adds fields that only a script knows to run.json and, for later exports, to checkpoints.

        `arguments` join TrainingArguments.
        """
        self.described |= more

    # --- the run ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        zero3.barrier()  # all have read what they want of an earlier run
        if self._rank == 0:
            with heartbeat.single_rank("record"):
                self._folder.mkdir(parents=True, exist_ok=True)
                keep_rows(self._folder / METRICS, state.global_step)
                atomic.write_json(self._folder / RUN, self._description())
        self._state("running")
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._begun = self._seconds + now - self._begun, now
        self._steps += 1
        self._tokens += self._trainer.engine.last_step.tokens
        self._step = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, **(logs or {})}
        if "loss" in row:
            self.write(row | self._figures())
            self._state("running")
        elif any(name.startswith("eval_") for name in row):  # of several sets each has its own, as eval_<set>_loss
            loss = row.get("eval_loss")
            self.write(row if loss is None else row | {"perplexity": math.exp(min(loss, 700.0))})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._state("preempted" if self._trainer.preempted else "finished")

    def failed(self, error: BaseException, *, lost: bool = False) -> None:
        """run_state.json: "failed", and why; from any rank.

        The cause must stand there, not what followed from it: rank 0's own error always counts, another rank's unless
        somebody has written already, and so does that ranks were lost (`lost`).
        """
        path = self._folder / STATE
        if (self._rank or lost) and _says_failed(path):
            return
        self._folder.mkdir(parents=True, exist_ok=True)  # a host may have one of its own
        text = str(error) if lost or isinstance(error, StopError) else f"{type(error).__name__}: {error}"
        whose = "" if lost or self._rank == 0 or isinstance(error, StopError) else f"rank {self._rank}: "
        atomic.write_json(path, {"state": "failed", "step": self._step, "message": whose + text})

    def figures(self, row: Mapping[str, Any]) -> None:
        """A row of figures per slice, which took its time."""
        self.write(row)
        self._begun = time.perf_counter()

    def integrity(self, checked: Any, step: int) -> None:
        """The row of a check for silent corruption that was passed; warns of slices with an odd update."""
        plan = self._trainer.engine.plan
        first = range(0, plan.world_size, plan.ranks_per_slice)
        ranks = [rank for rank in first for _ in plan.owned_by(rank)]
        row = {"step": step, "integrity": "passed", "tensors": checked.tensors, "delta_norms": checked.norms}
        self.figures(row | {"outliers": checked.outliers, "ranks": ranks})
        for odd in checked.outliers:
            self.say(
                f"step {step}: the update of slice {odd} (rank {ranks[odd]}) has norm {checked.norms[odd]:.2e}, all "
                f"slices have {', '.join(f'{n:.2e}' for n in checked.norms[:16])}; if this goes on, look at that device"
            )

    def say(self, text: str) -> None:
        """A warning, on rank 0."""
        if self._rank == 0:
            logger.warning("%s", text)

    # --- rows ------------------------------------------------------------------------------------------

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a row to metrics.jsonl; it has a step."""
        if self._rank == 0:
            with heartbeat.single_rank("metrics"), (self._folder / METRICS).open("a") as file:
                file.write(json.dumps(finite_row(row)) + "\n")

    def _figures(self) -> dict[str, Any]:
        """Of the last step what it did; of all steps since the last row how fast they were."""
        engine = self._trainer.engine
        rate = self._tokens / self._seconds if self._seconds else 0.0
        last = dataclasses.asdict(engine.last_step)
        named = ("applied", "refusal", "tokens", "bytes_sent", "collectives")
        found = {name: last[name] for name in named} | {
            "skipped_steps": engine.skipped_steps,
            "step_time_s": round(self._seconds / max(1, self._steps), 6),
            "tokens_per_second": round(rate, 2),
            "mfu": self._mfu(rate),
            "peak_memory_bytes": zero3.peak_memory_bytes(),
        }
        self._seconds, self._steps, self._tokens = 0.0, 0, 0
        return found

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Forward and input gradient, 4 FLOP per token and weight that it meets, of the devices' dense bf16 peak."""
        peak = peak_flops(zero3.accelerator_name())
        if peak is None:
            return None
        flops = 4 * active_weights(self._trainer.model) * tokens_per_second
        return round(flops / (peak * self._trainer.args.world_size), 4)

    def _state(self, state: str) -> None:
        if self._rank == 0:
            with heartbeat.single_rank("state"):
                atomic.write_json(self._folder / STATE, {"state": state, "step": self._step, "message": self.message})

    def _description(self) -> dict[str, Any]:
        trainer = self._trainer
        engine, plan = trainer.engine, trainer.engine.plan
        return self.described | {
            "trainer": type(trainer).__name__,
            "arguments": trainer.args.to_dict() | self.described.get("arguments", {}),
            "ds_config": trainer.run_config.ds,
            "world_size": plan.world_size,
            "slices": plan.slices,
            "targets": len(engine.targets),
            "target_modules": sorted({t.name.rsplit(".", 1)[-1] for t in engine.targets}),
            "modules_to_save": engine.optimizer.modules_to_save.numels if engine.optimizer.modules_to_save else {},
            "total_steps": trainer.state.max_steps,
            "resumed_after": trainer.state.global_step,
            "init": dataclasses.asdict(engine.init_report),
            "exchange": dataclasses.asdict(engine.exchange_plan()),
            "memory_bytes": engine.memory_bytes(),
            "device": zero3.accelerator_name(),
            "versions": {name: version(name) for name in PACKAGES},
        }


def _says_failed(path: Path) -> bool:
    try:
        return json.loads(path.read_text())["state"] == "failed"
    except (OSError, ValueError, KeyError):
        return False
