"""`hdpissa evaluate`: its loss is transformers' own, its verdicts are right, and mistakes end in exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from family_runs import make_family
from launch_runs import VOCABULARY, make_inputs
from tiny import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hdpissa.launch import evaluate_model
from hdpissa.launch.common import command_line
from hdpissa.launch.common.prompts import resolve_template

CHAIN = {"ask": "####", "####": "7", "7": "<eos>", "box": r"\boxed{7}", r"\boxed{7}": "<eos>"}
CHAIN |= {"talk": "8", "8": "<end>", "<end>": "y", "y": "<eos>"}
TEMPLATE = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
TURNS = TEMPLATE.replace("' '", "' <end> '") + "{% if add_generation_prompt %}{{ 'talk ' }}{% endif %}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("evaluate"), evaluate=11)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def evaluated(folder: Path, *words: str) -> dict:
    """evaluation.json, and the rows of answers.jsonl as "answers"."""
    assert evaluate_model.main([*words, "--output_path", str(folder)]) == 0
    answers = folder / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []
    return json.loads((folder / "evaluation.json").read_text()) | {"answers": rows}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def expected_loss(folder: str, rows: list[tuple[str, str]], length: int) -> tuple[float, int]:
    """Row by row, by the loss of the model itself, in a float64 mean over (prompt, answer)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    for prompt, answer in rows:
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"][:length]])
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
        count = int((labels[:, 1:] != -100).sum())
        total += model(ids, labels=labels).loss.item() * count
        tokens += count
    return total / tokens, tokens


def test_loss_is_the_mean_over_all_target_tokens(inputs, tmp_path):
    """Of the Alpaca prompt, and of TRL's own columns; rows of unlike length in batches of four, some of them cut."""
    model, name = inputs["model_name_or_path"], inputs["eval_dataset_name"]
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    template = resolve_template("alpaca")
    pairs = [(template.render(row["instruction"]), row["response"] + "\n<eos>") for row in rows]
    found = evaluated(tmp_path / "a", "--model", model, "--dataset_name", name, "--batch_size", "4")
    loss, tokens = expected_loss(model, pairs, 512)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["eval_tokens"] == tokens
    own = [{"prompt": row["instruction"], "completion": row["response"]} for row in rows]
    name = write_rows(tmp_path / "own.jsonl", own)
    pairs = [(row["instruction"], row["response"] + "<eos>") for row in rows]
    lengths = sorted(len(AutoTokenizer.from_pretrained(model)("".join(pair))["input_ids"]) for pair in pairs)
    words = ["--dataset_name", name, "--max_length", str(lengths[5]), "--batch_size", "4"]
    found = evaluated(tmp_path / "b", "--model", model, *words)
    assert found["eval_loss"] == pytest.approx(expected_loss(model, pairs, lengths[5])[0], rel=1e-6)


def test_a_run_says_how_its_rows_are_read(inputs, tmp_path):
    """Its own evaluation rows; of another set the columns are the run's and the split is not; flags win."""
    rows = [json.loads(line) for line in Path(inputs["eval_dataset_name"]).read_text().splitlines()]
    name = write_rows(tmp_path / "q.jsonl", [{"q": row["instruction"], "a": row["response"]} for row in rows])
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(inputs["model_name_or_path"], run / "model")
    script = {"trainer": "sft", "dataset_name": name, "dataset_test_split": "train[:4]", "prompt_template": "none"}
    script |= {"prompt_field": "q", "response_field": "a", "eval_dataset_name": None}
    (run / "run.json").write_text(json.dumps({"arguments": script | {"max_length": 90}}))
    pairs = [(row["instruction"], row["response"] + "\n<eos>") for row in rows]
    folder = inputs["model_name_or_path"]
    for words, count, length in (
        ([], 4, 90),
        (["--dataset_name", name], 11, 90),
        (["--dataset_split", "train[:2]", "--max_length", "512"], 2, 512),
    ):
        found = evaluated(tmp_path / "out", "--model", str(run), *words)
        loss, tokens = expected_loss(folder, pairs[:count], length)
        assert (found["eval_tokens"], found["eval_loss"]) == (tokens, pytest.approx(loss, rel=1e-6))


# --- answers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model whose next token follows from the last one alone, by CHAIN."""
    folder = tmp_path_factory.mktemp("chain")
    words = ["<eos>", "<pad>", "<unk>", *dict.fromkeys([*CHAIN, "x"])]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<end>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    model = tiny_llama(vocab_size=len(words), hidden=20, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), 20))
        model.lm_head.weight.zero_()
        for word, follower in CHAIN.items():
            model.lm_head.weight[words.index(follower), words.index(word)] = 1
    model.save_pretrained(folder)
    return str(folder)


ASKED = {
    "instruction and response": [
        {"instruction": "x ask", "response": "#### 7"},
        {"instruction": "x y y ask", "response": "y #### 8"},
        {"instruction": "y box", "response": r"x \boxed{7}"},
        {"instruction": "y y ask", "response": r"\boxed{7}"},
    ],
    "prompt and completion": [
        {"prompt": "x ask ", "completion": "#### 7"},
        {"prompt": "x y y ask ", "completion": "y #### 8"},
        {"prompt": "y box ", "completion": r"x \boxed{7}"},
        {"prompt": "y y ask ", "completion": r"\boxed{7}"},
    ],
}
ASKED["messages"] = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (row.values() for row in ASKED["instruction and response"])
]


