"""launch/evaluate.py: which model and which data are meant, and what lm-eval is handed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import evaluate


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
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PATH": ""}
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
    assert str(evaluate.locate(adapter)) == f"{adapter}/adapter (an adapter) on org/base"
    assert evaluate.locate("org/name") == evaluate.Located("org/name", None, {})
    saved = [(f"checkpoint-{step}/checkpoint.json", "{}") for step in (2, 4)]
    checkpoints = model_folder(tmp_path / "checkpoints", *saved, ("latest", "checkpoint-4"))
    assert evaluate.locate(checkpoints).checkpoint == Path(checkpoints) / "checkpoint-4"
    assert str(evaluate.locate(checkpoints)) == f"checkpoint {checkpoints}/checkpoint-4"
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
        (["--model", "x" * 300], "the name is too long"),
        (["--model", "DIR"], "holds no model, no adapter and no checkpoint"),
        (["--model", "DIR/m"], "give --tasks, or --dataset_name"),
        (["--model", "DIR/m", "--tasks", "gsm8k"], 'not installed: pip install "lm-eval[hf]"'),
        (["--model", "DIR/m", "--dataset_name", "x", "--", "--foo"], "is for lm-eval"),
        (["--model", "DIR/m", "--dataset_name", "x", "--batch_size", "0"], "--batch_size is 0: must be at least 1"),
        (["--model", "DIR/m", "--dataset_name", "x", "--batch_size", "x"], "is x: must be a number, or auto or auto:N"),
        (["--model", "DIR/m", "--tasks", "x", "--batch_size", "0"], "--batch_size is 0: must be at least 1"),
        (["--model", "DIR/m", "--tasks", "x", "--batch_size", "auto:0"], "is auto:0: must be a number, or auto or"),
        (["--model", "DIR/m", "--dataset_name", "x", "--batch_size", "auto"], "with --tasks; give a number"),
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


@pytest.mark.parametrize("size", ["auto", "auto:4", "16"])
def test_lm_eval_finds_its_batch_size(tmp_path, size):
    folder = model_folder(tmp_path, ("model/config.json", "{}"))
    args, found, request = evaluate.parse(["--model", folder, "--tasks", "gsm8k", "--batch_size", size])
    command = evaluate.lm_eval_command(args, found.folder, found.base, request.more)
    assert command[command.index("--batch_size") + 1] == size


def test_a_chat_template_that_is_gone(tmp_path):
    """Its file may have been the machine's that trained; a text, and a file that is there, are the run's own."""
    (tmp_path / "own.jinja").touch()
    gone = ["own.jinja", f"{tmp_path}/other.jinja"]
    there = [None, "tokenizer", "{{ messages }}", "{% if x %}{% endif %}", f"{tmp_path}/own.jinja"]
    assert [evaluate.is_gone(given) for given in gone + there] == [True] * 2 + [False] * 5


def test_a_comma_would_be_two_arguments(tmp_path):
    args = evaluate.EvaluateArguments(model="a,b", tasks="x")
    with pytest.raises(ConfigError, match="no comma"):
        evaluate.lm_eval_command(args, "a,b", None, [])
    adapter = evaluate.lm_eval_command(args, "adapter", "base", [])
    assert "pretrained=base,dtype=auto,peft=adapter" in adapter
    (tmp_path / "tokenizer_config.json").touch()
    adapter = evaluate.lm_eval_command(args, str(tmp_path), "base", [])
    assert f"pretrained=base,dtype=auto,peft={tmp_path},tokenizer={tmp_path}" in adapter
