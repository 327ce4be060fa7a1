"""Evaluation: right answers, the best checkpoint, an early end; and one run with all of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from launch_runs import flags, make_inputs, read_json, read_metrics, train_here
from ranks import run_ranks
from test_reporters import assert_history, numbers, silent_server
from wandb_file import described, offline_run

from hdpissa.engine import folders
from hdpissa.engine.answers import extract, is_right, style_of
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.generation import questions
from hdpissa.launch import evaluate, train_arguments
from hdpissa.launch.train_evaluation import Best, Evaluation, best_home

# --- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\boxed{\dfrac{1}{2}}", True),
        (r"so \boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{1} then \boxed{2}", r"\boxed{2}", True),  # the last one counts
        (r"\boxed{\{1, 2\}}", r"thus \boxed{\{1,2\}}", True),
        (r"it is 2", r"\boxed{2}", False),
        (r"\boxed{2", r"\boxed{2}", False),
        (r"\boxed{1,234}", r"\boxed{1234}", True),
        (r"\boxed{(1,2)}", r"\boxed{(12)}", False),
        (r"\boxed{10\%}", r"\boxed{10}", True),
        ("#### 18\nThe answer is: 18", "9 * 2 = 18\n#### 18\nThe answer is: 18", True),
        ("The answer is: 18", "#### 18", False),
        ("first 3, so the answer is: 18.", "The answer is: 18", True),
        ("The answer is 17", "The answer is: 18", False),
        ("3 apples and 4 pears make 7", "7", True),
        ("7 is what 3 and 4 make", "7", False),
        ("about -1,234.50 dollars", "-1234.5", True),
        ("1/2", "0.5", True),
        ("no number", "7", False),
        ("", "7", False),
    ],
)
def test_an_answer_is_judged_by_the_style_of_the_reference(answer, reference, right):
    assert is_right(answer, reference) is right


@pytest.mark.parametrize(
    ("text", "style", "result"),
    [
        (r"\boxed{x^{2}}", "boxed", "x^{2}"),
        ("a\n#### $1,000.\nb", "mark", "1000"),
        ("The answer is: 3 m", "said", "3 m"),
        ("it makes 12.", "number", "12"),
        ("yes ", "text", "yes"),
        ("####", "mark", ""),
    ],
)
def test_styles(text, style, result):
    assert (style_of(text), extract(text)) == (style, result)


class Words:
    """A tokenizer of numbers."""

    eos_token_id = 9

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if i != self.eos_token_id)


def test_questions_are_what_comes_before_the_last_answer():
    rows = [
        ([1, 2, 3, 9], [-100, -100, 3, 9]),
        ([1, 2, 3, 4, 9], [-100, 2, -100, 4, 9]),  # the second turn of two
        ([1, 2], [1, 2]),  # nothing but an answer
        ([1, 2, 3, 4, 5], [-100, 2, 3, 4, 5]),  # cut
        ([1, 2, 3], [-100, 2, 3]),
    ]
    table = datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    found = questions(table, Words(), max_length=5)
    assert [(q.ids, q.text, q.reference) for q in found] == [
        ([1, 2], "1 2", "3"),
        ([1, 2, 3], "1 2 3", "4"),
        ([1], "1", "2 3"),
    ]
    assert questions(table, Words(), limit=1) == found[:1]


# --- the best evaluation ---------------------------------------------------------------------------


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


def parsed(tmp_path, **more):
    required = dict.fromkeys(("ds_config", "model_name_or_path", "dataset_name"), "x") | {"output_dir": str(tmp_path)}
    return train_arguments.parse(flags(required | more))[0]


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


# --- one run with all of it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


def arguments(inputs, output, **changes):
    """The loss falls, and what is asked for is a large one: the first evaluation is the best, the run ends early."""
    chosen = {**inputs, "output_dir": str(output), "max_steps": 12, "learning_rate": 0.01, "warmup_ratio": 0}
    chosen |= {"per_device_train_batch_size": 2, "max_length": 128, "prompt_template": "none"}
    chosen |= {"lr_scheduler_type": "constant", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    chosen |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "eval_on_start": False}
    chosen |= {"metric_for_best_model": "eval_loss", "greater_is_better": "True"}
    chosen |= {"eval_exact_match": True, "eval_max_samples": 3, "max_new_tokens": 3, "disable_tqdm": True}
    chosen |= {"sample_steps": 3, "num_samples": 2, "slice_metrics_steps": 2, "integrity_steps": 3}
    chosen |= {"logging_steps": 2, "logging_first_step": True, "run_name": "all of it"}
    return chosen | changes


def train_with_reports(argv, cache, url):
    """With an account of W&B's, whose server does not answer."""
    import os

    os.environ.update(WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=url, WANDB_PROJECT="molehills")
    os.environ.update(WANDB_X_DISABLE_STATS="true", NO_PROXY="127.0.0.1")
    for name in ("WANDB_MODE", "WANDB_NAME", "WANDB_DIR"):
        os.environ.pop(name, None)
    return train_here([*argv, "--report_to", "tensorboard", "wandb"], cache)


