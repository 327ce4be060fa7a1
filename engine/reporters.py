"""Rows of metrics.jsonl on their way to TensorBoard and W&B, which can neither stop nor hang training.

Every backend lives in a thread of its own, and all that is done to it is done there: importing it, opening it, giving
it rows, closing it. The loop only puts rows into a queue. An exception of a backend is one warning, and the end of
that backend; one that hangs is left behind at the end of the run, after a bounded time.

Names are those of Hugging Face's Trainer: `train/loss`, `eval/loss`, …; `flatten` says how a row becomes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

MOST_WAITING = 20_000  # rows; what a backend that hangs may pile up
FINISH_S, FAILED_FINISH_S = 60.0, 10.0  # that the end of a run waits for all backends together
REACH_S = 3.0  # that a server may take to answer the one question at the start
STEP = "train/global_step"  # the x axis of every figure, as the Trainer calls it


def flatten(row: Mapping[str, Any]) -> dict[str, float | bool | str]:
    """A row under the names of dashboards: nothing that is null or empty, a list entry by entry.

    {"step": 8, "eval_loss": 2.0} → {"train/global_step": 8, "eval/loss": 2.0}
    {"step": 8, "slice_delta_norms": [1.0, 3.0]} → {…, "slices/slice_delta_norms/0": 1.0, "…/1": 3.0}
    """
    kinds = {"eval_loss": "eval", "slice_delta_norms": "slices", "integrity": "integrity"}
    section = next((kinds[name] for name in kinds if name in row), "train")
    found: dict[str, float | bool | str] = {}
    for name, value in row.items():
        key = STEP if name == "step" else f"{section}/{name.removeprefix('eval_')}"
        parts = {f"{key}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
        found |= {k: v for k, v in parts.items() if v is not None and v != ""}
    return found


class Backend(Protocol):
    """Something that shows rows. Its methods run in one thread, and may raise."""

    name: str

    def start(self) -> str:
        """Opens it; returns what people should know."""

    def describe(self, content: Mapping[str, Any]) -> None:
        """Takes run.json."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Takes a row of metrics.jsonl."""

    def finish(self, failed: bool) -> None:
        """Closes it, with everything delivered."""

    def abandon(self) -> str:
        """From another thread, when `finish` takes too long: lets go; returns where the rest is."""


class Reporters:
    """All backends of a run; rank 0's. None of its methods raises, `close` is bounded in time, the others do not wait.

    Args:
        backends: may be none.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._couriers = [_Courier(backend) for backend in backends]

    def start(self, say: Callable[[str], None]) -> None:
        """Opens all of them in the background.

        Args:
            say: prints a line; called from their threads.
        """
        for courier in self._couriers:
            courier.say = say
            courier.start()

    def describe(self, content: Mapping[str, Any]) -> None:
        """run.json."""
        text = json.loads(json.dumps(content, default=str))  # a copy, and nothing but JSON
        for courier in self._couriers:
            courier.send("describe", text)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        for courier in self._couriers:
            courier.send("row", dict(row))

    def close(self, *, failed: bool) -> None:
        """Ends all of them: within a minute, after a failure within ten seconds."""
        limit = FAILED_FINISH_S if failed else FINISH_S
        for courier in self._couriers:
            courier.end(failed)
        end = time.monotonic() + limit
        for courier in self._couriers:
            courier.join(max(0.0, end - time.monotonic()))
            if courier.is_alive():
                courier.leave_behind(limit)


class _Courier(threading.Thread):
    """A backend's thread and its queue."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(name=f"report to {backend.name}", daemon=True)
        self._backend = backend
        self.say: Callable[[str], None] = print
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(MOST_WAITING)
        self._dropped = self._ended = self._failed = False
        self._missed = 0

    def send(self, what: str, content: Any) -> None:
        """Never waits: what finds the queue full is counted."""
        if not self._dropped:
            try:
                self._queue.put_nowait((what, content))
            except queue.Full:
                self._missed += 1

    def end(self, failed: bool) -> None:
        self._failed, self._ended = failed, True
        with contextlib.suppress(queue.Full):  # then the thread finds `_ended` when it has emptied the queue
            self._queue.put_nowait(("end", None))

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is: training goes on
            self._dropped = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._tell(f"warning: {self._backend.name} gets no more reports ({reason}); metrics.jsonl has everything")

    def _work(self) -> None:
        self._tell(self._backend.start())
        while not (self._ended and self._queue.empty()):
            what, content = self._queue.get()
            if what == "describe":
                self._backend.describe(content)
            elif what == "row":
                self._backend.row(content)
        self._backend.finish(self._failed)
        if self._missed:
            self._tell(f"warning: {self._missed} rows did not reach {self._backend.name}; metrics.jsonl has all")

    def _tell(self, text: str) -> None:
        if text:
            with contextlib.suppress(Exception):
                self.say(text)

    def leave_behind(self, limit: float) -> None:
        where = ""
        with contextlib.suppress(Exception):
            where = self._backend.abandon()
        self._tell(
            f"warning: {self._backend.name} did not finish within {limit:.0f} s and is left behind"
            + (f"; {where}" if where else "")
        )


# --- TensorBoard -----------------------------------------------------------------------------------


