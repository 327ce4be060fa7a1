"""What a run leaves behind for people and programs: metrics.jsonl, samples.jsonl, run.json, run_state.json.

Rank 0 alone writes; the other ranks hold a recorder that does nothing, so that the loop has no branches. One
exception: when a run fails, rank 0 may be what was lost, so then others write run_state.json, too.
Every row of metrics.jsonl also goes to the reporters (TensorBoard, W&B), and steps to the display.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from . import pulse
from .display import Display
from .errors import ConfigError, StopError
from .metrics import finite_row, peak_flops, write_json
from .progress import Work
from .reporters import Reporters

WARNING = "warning: "


class Recorder:
    """A rank's record of a run; rank 0's is the one that is written.

    Args:
        folder: output folder; on rank 0 it exists.
        total_steps: optimizer steps planned.
        weights: that a token is multiplied with, for `mfu`: no embedding, and of experts those that it meets.
        device_name, devices: for `mfu`.
        rank: whose it is.
        reporters: who else gets the rows; None: nobody.
        earlier: run_state.json of the run that is in the folder, if one is: until `begin` nothing of it is lost.
        bar: whether a terminal shows a bar.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        weights: int,
        device_name: str,
        devices: int,
        rank: int,
        reporters: Reporters | None = None,
        bar: bool = True,
        earlier: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.rank, self.quiet = folder, rank, rank != 0
        self._flops_per_token = 4 * weights
        peak = peak_flops(device_name)
        self._peak = peak * devices if peak else None
        self._last = time.perf_counter()
        self.steps_done = 0
        self._failed = False
        self._best: dict[str, Any] = {}
        self._file: IO[str] | None = None
        self._earlier = earlier
        self._display = Display(total_steps=total_steps, quiet=self.quiet, bar=bar)
        self.warnings: list[str] = []  # what was said that begins so; the report of the run has them
        self._reporters = reporters or Reporters([])
        self._reporters.start(self.say)

    def say(self, text: str) -> None:
        """Prints a line above the bar, on rank 0 only."""
        if text.startswith(WARNING):
            self.warnings.append(text.removeprefix(WARNING))
        self._display.say(text)

    def work(self, title: str) -> Work:
        """Shows how far a long piece of work is that is no step; see there."""
        return self._display.work(title)

    def slices(self, name: str, done: int, total: int) -> None:
        """How far the decomposition is."""
        self.work("slices of weights")(done, total, name)

    def start(self) -> None:
        """Starts the clock of the first step and the bar."""
        self._display.start()
        self._last = time.perf_counter()

    def resume_clock(self) -> None:
        """Leaves out what happened since the last step (evaluation, generation)."""
        self._last = time.perf_counter()

    # --- rows ----------------------------------------------------------------------------------------

    def step(self, figures: Mapping[str, Any], *, log: bool) -> dict[str, Any]:
        """Records an optimizer step.

        Args:
            figures: at least step, loss, learning_rate, tokens.
            log: whether it is written and printed; the clock runs in any case.

        Returns: the row.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.steps_done = figures["step"]
        row = finite_row(figures)
        row["step_time_s"] = round(seconds, 6)
        row["tokens_per_second"] = round(figures["tokens"] / seconds, 2)
        row["mfu"] = self._mfu(figures["tokens"] / seconds)
        if log:
            self._write(row)
            self.state("running", figures["step"])
        self._display.step(row, seconds, log=log)
        return row

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak is None:
            return None
        return round(self._flops_per_token * tokens_per_second / self._peak, 4)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Records an evaluation: at least step, eval_loss and perplexity."""
        self._write(finite_row(row))
        match = f"  exact_match {row['eval_exact_match']:.1%}" if "eval_exact_match" in row else ""
        figures = f"eval_loss {row['eval_loss']:.4f}  perplexity {row['perplexity']:.2f}{match}"
        self.say(f"eval   step {row['step']:>5}  {figures}")

    def integrity(self, row: Mapping[str, Any]) -> None:
        """Records a check for silent corruption that the run has passed; warns of slices with an odd update."""
        self._write(finite_row(row))
        for odd in row["outliers"]:
            norms = row["delta_norms"]
            self.say(
                f"warning: step {row['step']}: the update of slice {odd} (rank {row['ranks'][odd]}) has norm "
                f"{norms[odd]:.2e}, those of all slices {', '.join(f'{n:.2e}' for n in norms[:16])}; if this goes on, "
                f"look at that device"
            )

    def figures(self, row: Mapping[str, Any]) -> None:
        """Records any other row; it has a step. What it took is not the next step's."""
        self._write(finite_row(row))
        self.resume_clock()

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Adds generated answers to samples.jsonl."""
        if not self.quiet and rows:
            with pulse.alone("samples"), (self.folder / "samples.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self.quiet:
            with pulse.alone("metrics"):
                self._file = self._file or (self.folder / "metrics.jsonl").open("a", buffering=1)
                self._file.write(json.dumps(row) + "\n")
            self._reporters.row(row)

    def begin(self) -> None:
        """From here on the folder is this run's."""
        self._earlier = None

    # --- files ---------------------------------------------------------------------------------------

    def describe(self, content: Mapping[str, Any]) -> None:
        """run.json: what is run."""
        self.save_json("run.json", content)
        self._reporters.describe(content)

    def save_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file of the output folder, whole or not at all."""
        if not self.quiet:
            with pulse.alone(name):
                write_json(self.folder / name, content)

    def best(self, found: Mapping[str, Any]) -> None:
        """What run_state.json says of the best evaluation from now on."""
        self._best = dict(found)

    def state(self, state: str, step: int, message: str = "") -> None:
        """run_state.json: "running", "finished", "preempted" or "failed", at which step, and why.

        Launchers can return 0 for a run that was killed, so this file is what says how a run ended.
        """
        self.steps_done = step
        self.save_json("run_state.json", _state(state, step, message) | self._best)

    def failed(self, error: BaseException, *, lost: bool = False) -> None:
        """run_state.json: "failed", after how many steps, and the error; from any rank.

        The cause must stand there, not what followed from it: rank 0's own error always counts, another rank's
        unless somebody has written already, and so does that peers were lost (`lost`). Ranks on hosts that do not
        share the folder each write their own.
        """
        self._failed = True
        path = self.folder / "run_state.json"
        if isinstance(error, ConfigError) and self._earlier is not None:  # what does not fit changes nothing there
            write_json(path, self._earlier, rank=self.rank)
            return
        if (self.rank or lost) and _says_failed(path):
            return
        text = str(error) if lost or isinstance(error, StopError) else f"{type(error).__name__}: {error}"
        message = text if lost or self.rank == 0 or isinstance(error, StopError) else f"rank {self.rank}: {text}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, _state("failed", self.steps_done, message) | self._best, rank=self.rank)

    def close(self) -> None:
        """Ends the reporters and the bars, closes the file; in bounded time."""
        self._reporters.close(failed=self._failed)
        self._display.stop()
        if self._file is not None:
            self._file.close()


def _state(state: str, step: int, message: str) -> dict[str, Any]:
    return {"state": state, "step": step, "message": message}


def _says_failed(path: Path) -> bool:
    try:
        return json.loads(path.read_text())["state"] == "failed"
    except (OSError, ValueError, KeyError):
        return False