@pytest.fixture(scope="module")
def whole(folder, inputs):
    output = folder / "whole"
    with silent_server() as url:
        results = run_ranks(2, train_with_reports, flags(arguments(inputs, output)), str(folder / "cache"), url)
    assert [(r["code"], r["error"]) for r in results] == [(0, None)] * 2, results
    return output


def rows_of(output, name="metrics.jsonl"):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def test_the_run_ends_early_and_exports_the_best(whole, capsys):
    steps, evaluations = read_metrics(whole)
    losses = {row["step"]: row["eval_loss"] for row in evaluations}
    best = max(losses, key=losses.get)
    assert (best, list(losses)) == (2, [2, 4, 6])  # no evaluation before training, two more after the best
    state = read_json(whole / "run_state.json")
    assert (state["state"], state["step"]) == ("finished", max(losses))
    assert (state["best_metric"], state["best_global_step"]) == (losses[best], best)
    assert state["best_model_checkpoint"] == str(whole / f"checkpoint-{best}")
    assert (whole / "best").read_text() == f"checkpoint-{best}\n"
    kept = sorted(path.name for path in whole.glob("checkpoint-*"))
    assert kept == sorted(f"checkpoint-{step}" for step in (best, max(losses)))
    assert steps[-1]["step"] == max(losses)
    # the exported model is that of the best evaluation, by launch/evaluate.py, which reads the data as the run did
    evaluate.main(["--model", str(whole), "--eval_exact_match", "--eval_max_samples", "3", "--max_new_tokens", "3"])
    told = capsys.readouterr().out.splitlines()[-1].split()
    figures = dict(zip(told[::2], map(float, told[1::2]), strict=True))
    assert figures["loss"] == pytest.approx(losses[best], rel=1e-5)
    row = next(row for row in evaluations if row["step"] == best)
    assert (figures["exact_match"], figures["samples"]) == (row["eval_exact_match"], 3)
    assert figures["tokens"] == row["eval_tokens"]


def test_rows_of_all_kinds(whole):
    rows = rows_of(whole)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps[:3] == [1, 2, 4]
    looks = [row for row in rows if "slice_grad_norms" in row]
    assert [row["step"] for row in looks] == list(range(2, steps[-1] + 1, 2))
    norms = {row["step"]: row["grad_norm"] for row in rows if "loss" in row}
    for row in looks:
        assert len(row["slice_grad_norms"]) == len(row["slice_delta_norms"]) == 2
        assert math.hypot(*row["slice_grad_norms"]) == pytest.approx(norms[row["step"]], rel=1e-6)
        assert min(row["slice_delta_norms"]) > 0
        assert 0.5 < row["bf16_moved"] < 1  # at this learning rate
    assert [row["step"] for row in rows if "integrity" in row] == list(range(3, steps[-1] + 1, 3))
    samples = rows_of(whole, "samples.jsonl")
    best = read_json(whole / "run_state.json")["best_global_step"]
    asked = [row["step"] for row in samples]
    assert asked == sorted([*range(0, steps[-1] + 1, 3)] * 2) + [best] * 2
    assert all(set(row) == {"step", "prompt", "answer", "reference"} for row in samples)
    assert "#### " in samples[0]["reference"]