class TensorBoard:
    """An event file.

    Args:
        folder: of this run's event file.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(self._folder))
        return f"tensorboard: {self._folder}"

    def describe(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2)
        self._writer.add_text("run", "    " + text.replace("\n", "\n    "))  # Markdown's way to show it as it is

    def row(self, row: Mapping[str, Any]) -> None:
        for name, value in flatten(row).items():
            if name == STEP:
                continue
            if isinstance(value, str):
                self._writer.add_text(name, value, row["step"])
            else:
                self._writer.add_scalar(name, value, row["step"])

    def finish(self, failed: bool) -> None:
        self._writer.close()

    def abandon(self) -> str:
        return ""


# --- W&B -------------------------------------------------------------------------------------------


def choose_mode(wanted: str, has_key: bool, reachable: Callable[[], bool], host: str) -> tuple[str, str]:
    """("online" or "offline", why offline), decided once.

    Args:
        wanted: WANDB_MODE, or empty.
        reachable: asks the server, in bounded time; only called where it matters.
    """
    if wanted in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE={wanted}"
    if not has_key:
        return "offline", "no API key here; `wandb login` stores one"
    if not reachable():
        return "offline", f"{host} does not answer within {REACH_S:.0f} s"
    return "online", ""


def is_reachable(url: str) -> bool:
    """Whether a server answers, through proxies if the environment names some; known within REACH_S seconds."""
    import requests  # before the clock starts: on a busy machine this takes longer than the answer

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            if requests.get(f"{url.rstrip('/')}/healthz", timeout=REACH_S).status_code < 500:
                answered.set()

    # resolving a name has no time-out of its own, so it gets a thread that can be left behind
    asking = threading.Thread(target=ask, name="reach wandb", daemon=True)
    asking.start()
    asking.join(REACH_S)
    return answered.is_set()


def has_credentials(url: str) -> bool:
    """Whether W&B would find an API key without asking on the terminal."""
    import netrc
    from urllib.parse import urlsplit

    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(urlsplit(url).netloc) is not None
    return False


class WeightsAndBiases:
    """A W&B run. The variables that W&B's users know work: WANDB_PROJECT, WANDB_NAME, WANDB_MODE, WANDB_DIR, ….

    Args:
        folder: where W&B keeps its files, in `wandb/`.
        run_name: wins over WANDB_NAME; None: that, or the folder's name.
    """

    name = "wandb"

    def __init__(self, folder: Path, run_name: str | None) -> None:
        self._folder, self._run_name = folder, run_name
        self._run: Any = None
        self._sync = ""

    def start(self) -> str:
        # W&B's reports of its own errors: at exit they would try for up to half a minute to get out
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        from wandb.sdk import wandb_setup

        url = str(wandb_setup.singleton().settings.base_url)
        wanted = os.environ.get("WANDB_MODE", "")
        mode, why = choose_mode(wanted, has_credentials(url), lambda: is_reachable(url), url)
        try:
            self._open(mode)
        except Exception as error:  # a key that is none, a project that is not ours, …
            if mode == "offline":
                raise
            mode, why = "offline", " ".join(str(error).split())[:200]
            self._open(mode)
        self._sync = f"wandb sync {self._run.settings.sync_dir}"
        return f"wandb: {self._run.url}" if mode == "online" else f"wandb: offline ({why}); afterwards: {self._sync}"

    def _open(self, mode: str) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",  # standard output stays whose it is
            silent=True,
            init_timeout=30,
            finish_timeout=FINISH_S / 2,
            summary_timeout=5,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hdpissa"),
            name=self._run_name or os.environ.get("WANDB_NAME") or self._folder.absolute().name,
            dir=os.environ.get("WANDB_DIR", str(self._folder)),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def describe(self, content: Mapping[str, Any]) -> None:
        self._run.config.update(dict(content), allow_val_change=True)

    def row(self, row: Mapping[str, Any]) -> None:
        self._run.log(flatten(row))

    def finish(self, failed: bool) -> None:
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown()  # at exit it would wait without a bound

    def abandon(self) -> str:
        """Ends W&B's own process, for which Python would wait at exit; it has written what it got."""
        import psutil

        found = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        for child in found:
            child.kill()
        psutil.wait_procs(found, timeout=2)
        with contextlib.suppress(Exception):  # or W&B would complain at exit that it is gone
            from wandb.sdk import wandb_setup

            wandb_setup.singleton()._connection._cleanup()  # type: ignore[union-attr, misc]
        return f"what it has not sent: {self._sync}" if self._sync else ""


# --- which ones ------------------------------------------------------------------------------------


def make_reporters(names: Sequence[str], folder: Path, *, logging_dir: str | None, run_name: str | None) -> Reporters:
    """The reporters of a run.

    Args:
        names: "tensorboard", "wandb".
        folder: the output folder.
        logging_dir: TensorBoard's; None: TENSORBOARD_LOGGING_DIR, or a new folder in `runs/` of the output folder.
        run_name: W&B's.
    """
    found: list[Backend] = []
    if "tensorboard" in names:
        given = logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR")
        fresh = folder / "runs" / f"{time.strftime('%b%d_%H-%M-%S')}_{os.uname().nodename}"
        found.append(TensorBoard(Path(os.path.expanduser(given)) if given else fresh))
    if "wandb" in names and os.environ.get("WANDB_MODE") != "disabled":
        found.append(WeightsAndBiases(folder, run_name))
    return Reporters(found)
