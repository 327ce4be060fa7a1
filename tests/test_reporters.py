"""engine/reporters.py: rows on their way to TensorBoard and W&B; nothing that happens there reaches training."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
from reporter_runs import silent_server

from hdpissa.engine import reporters
from hdpissa.engine.reporters import Reporters, WeightsAndBiases, choose_mode, flatten, is_reachable
from hdpissa.launch import options_reporting, train_arguments

ROWS = [
    {"step": 0, "eval_loss": 3.0, "perplexity": 20.1, "eval_tokens": 7},
    {"step": 1, "epoch": 0.5, "loss": 2.5, "mfu": None, "refusal": "", "applied": True, "learning_rate": 1e-3},
    {"step": 1, "slice_grad_norms": [1.0, 2.0], "slice_delta_norms": [0.5, None], "bf16_moved": 0.25},
    {"step": 2, "integrity": "passed", "tensors": 3, "delta_norms": [1.0]},
]


def test_names_are_those_of_the_trainer():
    """transformers' own rule for the names, where it has one."""
    from transformers.integrations.integration_utils import rewrite_logs

    for row in ({"eval_loss": 1.0}, {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "epoch": 0.5}):
        assert flatten(row) == rewrite_logs(row)
    assert flatten(ROWS[0]) == {"train/global_step": 0, "eval/loss": 3.0, "eval/perplexity": 20.1, "eval/tokens": 7}
    wanted = {"slices/slice_grad_norms/0": 1.0, "slices/slice_grad_norms/1": 2.0, "slices/slice_delta_norms/0": 0.5}
    assert flatten(ROWS[2]) == {"train/global_step": 1, "slices/bf16_moved": 0.25} | wanted
    assert flatten(ROWS[1]).keys() == {"train/global_step", "train/epoch", "train/loss", "train/applied"} | {
        "train/learning_rate"
    }


# --- a backend that fails, or hangs ----------------------------------------------------------------


class Fake:
    """Does nothing, but what a test makes of it."""

    name = "fake"

    def __init__(self, **does):
        self.rows, self.ended = [], []
        for method, action in does.items():
            setattr(self, method, action)

    def start(self):
        return "fake is open"

    def describe(self, content):
        self.rows.append(content)

    def row(self, row):
        self.rows.append(row)

    def finish(self, failed):
        self.ended.append(failed)

    def abandon(self):
        return "look in the attic"


def run(backend, rows=ROWS, *, failed=False):
    """(what was said, seconds that `row` and `close` took)."""
    said, all_of_it = [], Reporters([backend])
    all_of_it.start(said.append)
    begun = time.monotonic()
    all_of_it.describe({"path": Path("x")})
    for row in rows:
        all_of_it.row(row)
    sent = time.monotonic() - begun
    all_of_it.close(failed=failed)
    return said, sent, time.monotonic() - begun


@pytest.mark.parametrize("failed", [False, True])
def test_everything_arrives_in_order(failed):
    backend = Fake()
    said, *_ = run(backend, failed=failed)
    assert backend.rows == [{"path": "x"}, *ROWS]
    assert (said, backend.ended) == (["fake is open"], [failed])


def broken(*_):
    raise ValueError("no\nway")


@pytest.mark.parametrize("method", ["start", "describe", "row", "finish"])
def test_an_exception_is_one_warning_and_the_end_of_the_backend(method):
    said, *_ = run(Fake(**{method: broken}), ROWS * 3)
    assert [line for line in said if "warning" in line] == [
        "warning: fake gets no more reports (ValueError: no way); metrics.jsonl has everything"
    ]


@pytest.mark.parametrize("method", ["start", "row", "finish"])
def test_what_hangs_is_left_behind(method, monkeypatch):
    monkeypatch.setattr(reporters, "FINISH_S", 0.3)
    hang = threading.Event()
    said, sent, closed = run(Fake(**{method: lambda *_: hang.wait(20) and ""}), ROWS * 100)
    hang.set()
    assert sent < 0.2
    assert 0.3 <= closed < 5
    assert said[-1] == "warning: fake did not finish within 0 s and is left behind; look in the attic"