def test_tensorboard_and_wandb_have_every_row(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = rows_of(whole)
    assert_history(whole, rows)
    assert offline_run(whole).parent.name.startswith("offline-run-")
    project, name, config = described(offline_run(whole))
    assert (project, name, config["total_steps"]) == ("molehills", "all of it", 12)
    (event_file,) = (whole / "runs").rglob("events*")
    events = EventAccumulator(str(event_file), size_guidance={"scalars": 0}).Reload()
    found = {(e.step, tag.split("/", 1)[1]): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    wanted = {(row["step"], k.removeprefix("eval_")): v for row in rows for k, v in numbers(row).items()}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_resumed_run_knows_what_was_best(whole, folder, inputs):
    """From the best checkpoint, in a folder of its own: no evaluation is better, and the run ends where it did."""
    best = read_json(whole / "run_state.json")["best_global_step"]
    more = {"resume_from_checkpoint": str(whole / f"checkpoint-{best}"), "sample_prompt": "How many?", "num_samples": 1}
    output = folder / "resumed"
    results = run_ranks(2, train_here, flags(arguments(inputs, output, **more)), str(folder / "cache"))
    assert [(r["code"], r["error"]) for r in results] == [(0, None)] * 2, results
    then, now = read_json(whole / "run_state.json"), read_json(output / "run_state.json")
    assert now == then
    later = [row for row in read_metrics(whole)[1] if row["step"] > best]
    assert read_metrics(output)[1] == later
    assert read_json(output / "model" / "hdpissa_export.json")["step"] == best
    models = [(f / "model" / "model.safetensors").read_bytes() for f in (whole, output)]
    assert models[0] == models[1]
    assert not list(output.rglob("*.wandb"))
    samples = rows_of(output, "samples.jsonl")
    assert {row["prompt"] for row in samples} == {"How many?"}
    assert read_json(output / "sample_after_training.json")["answer"] == samples[-1]["answer"]


# --- launch/evaluate.py ----------------------------------------------------------------------------


def test_what_is_handed_to_lm_eval(tmp_path):
    """A stand-in in place of lm-eval writes down what it was called with, by a real process."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    (tmp_path / "site" / "lm_eval").mkdir(parents=True)
    (tmp_path / "site" / "lm_eval" / "__init__.py").touch()
    (tmp_path / "site" / "evaluate.py").write_text("pypi = True\n")
    (tmp_path / "site" / "lm_eval" / "__main__.py").write_text(
        "import evaluate, json, sys; assert evaluate.pypi; print(json.dumps(sys.argv[1:])); sys.exit(3)\n"
    )
    words = ["--model", str(tmp_path / "run"), "--tasks", "gsm8k,arc", "--num_fewshot", "5", "--limit", "10"]
    words += ["--batch_size", "4", "--device", "cpu", "--output_path", "out", "--trust_remote_code"]
    script = Path(evaluate.__file__)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, str(script), *words, "--", "--apply_chat_template"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    options = {"--model": "hf", "--tasks": "gsm8k,arc", "--num_fewshot": "5", "--limit": "10.0", "--batch_size": "4"}
    options |= {"--model_args": f"pretrained={tmp_path / 'run' / 'model'},dtype=auto,trust_remote_code=True"}
    options |= {"--device": "cpu", "--output_path": "out"}
    told = json.loads(done.stdout)
    assert told[-1] == "--apply_chat_template"
    assert dict(zip(told[:-1:2], told[1:-1:2], strict=True)) == options
    # a script of launch/ that imports PyPI's `evaluate` gets that, although a file there has its name
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import evaluate; assert evaluate.pypi"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def model_folder(tmp_path, *files):
    for name, text in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return str(tmp_path)


ADAPTER = ("adapter/adapter_config.json", '{"base_model_name_or_path": "org/base"}')
RUN = ("run.json", json.dumps({"arguments": {"dataset_name": "a", "eval_split": "train[80:]", "max_length": 7}}))


def test_which_model_is_meant(tmp_path):
    both = model_folder(tmp_path / "both", ("model/config.json", "{}"), ADAPTER, RUN)
    assert evaluate.locate(both).folder == f"{both}/model"
    assert evaluate.locate(f"{both}/model").run["max_length"] == 7
    adapter = model_folder(tmp_path / "adapter", ADAPTER)
    assert evaluate.locate(adapter) == evaluate.Located(f"{adapter}/adapter", "org/base", {})
    assert evaluate.locate("org/name") == evaluate.Located("org/name", None, {})
    saved = [(f"checkpoint-{step}/checkpoint.json", "{}") for step in (2, 4)]
    checkpoints = model_folder(tmp_path / "checkpoints", *saved, ("latest", "checkpoint-4"))
    assert evaluate.locate(checkpoints).checkpoint == Path(checkpoints) / "checkpoint-4"
    (Path(checkpoints) / "best").write_text("checkpoint-2\n")
    assert evaluate.locate(checkpoints).checkpoint == Path(checkpoints) / "checkpoint-2"


def test_data_are_read_as_the_run_did(tmp_path):
    folder = model_folder(tmp_path, ("model/config.json", "{}"), RUN)
    args, *_ = evaluate.parse(["--model", folder])
    assert (args.dataset_name, args.dataset_split, args.max_length) == ("a", "train[80:]", 7)
    args, *_ = evaluate.parse(["--model", folder, "--dataset_name", "b", "--max_length", "9"])
    assert (args.dataset_name, args.dataset_split, args.max_length) == ("b", "train", 9)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "missing --model"),
        (["--model", "DIR/none"], "no such folder"),
        (["--model", "DIR"], "holds no model, no adapter and no checkpoint"),
        (["--model", "DIR/m"], "give --tasks, or --dataset_name"),
        (["--model", "DIR/m", "--tasks", "gsm8k"], 'not installed: pip install "lm-eval[hf]"'),
        (["--model", "DIR/m", "--dataset_name", "x", "--", "--foo"], "is for lm-eval"),
        (["--model", "DIR/m", "--dataset_name", "x", "--batch_size", "0"], "--batch_size is 0: must be at least 1"),
        (["--model", "DIR/m", "--tsks", "x"], "did you mean --tasks?"),
    ],
)
def test_bad_input_of_evaluate(tmp_path, words, told):
    if evaluate.importlib.util.find_spec("lm_eval") and "--tasks" in words:
        pytest.skip("lm-eval is installed")
    model_folder(tmp_path, ("m/config.json", "{}"))
    with pytest.raises(ConfigError) as error:
        evaluate.main([word.replace("DIR", str(tmp_path)) for word in words])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_comma_would_be_two_arguments(tmp_path):
    args = evaluate.EvaluateArguments(model="a,b", tasks="x")
    with pytest.raises(ConfigError, match="no comma"):
        evaluate.lm_eval_command(args, "a,b", None, [])
    adapter = evaluate.lm_eval_command(args, "adapter", "base", [])
    assert "pretrained=base,dtype=auto,peft=adapter" in adapter


def test_rows_to_evaluate_on_are_needed():
    from hdpissa.launch.train_questions import read_questions

    nothing = SimpleNamespace(held_out=None)
    for name, value in {"eval_exact_match": True, "sample_steps": 2, "early_stopping_patience": 1}.items():
        args = train_arguments.TrainArguments(**{name: value})
        with pytest.raises(ConfigError, match=f"--{name} needs evaluation rows"):
            read_questions(args, None, nothing)
    plain = SimpleNamespace(dataset=datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]))
    answers_only = SimpleNamespace(held_out=plain)
    for name, value in {"eval_exact_match": True, "sample_steps": 2}.items():
        with pytest.raises(ConfigError, match="no evaluation row has a prompt"):
            read_questions(train_arguments.TrainArguments(**{name: value}), Words(), answers_only)
