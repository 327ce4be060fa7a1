"""Which evaluation was the best, when no better one is waited for, and the options on that which do not go together."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from launch_runs import parsed

from hdpissa.engine import folders
from hdpissa.engine.errors import ConfigError
from hdpissa.launch import train_arguments
from hdpissa.launch.train_evaluation import Best, Evaluation, best_home


@pytest.mark.parametrize(
    ("values", "options", "best", "stopped"),
    [
        ([3, 2, 1], {}, (3, 1), None),
        ([3, 1, 2], {}, (2, 1), None),
        ([3, 1, 2], {"greater": True}, (1, 3), None),
        ([3, 1, 2, 2, 0], {"patience": 2}, (2, 1), 4),
        ([3, 2.9, 2.8, 2.7], {"patience": 2, "threshold": 0.5}, (3, 2.8), 3),
        ([math.nan, math.nan, 1], {"patience": 3}, (3, 1), None),
        ([1, math.nan, math.inf], {"patience": 2}, (1, 1), 3),
    ],
)
def test_best(values, options, best, stopped):
    """Evaluations at step 1, 2, …: (step, value) of the best one, and where the run ends; the same after a resume."""
    found = Best("eval_loss", **({"greater": False} | options))
    for step, value in enumerate(values, 1):
        again = Best("eval_loss", **({"greater": False} | options))
        again.resume(json.loads(json.dumps(found.state())))
        found = again
        found.see(step, value)
        found.see(step, -1000)  # a step is seen once
        if found.stops:
            break
    assert (found.step, found.value) == best
    assert (found.seen if found.stops else None) == stopped


def test_only_what_has_a_checkpoint_can_be_the_best():
    best = Best("eval_loss", greater=False)
    for step, (value, keepable) in enumerate([(3, True), (1, False), (2, True)], 1):
        best.see(step, value, keepable=keepable)
    assert (best.step, best.value) == (3, 2)


def test_patience_looks_at_all_evaluations():
    """Those without a checkpoint, too: a run that gets worse between two saves has not improved."""
    best = Best("eval_loss", greater=False, patience=3)
    for step, value in enumerate([1.0, 0.9, 0.95, 0.97, 0.99], 1):
        assert not best.stops
        best.see(step, value, keepable=step == 1)
    assert best.stops
    assert (best.step, best.value, best.reached) == (1, 1.0, 0.9)


def test_the_best_of_another_folder_is_found_again(tmp_path):
    """Of a run that goes on from a run that has gone on from the one with the best checkpoint."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    best = Best("eval_loss", greater=False, value=1.0, step=5)
    for reader_folder, own in ((first, second), (second, third)):
        reader = SimpleNamespace(folder=reader_folder / "checkpoint-20")
        again = Best("eval_loss", greater=False)
        again.resume(json.loads(json.dumps(best.state())))
        assert best_home(SimpleNamespace(output_dir=str(own)), reader, again) == first
        best = again


def test_an_evaluation_that_was_missed_is_made_up_for(tmp_path):
    """A run that was asked to stop saves at once; what was due then is evaluated when it goes on."""
    args = parsed(tmp_path, eval_steps=2)
    for seen, start, missed in ((0, 4, True), (4, 4, False), (2, 3, False), (0, 0, False), (2, 12, False)):
        checkpoints = SimpleNamespace(best=Best("eval_loss", greater=False, seen=seen))
        evaluation = Evaluation(args, None, SimpleNamespace(best=lambda found: None), checkpoints, 100)
        assert evaluation.missed(start, 12) == missed, (seen, start)


def test_a_state_of_another_metric_is_left_alone():
    best = Best("perplexity", greater=False)
    best.resume(Best("eval_loss", greater=False, value=1.0, step=4).state())
    assert best.step is None