@pytest.mark.parametrize("format", ASKED)
def test_right_answers_are_counted(chain, tmp_path, format):
    """Whatever carries loss; prompts of unlike length in one batch."""
    words = [
        "--dataset_name",
        write_rows(tmp_path / "rows.jsonl", ASKED[format]),
        "--prompt_template",
        "{instruction} ",
    ]
    words += ["--eval_exact_match", "--completion_only_loss", "false", "--batch_size", "3", "--max_new_tokens", "5"]
    found = evaluated(tmp_path, "--model", chain, *words)
    assert [row["answer"] for row in found["answers"]] == ["#### 7", "#### 7", r"\boxed{7}", "#### 7"]
    assert [row["right"] for row in found["answers"]] == [True, False, True, False]
    assert (found["eval_exact_match"], found["eval_samples"]) == (0.5, 4)
    few = evaluated(tmp_path, "--model", chain, *words, "--eval_max_samples", "1")
    assert (few["eval_exact_match"], few["eval_samples"]) == (1, 1)


@pytest.mark.parametrize(("template", "answer"), [(TURNS, "8"), (TURNS.replace(" <end>", ""), "8 y")])
def test_an_answer_ends_with_the_turn(chain, tmp_path, template, answer):
    """Where the template ends turns with a token that is not the EOS."""
    shutil.copytree(chain, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    name = write_rows(tmp_path / "rows.jsonl", ASKED["messages"])
    found = evaluated(tmp_path, "--model", str(tmp_path / "model"), "--dataset_name", name, "--eval_exact_match")
    assert {row["answer"] for row in found["answers"]} == {answer}


def test_an_adapter_is_its_merged_model(inputs, tmp_path):
    import peft

    base, name = inputs["model_name_or_path"], inputs["eval_dataset_name"]
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "run" / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    words = ["--dataset_name", name, "--dataset_split", "train[:5]"]
    adapter, merged, plain = (
        evaluated(tmp_path, "--model", str(model), *words) for model in (tmp_path / "run", tmp_path / "merged", base)
    )
    assert adapter["eval_loss"] == pytest.approx(merged["eval_loss"], rel=1e-6)
    assert abs(plain["eval_loss"] - merged["eval_loss"]) > 1e-3
    assert (adapter["base"], merged["base"]) == (base, None)


# --- mistakes, and lm-eval -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(inputs, tmp_path_factory):
    """A folder without a model, a torn one, one with fewer tokens than its tokenizer, one of 64 positions."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "none" / "checkpoint-1").mkdir(parents=True)
    for name in ("torn", "few", "short"):
        shutil.copytree(inputs["model_name_or_path"], folder / name)
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tiny_llama(vocab_size=61, hidden=32).save_pretrained(folder / "few")
    make_family("gpt2", vocab_size=VOCABULARY, max_position_embeddings=64).save_pretrained(folder / "short")
    write_rows(folder / "text.jsonl", [{"text": "a b"}])
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--model WRONG/missing",
        "--model WRONG/none",
        "--model WRONG/torn --dataset_name ROWS",
        "--model WRONG/few --dataset_name ROWS",
        "--model WRONG/short --dataset_name ROWS",
        "--model WRONG/short --dataset_name ROWS --max_length 64 --eval_exact_match --max_new_tokens 60",
        "--model MODEL",
        "--model MODEL --dataset_name WRONG/missing.jsonl",
        "--model MODEL --dataset_name WRONG/text.jsonl --eval_exact_match",
        "--model MODEL --dataset_name ROWS --prompt_field nothing",
        "--model MODEL --dataset_name ROWS --assistant_only_loss",
        "--model MODEL --dataset_name ROWS --max_length 2",
        "--model MODEL --dataset_name ROWS --max_length 0",
        "--model MODEL --dataset_name ROWS --batch_size auto",
        "--model MODEL --dataset_name ROWS --limit 3",
        "--model MODEL --dataset_name ROWS --max_new_tokens 3",
        "--model MODEL --dataset_name ROWS --device nowhere",
        "--model MODEL --dataset_name ROWS --output_path ROWS",
        "--model MODEL --dataset_name ROWS --completion_only_loss maybe",
        "--model MODEL --dataset_name ROWS --packing",
        "--model MODEL --dataset_name ROWS -- --apply_chat_template",
        "--model MODEL --dataset_name ROWS --tasks gsm8k",
    ],
)
def test_one_line_and_exit_code_2(capsys, inputs, wrong, words):
    names = {"WRONG": str(wrong), "MODEL": inputs["model_name_or_path"], "ROWS": inputs["eval_dataset_name"]}
    for name, value in names.items():
        words = words.replace(name, value)
    assert command_line.exit_code(evaluate_model.main, words.split()) == 2
    out, err = capsys.readouterr()
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert "eval_loss" not in out


def test_what_is_handed_to_lm_eval(inputs, tmp_path):
    """A stand-in in place of lm-eval writes down what it was called with; without one the exit code is 2."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text("import json, sys; print(json.dumps(sys.argv[1:])); sys.exit(3)")
    model = inputs["model_name_or_path"]
    words = ["--model", model, "--tasks", "gsm8k,arc", "--num_fewshot", "5", "--limit", "10", "--batch_size", "auto"]
    script = [sys.executable, evaluate_model.__file__, *words, "--trust_remote_code", "--", "--apply_chat_template"]
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(script, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    options = {"--model": "hf", "--tasks": "gsm8k,arc", "--num_fewshot": "5", "--limit": "10.0", "--batch_size": "auto"}
    assert told[-1] == "--apply_chat_template"
    assert dict(zip(told[:-1:2], told[1:-1:2], strict=True)) == options | {
        "--model_args": f"pretrained={model},dtype=auto,trust_remote_code=True"
    }


@pytest.mark.skipif("evaluate_model.importlib.util.find_spec('lm_eval')", reason="lm-eval is installed")
def test_without_lm_eval(inputs):
    words = ["--model", inputs["model_name_or_path"], "--tasks", "gsm8k"]
    assert command_line.exit_code(evaluate_model.main, words) == 2
