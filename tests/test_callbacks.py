"""Callbacks: called in the Trainer's order, and what one rank's wants all ranks do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from launch_runs import make_inputs, parsed, read_json, read_metrics, small_run, train_ranks
from transformers import EarlyStoppingCallback

from hdpissa.launch import train_arguments, train_callbacks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("callbacks")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


def arguments(inputs, output, **changes):
    chosen = {"max_steps": 8, "learning_rate": 3e-3, "warmup_steps": 2, "gradient_accumulation_steps": 2}
    return small_run(inputs, output, **chosen | changes)


CALLBACK = """
import json, os, pathlib
from transformers import TrainerCallback

class Tell(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs): ...

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step == 2
        control.should_evaluate = state.global_step == 3
        if int(os.environ["RANK"]) == 1 and state.global_step == 4:  # one rank wants it
            control.should_save = True
        self.note("on_step_end", state)

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4 and int(os.environ["RANK"]) == 1
        self.note("on_save", state)

    def on_train_end(self, args, state, control, **kwargs):
        self.note("on_train_end", state)
        path = pathlib.Path(args.output_dir) / f"seen_{os.environ['RANK']}.json"
        path.write_text(json.dumps({"seen": self.seen, "tokens": state.num_input_tokens_seen}))

    def on_log(self, args, state, control, logs, **kwargs):
        self.note("on_log", state, *sorted(logs.keys() & {"loss", "eval_loss"}))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert kwargs["model"] is kwargs["engine"].module and kwargs["processing_class"] is not None
        assert kwargs["optimizer"] is kwargs["engine"].optimizer and kwargs["lr_scheduler"] is not None
        self.note("on_evaluate", state, *sorted(metrics))

    def on_train_begin(self, args, state, control, **kwargs):
        assert (state.max_steps, args.max_steps, state.is_world_process_zero) == (8, 8, os.environ["RANK"] == "0")
        self.note("on_train_begin", state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.note("on_epoch_begin", state)

    def on_step_begin(self, args, state, control, **kwargs):
        self.note("on_step_begin", state)

    def note(self, event, state, *more):
        self.seen.append([event, state.global_step, *more])
"""


@pytest.fixture(scope="module")
def called(folder, inputs):
    """Two ranks with a callback of which one rank's differs."""
    (folder / "tell.py").write_text(CALLBACK)
    more = {"callbacks": f"{folder}/tell.py:Tell", "export_format": "none", "save_steps": 100}
    train_ranks(2, arguments(inputs, folder / "called", **more), folder / "cache", timeout=120)
    return folder / "called"


def test_what_one_rank_wants_all_do(called):
    """Rows, evaluation, a checkpoint and the end are where the callback wants them, and the run is a finished one."""
    steps, evaluations = read_metrics(called)
    assert [row["step"] for row in steps] == [2]
    assert [row["step"] for row in evaluations] == [0, 3, 4]
    assert [path.name for path in called.glob("checkpoint-*")] == ["checkpoint-4"]
    assert read_json(called / "run_state.json") == {"state": "finished", "step": 4, "message": ""}


def test_the_order_of_events(called):
    metrics = ["eval_loss", "eval_perplexity", "eval_tokens", "perplexity", "step"]
    evaluated = [[["on_log", step, "eval_loss"], ["on_evaluate", step, *metrics]] for step in (0, 3, 4)]
    ours = [["on_train_begin", 0], *evaluated[0], ["on_epoch_begin", 0], ["on_step_begin", 0], ["on_step_end", 1]]
    ours += [["on_step_begin", 1], ["on_step_end", 2], ["on_log", 2, "loss"], ["on_step_begin", 2], ["on_step_end", 3]]
    ours += [*evaluated[1], ["on_step_begin", 3], ["on_step_end", 4], ["on_save", 4], *evaluated[2]]
    ours += [["on_train_end", 4]]
    seen = [read_json(called / f"seen_{rank}.json") for rank in (0, 1)]
    assert seen[0]["seen"] == ours
    assert seen[0] == seen[1]
    assert seen[0]["tokens"] > 0


def test_events_that_do_not_exist_here(folder, called):
    del called
    callbacks = train_callbacks.load([f"{folder}/tell.py:Tell"])
    engine = SimpleNamespace(module=None, optimizer=None, global_steps=0)
    job = SimpleNamespace(
        data=SimpleNamespace(steps_per_epoch=4), tokenizer=None, total_steps=8, plan=SimpleNamespace(rank=0)
    )
    args = train_arguments.TrainArguments(max_steps=8)
    made = train_callbacks.Callbacks(callbacks, args, job, engine=engine, scheduler=None)
    assert made.never_called() == ["Tell.on_pre_optimizer_step"]


@pytest.mark.parametrize(("metric", "values"), [(None, [0.9, 0.5, 0.6]), ("exact_match", [0.1, 0.5, 0.4])])
def test_early_stopping_of_transformers_has_the_defaults(monkeypatch, metric, values):
    """As after Trainer's own arguments have filled them in: which metric, and whether more of it is better."""
    monkeypatch.setattr(train_callbacks.Callbacks, "_agree", lambda self: None)  # with other ranks
    engine = SimpleNamespace(module=None, optimizer=None, global_steps=0)
    data, plan = SimpleNamespace(steps_per_epoch=4), SimpleNamespace(rank=0)
    job = SimpleNamespace(data=data, tokenizer=None, total_steps=8, plan=plan)
    args = parsed(eval_steps=1, **({"metric_for_best_model": metric, "eval_exact_match": True} if metric else {}))
    callback = EarlyStoppingCallback(early_stopping_patience=1)
    callbacks = train_callbacks.Callbacks([callback], args, job, engine=engine, scheduler=None)
    callbacks.train_begin()
    stops = []
    for step, value in enumerate(values, 1):
        best = SimpleNamespace(value=value if step < 3 else values[1], step=min(step, 2))
        callbacks.evaluate({"eval_loss": value, "eval_exact_match": value, "step": step}, best)
        stops.append(callbacks.should_stop())
    assert stops == [False, False, True]


LATE = """
from transformers import EarlyStoppingCallback, TrainerCallback

class SaveWhenAsked(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        control.should_save = state.global_step == 2

class Stop(EarlyStoppingCallback):
    def __init__(self):
        super().__init__(early_stopping_patience=2)
"""


def test_what_is_wanted_after_an_evaluation(folder, inputs):
    """A checkpoint that nothing else asks for; the end by transformers' early stopping, which a larger loss pleases."""
    (folder / "late.py").write_text(LATE)
    more = {"callbacks": [f"{folder}/late.py:{name}" for name in ("SaveWhenAsked", "Stop")], "export_format": "none"}
    more |= {"save_steps": 100, "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": "True"}
    more |= {"learning_rate": 0.01, "warmup_ratio": 0, "load_best_model_at_end": True, "save_strategy": "best"}
    train_ranks(1, arguments(inputs, folder / "late", **more), folder / "cache")
    _, evaluations = read_metrics(folder / "late")
    losses = [row["eval_loss"] for row in evaluations if row["step"]]
    assert losses[0] > max(losses[1:])
    assert len(losses) == 3  # the best one, and two without improvement
    assert {path.name for path in (folder / "late").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_a_file_may_have_dataclasses_with_postponed_annotations(tmp_path):
    """`dataclasses` looks the module up in sys.modules."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from transformers import TrainerCallback\n"
        "@dataclass\nclass Counts:\n    steps: int = 0\n"
        "class Mine(TrainerCallback):\n    counts = Counts()\n"
    )
    [found] = train_callbacks.load([f"{file}:Mine"])
    assert found.counts.steps == 0