def test_a_full_queue_does_not_wait(monkeypatch):
    monkeypatch.setattr(reporters, "MOST_WAITING", 2)
    gate = threading.Event()
    backend = Fake(start=lambda: gate.wait(20) and "")
    all_of_it, said = Reporters([backend]), []
    all_of_it.start(said.append)
    for row in ROWS:
        all_of_it.row(row)
    gate.set()
    all_of_it.close(failed=False)
    assert backend.rows == ROWS[:2]
    assert said == ["warning: 2 rows did not reach fake; metrics.jsonl has all"]


# --- online or offline -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "key", "answers", "mode", "words"),
    [
        ("offline", True, True, "offline", "WANDB_MODE=offline"),
        ("", False, True, "offline", "wandb login"),
        ("online", False, True, "offline", "wandb login"),
        ("", True, False, "offline", "W does not answer within 3 s"),
        ("", True, True, "online", ""),
    ],
)
def test_the_mode_is_decided_once(wanted, key, answers, mode, words):
    found, why = choose_mode(wanted, key, lambda: answers, "W")
    assert found == mode
    assert words in why


def http(status):
    return f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def test_reachability_is_known_soon(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(reporters, "REACH_S", 0.5)
    for answer, reachable in ((http(200), True), (http(404), True), (http(503), False), (b"", False)):
        with silent_server(answer=answer) as url:
            begun = time.monotonic()
            assert is_reachable(url) is reachable, answer
            assert time.monotonic() - begun < 2
    assert is_reachable("http://127.0.0.1:9") is False


# --- the real ones ---------------------------------------------------------------------------------


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """As on a machine where nobody has logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_NAME", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_PROJECT", "molehills")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")


@pytest.mark.slow
@pytest.mark.parametrize("hangs", ["from the start", "at the end"])
def test_wandb_itself_hangs(tmp_path, no_account, monkeypatch, hangs):
    """A server that answers the first question and no other; W&B's own process stopped by a signal."""
    import psutil

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with silent_server(answer=http(200)) as url:
        if hangs == "from the start":
            monkeypatch.setenv("WANDB_BASE_URL", url)
            said, sent, closed = run(WeightsAndBiases(tmp_path, None))
            assert closed < reporters.FINISH_S + 10
        else:
            monkeypatch.setenv("WANDB_MODE", "offline")
            monkeypatch.setattr(reporters, "FINISH_S", 4)
            backend = WeightsAndBiases(tmp_path, None)
            all_of_it, said = Reporters([backend]), []
            all_of_it.start(said.append)
            while not said:
                time.sleep(0.1)
            (core,) = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
            core.suspend()
            begun = time.monotonic()
            for row in ROWS * 100:
                all_of_it.row(row)
            sent = time.monotonic() - begun
            all_of_it.close(failed=False)
            assert not core.is_running()
            assert "wandb sync" in said[-1]
    assert sent < 0.5
    assert not math.isnan(sent)


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, []),
        (["none"], []),
        (["tensorboard"], ["tensorboard"]),
        (["wandb", "tensorboard"], ["tensorboard", "wandb"]),
        (["wandb,tensorboard"], ["tensorboard", "wandb"]),
        (["all"], ["tensorboard", "wandb"]),
    ],
)
def test_report_to(given, meant):
    assert options_reporting.reporters(train_arguments.TrainArguments(report_to=given)) == meant


def test_disabled_means_disabled(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said = []
    made = reporters.make_reporters(["wandb"], tmp_path, logging_dir=None, run_name=None)
    made.start(said.append)
    made.close(failed=False)
    assert (said, list(tmp_path.iterdir())) == ([], [])