def test_the_best_checkpoint_is_never_too_old(tmp_path):
    from hdpissa.engine.checkpoint_format import MANIFEST

    for step in (1, 2, 3, 4):
        partial = tmp_path / f".checkpoint-{step}.partial"
        partial.mkdir()
        (partial / MANIFEST).write_text("{}")
        folders.publish(partial, tmp_path / f"checkpoint-{step}", best=step == 2)
        folders.retire(tmp_path / f"checkpoint-{step}", keep=1)
    assert [f.name for f in folders.by_step(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    assert (folders.best(tmp_path), folders.latest(tmp_path)) == ("checkpoint-2", "checkpoint-4")
    folders.point_to_best(tmp_path, None)
    assert folders.best(tmp_path) is None


# --- options ---------------------------------------------------------------------------------------

STEPS_EACH = {"eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": True, **STEPS_EACH},
        {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 4},
        {"load_best_model_at_end": True, "eval_steps": 4, "save_steps": 2},
        {"load_best_model_at_end": True, "eval_steps": 3, "save_strategy": "best"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"early_stopping_patience": 1, "eval_strategy": "epoch"},
        {"metric_for_best_model": "eval_exact_match", "eval_exact_match": True},
    ],
)
def test_what_fits_together(tmp_path, options):
    assert parsed(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_strategy": "often"}, "--eval_strategy is often: must be one of steps, epoch, no"),
        ({"eval_strategy": "steps"}, "--eval_steps 0: must be at least 1"),
        ({"load_best_model_at_end": True}, "must have some; give --eval_steps, or --eval_strategy epoch"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "--early_stopping_patience compares evaluations"),
        ({"save_strategy": "best"}, "--save_strategy best compares evaluations"),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 2}, "one must be a multiple of the other"),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_strategy": "epoch"}, "must be the same"),
        ({"load_best_model_at_end": True, "checkpoint_kind": "small", **STEPS_EACH}, "must be full"),
        ({"metric_for_best_model": "bleu"}, "must be one of loss, perplexity, exact_match"),
        ({"metric_for_best_model": "exact_match"}, "give --eval_exact_match"),
        ({"early_stopping_patience": -1}, "--early_stopping_patience is -1: must not be negative"),
        ({"early_stopping_threshold": -1}, "--early_stopping_threshold is -1.0: must not be negative"),
        ({"eval_max_samples": 0}, "--eval_max_samples is 0: must be at least 1"),
        ({"num_samples": 0}, "--num_samples is 0: must be at least 1"),
        ({"sample_steps": -1}, "--sample_steps is -1: must not be negative"),
        ({"slice_metrics_steps": -1}, "--slice_metrics_steps is -1: must not be negative"),
        ({"silent_slice_steps": 0}, "--silent_slice_steps is 0: must be at least 1"),
        ({"report_to": "mlflow"}, "--report_to is mlflow: must be one of none, all, tensorboard, wandb"),
        ({"report_to": "none,wandb"}, "none stands alone"),
    ],
)
def test_what_does_not(tmp_path, options, words):
    with pytest.raises(ConfigError) as told:
        parsed(tmp_path, **options)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "greater"),
    [({}, False), ({"metric_for_best_model": "perplexity"}, False), ({"greater_is_better": "True"}, True)],
)
def test_greater_is_better(tmp_path, options, greater):
    from hdpissa.launch.train_evaluation import make_best

    assert make_best(parsed(tmp_path, **options), None).greater is greater


def test_lists_in_yaml(tmp_path):
    """One text, or a list; `no` is a word there, too."""
    path = tmp_path / "run.yaml"
    required = "ds_config: x\nmodel_name_or_path: x\ndataset_name: x\noutput_dir: x\neval_strategy: no\n"
    path.write_text(required + "sample_prompt: What?\nreport_to: [wandb, tensorboard]\n")
    args, _ = train_arguments.parse(["--config", str(path)])
    assert (args.sample_prompt, args.report_to, args.eval_strategy) == (["What?"], ["wandb", "tensorboard"], "no")
