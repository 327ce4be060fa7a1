"""launch/evaluate.py's options, and train.py's on evaluation and logging that no run of test_evaluation.py holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch_runs import make_inputs, parsed
from safetensors.torch import save_file
from tiny import tiny_llama
from transformers import AutoTokenizer

from hdpissa.engine.display import Display
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.evaluate import first_sample
from hdpissa.engine.prompts import resolve_template
from hdpissa.launch import command_line, evaluate, options_evaluation, train_checkpoints, train_evaluation

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and eight rows in three shapes."""
    folder = tmp_path_factory.mktemp("inputs")
    made = make_inputs(folder)
    rows = [json.loads(line) for line in Path(made["eval_dataset_name"]).read_text().splitlines()][:8]
    shapes = {
        "rows": [{"instruction": r["instruction"], "response": r["response"]} for r in rows],
        "other": [{"q": r["instruction"], "a": r["response"]} for r in rows],
        "both": [{"instruction": r["instruction"], "response": r["response"], "text": r["response"]} for r in rows],
        "texts": [{"body": r["response"]} for r in rows],
        "chats": [
            {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": "Yes."}]}
            for r in rows
        ],
    }
    for name, content in shapes.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    tokenizer = AutoTokenizer.from_pretrained(made["model_name_or_path"])
    template = resolve_template("alpaca")
    lengths = sorted(
        len(tokenizer(template.render(r["instruction"]) + r["response"] + "\n" + tokenizer.eos_token)["input_ids"])
        for r in rows
    )
    files = {name: str(folder / f"{name}.jsonl") for name in shapes}
    return files | {"model": made["model_name_or_path"], "middle": str(lengths[len(lengths) // 2])}


def figures(capsys, inputs, *words: str, data: str = "rows") -> dict[str, float]:
    """What evaluate.py prints."""
    evaluate.main(["--model", inputs["model"], "--dataset_name", inputs[data], *words])
    lines = capsys.readouterr().out.splitlines()
    told = " ".join(lines[next(i for i, line in enumerate(lines) if line.startswith("loss ")) :]).split()
    return dict(zip(told[::2], map(float, told[1::2]), strict=True))


@pytest.mark.parametrize(
    ("words", "fewer"),
    [
        (["--dataset_split", "train[:3]"], True),
        (["--max_length", "MIDDLE"], True),
        (["--max_length", "MIDDLE", "--truncation", "drop"], True),
        (["--train_on_prompt"], False),
        (["--completion_only_loss", "false"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_which_tokens_count(capsys, inputs, words, fewer):
    """Each option changes the number of target tokens, in its direction; cut rows are not dropped ones."""
    words = [inputs["middle"] if word == "MIDDLE" else word for word in words]
    plain, found = figures(capsys, inputs), figures(capsys, inputs, *words)
    assert found["tokens"] < plain["tokens"] if fewer else found["tokens"] > plain["tokens"]
    if "drop" in words:
        assert found["tokens"] != figures(capsys, inputs, *words[:2])["tokens"]


def test_templates_and_columns(capsys, inputs):
    plain = figures(capsys, inputs)
    assert figures(capsys, inputs, "--prompt_template", "none")["loss"] != plain["loss"]
    assert figures(capsys, inputs, "--prompt_field", "q", "--response_field", "a", data="other") == plain
    texts = figures(capsys, inputs, "--dataset_format", "text", data="both")
    assert texts == figures(capsys, inputs, "--dataset_text_field", "body", "--dataset_format", "text", data="texts")
    assert texts["tokens"] != plain["tokens"]  # of a text everything counts but the first token
    chat = figures(capsys, inputs, "--chat_template", CHAT, data="chats")
    everything = figures(capsys, inputs, "--chat_template", CHAT, "--assistant_only_loss", "false", data="chats")
    assert everything["tokens"] > chat["tokens"]


def test_rows_are_asked_where_prompts_carry_loss_too(capsys, inputs, tmp_path):
    words = ["--eval_exact_match", "--eval_max_samples", "2", "--max_new_tokens", "2", "--output_path", str(tmp_path)]
    assert figures(capsys, inputs, *words, "--train_on_prompt")["samples"] == 2
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(answer["prompt"].endswith("### Response:") for answer in answers)


def test_answers_end_where_the_chat_template_ends_a_turn(capsys, inputs):
    words = ["--model", inputs["model"], "--dataset_name", inputs["chats"], "--chat_template"]
    for template, told in ((CHAT.replace("eos", "pad"), True), (CHAT, False)):
        evaluate.main([*words, template])
        assert ("answers end at <pad>, too: the chat template's end of turn\n" in capsys.readouterr().out) is told


def test_what_reaches_the_reader(monkeypatch, inputs):
    """The hub cannot be asked here: what it would be asked for."""
    from hdpissa.engine import data, data_sources

    asked = []
    load, encode = data_sources.load_rows, data.encode_rows
    monkeypatch.setattr(
        data_sources, "load_rows", lambda name, **how: asked.append(how) or load(inputs["rows"], split="train[:2]")
    )
    monkeypatch.setattr(
        data, "encode_rows", lambda *args, num_proc: asked.append({"num_proc": num_proc}) or encode(*args)
    )
    words = ["--dataset_config", "main", "--dataset_revision", "v1", "--preprocessing_num_workers", "3"]
    evaluate.main(["--model", inputs["model"], "--dataset_name", "org/name", *words])
    assert (asked[0]["config_name"], asked[0]["revision"], asked[1]["num_proc"]) == ("main", "v1", 3)


def test_answers_and_results(capsys, inputs, tmp_path):
    words = ["--eval_exact_match", "--eval_max_samples", "2", "--max_new_tokens", "2", "--output_path", str(tmp_path)]
    found = figures(capsys, inputs, *words, "--batch_size", "3", "--device", "cpu")
    assert found["samples"] == 2
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    assert [len(tokenizer(answer["answer"])["input_ids"]) <= 2 for answer in answers] == [True, True]
    assert all(answer["prompt"].endswith("### Response:") for answer in answers)
    assert json.loads((tmp_path / "evaluation.json").read_text())["eval_loss"] == pytest.approx(found["loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="--device cuda:7: cannot be used here"):
        figures(capsys, inputs, "--device", "cuda:7")


def make_wrong_models(right: Path, folder: Path) -> None:
    """Everything that a case of `WRONG` calls "DIR/…"."""
    for name in ("cut", "lfs", "sizes", "few", "mute"):
        shutil.copytree(right, folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (folder / "mute" / "tokenizer.json").write_text('{"model": {}}')
    config = json.loads((right / "config.json").read_text())
    (folder / "sizes" / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    tiny_llama(vocab_size=61, hidden=32).save_pretrained(folder / "few")
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(right)}
    for name, content in {"bare": adapter, "torn": adapter, "odd": adapter | {"r": "x"}, "lost": {}}.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(content))
        for path in right.glob("token*"):
            shutil.copyfile(path, folder / name / path.name)
    for name in ("torn", "odd"):
        (folder / name / "adapter_model.safetensors").write_text("{}")
    save_file({}, folder / "odd" / "adapter_model.safetensors")
    (folder / "file").touch()


WRONG = [
    (["--device", "foo"], "--device foo: cannot be used here"),
    (["--limit", "10"], "--limit is lm-eval's, with --tasks; of a dataset take a part, as in --dataset_split"),
    (["--num_fewshot", "5"], "--num_fewshot is lm-eval's"),
    (["--eval_max_samples", "5"], "--eval_max_samples without --eval_exact_match: nothing is asked"),
    (["--max_new_tokens", "5"], "--max_new_tokens without --eval_exact_match: nothing is asked"),
    (["--tasks", "gsm8k"], "--dataset_name is of a dataset, and with --tasks lm-eval reads its own"),
    (["--device", "meta"], "--device meta: cannot be used here"),
    (["--output_path", "DIR/file"], "--output_path DIR/file: DIR/file is a file; give a folder"),
    (["--output_path", "DIR/file/under"], "DIR/file is a file; give a folder"),
    (["--model", "DIR/cut"], "no sound safetensors file"),
    (["--model", "DIR/lfs"], "no sound safetensors file"),
    (["--model", "DIR/sizes"], "--model DIR/sizes: DIR/sizes cannot be loaded"),
    (["--model", "DIR/few"], "but the model has 61 embeddings"),
    (["--model", "DIR/mute"], "--model DIR/mute: no usable tokenizer there"),
    (["--model", "DIR/bare"], "DIR/bare holds no adapter_model.safetensors"),
    (["--model", "DIR/torn"], "no sound safetensors file"),
    (["--model", "DIR/odd"], "--model DIR/odd: DIR/odd cannot be loaded"),
    (["--model", "DIR/lost"], "names no base_model_name_or_path"),
]


@pytest.fixture(scope="module")
def wrong(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    make_wrong_models(Path(inputs["model"]), folder)
    return folder


@pytest.mark.parametrize(("words", "told"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_one_line_and_exit_code_2(capsys, inputs, wrong, words, told):
    """Nothing is printed that could be taken for a figure, and device and folder are looked at before the rows."""
    given = {"--model": inputs["model"], "--dataset_name": inputs["rows"]} | dict(
        zip(words[::2], words[1::2], strict=True)
    )
    argv = [word.replace("DIR", str(wrong)) for pair in given.items() for word in pair]
    assert command_line.exit_code(evaluate.main, argv) == 2
    out, err = capsys.readouterr()
    (said,) = [line.replace(str(wrong), "DIR") for line in err.splitlines() if line.startswith("error: ")]
    assert told in said
    assert "tokens" not in out
    assert not ("--model" not in words and out), "rows were read before"


def test_figures_are_told_although_they_cannot_be_kept(capsys, inputs, tmp_path):
    (tmp_path / "evaluation.json").mkdir()
    argv = ["--model", inputs["model"], "--dataset_name", inputs["rows"], "--output_path", str(tmp_path)]
    assert command_line.exit_code(evaluate.main, argv) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("loss ")
    assert f"error: --output_path {tmp_path}: cannot be written (Is a directory)" in err


def test_batches_are_of_that_size(monkeypatch, capsys, inputs):
    from hdpissa.engine import batches

    sizes, collate = [], batches.collate
    monkeypatch.setattr(batches, "collate", lambda rows, pad: sizes.append(len(rows)) or collate(rows, pad))
    figures(capsys, inputs, "--batch_size", "3")
    assert max(sizes) == 3


def test_training_options_are_unknown_here(inputs):
    """evaluate.py takes what it reads, and nothing that it would pass over."""
    for word in ("--packing", "--streaming", "--preview", "--loss_normalization", "--group_by_length"):
        with pytest.raises(ConfigError, match=f"unknown argument {word}"):
            evaluate.parse(["--model", inputs["model"], "--dataset_name", inputs["rows"], word, "1"])


# --- train.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        ({"eval_steps": 4}, [4, 8]),
        ({"eval_strategy": "epoch"}, [5, 10]),
        ({"eval_strategy": "epoch", "eval_steps": 4}, [5, 10]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 9]),
        ({"eval_strategy": "no"}, []),
    ],
    ids=str,
)
def test_when_it_evaluates(tmp_path, options, steps):
    """Of twelve steps, five to an epoch; the last evaluation is made after training."""
    args = parsed(tmp_path, **options)
    best = train_evaluation.make_best(args, None)
    recorder = SimpleNamespace(best=lambda found: None)
    evaluation = train_evaluation.Evaluation(args, None, recorder, SimpleNamespace(best=best), 5)
    assert [step for step in range(1, 13) if evaluation.due(step, 12)] == steps


def test_saving_the_best_only(tmp_path):
    """Due is what was just found to be the best, and nothing else."""
    args = parsed(tmp_path, save_strategy="best", eval_steps=2)
    assert options_evaluation.needs_best(args)
    data = SimpleNamespace(steps_per_epoch=3, micro_batch_size=1, micro_batches_per_slice=1, identity=dict)
    job = SimpleNamespace(data=data, total_steps=8, plan=SimpleNamespace(rank=0, slices=1))
    job.rows = SimpleNamespace(stops=[], template=SimpleNamespace(text="{instruction}"))
    checkpoints = train_checkpoints.Checkpoints(args, job, None, None)
    checkpoints.best.see(2, 1.0)
    assert [step for step in range(1, 9) if checkpoints.due(step)] == [2]
    checkpoints.best.see(4, 2.0)
    checkpoints.best.see(6, 0.5)
    assert [step for step in range(1, 9) if checkpoints.due(step)] == [6]


def test_patience_threshold_and_metric(tmp_path):
    best = train_evaluation.make_best(
        parsed(
            tmp_path, eval_steps=1, early_stopping_patience=3, early_stopping_threshold=0.5,
            metric_for_best_model="perplexity", greater_is_better="true",
        ),
        None,
    )  # fmt: skip
    assert (best.patience, best.threshold, best.metric, best.greater) == (3, 0.5, "perplexity", True)


@pytest.mark.parametrize("bar", [True, False])
def test_a_bar_on_a_terminal_unless_it_is_disabled(monkeypatch, tmp_path, bar):
    assert parsed(tmp_path, **({} if bar else {"disable_tqdm": True})).disable_tqdm is not bar
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    assert Display(total_steps=3, quiet=False, bar=bar)._plain is not bar


def test_patience_with_silent_slices(monkeypatch):
    """What `test_slice_figures.test_silence` shows of the number is shown of the option's."""
    from hdpissa.engine import slice_figures
    from hdpissa.launch.train_guard import Guard

    seen = []
    monkeypatch.setattr(slice_figures, "SliceFigures", lambda optimizer, **how: seen.append(how))
    engine = SimpleNamespace(plan=None, module=None, optimizer=None, global_steps=7)
    Guard(engine, parsed(slice_metrics_steps=2, silent_slice_steps=4))
    assert seen == [{"every": 2, "patience": 4, "start": 7}]


def test_where_tensorboard_writes(tmp_path):
    from hdpissa.engine.reporters import make_reporters

    args = parsed(tmp_path, logging_dir=str(tmp_path / "events"), report_to="tensorboard")
    made = make_reporters(args.report_to, tmp_path / "out", logging_dir=args.logging_dir, run_name=None)
    made.start(lambda text: None)
    made.row({"step": 1, "loss": 2.0})
    made.close(failed=False)
    assert list((tmp_path / "events").glob("events.out.tfevents*"))
    assert not (tmp_path / "out").exists()


def test_what_the_terminal_shows_of_samples():
    rows = [{"prompt": "### Instruction:\nHow\n\nmany?\n### Response:", "answer": "2 of\nthem\n"}, {}]
    assert first_sample(rows, "after step 3").splitlines() == [
        "answer after step 3 (1 of 2; all are in samples.jsonl):",
        "    > How",
        "    > many?",
        "    > ### Response:",
        "    2 of",
        "    them",
    ]
    assert first_sample([{"prompt": "so " * 99, "answer": ""}], "before training").endswith("so so …")
