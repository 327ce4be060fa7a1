"""launch/train.py: its defaults, its refusals, its exit codes, and what a run leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import script_runs
import torch
import yaml
from launch_runs import (
    command,
    finish,
    flags,
    listing,
    read_json,
    read_metrics,
    save_model,
    start,
    train_here,
    write_ds_config,
)
from ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, rows of instructions, and a JSON that leaves all to the command line."""
    from hdpissa.launch.demo_data import generate, write

    folder = tmp_path_factory.mktemp("inputs")
    rows = generate(40, seed=3)
    write(folder / "train.jsonl", rows[:32])
    write(folder / "eval.jsonl", rows[32:])
    save_model(folder / "model", [text for row in rows for text in row.values()])
    return {
        "ds_config": str(write_ds_config(folder / "ds.json", hd_pissa={})),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl"),
        "r": 4,
    }


def test_defaults_are_those_of_the_docs(inputs, tmp_path):
    table = re.search(r"<!-- defaults of the script -->\n(.*?)\n\n", (ROOT / "docs/training.md").read_text(), re.S)[1]
    documented = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, re.M))
    assert len(documented) > 8
    argv = flags({**inputs, "output_dir": str(tmp_path)})
    (found,) = run_ranks(1, script_runs.values, argv, list(documented), str(tmp_path))
    assert {name: str(found[name]) for name in documented} == documented


def test_the_json_wins_over_defaults_and_flags_fill_it(inputs, tmp_path):
    more: dict = {"bf16": {"enabled": True}, "gradient_clipping": 1.0}
    more["hd_pissa"] = {"slices": "auto", "init": {"placement": "round_robin"}}
    config = write_ds_config(tmp_path / "ds.json", **more)
    argv = flags({**inputs, "ds_config": str(config), "output_dir": str(tmp_path), "slices": 2, "init_tol": 1e-3})
    argv += ["--target_modules", "q_proj,v_proj", "--rank_pattern", '{"q_proj": 2}']
    (found,) = run_ranks(1, script_runs.values, argv, ["bf16", "max_grad_norm"], str(tmp_path))
    assert (found["bf16"], found["max_grad_norm"]) == (True, 1.0)
    section = {"slices": 2, "init": {"placement": "round_robin", "tol": 1e-3}, "target_modules": ["q_proj", "v_proj"]}
    assert found["section"] == section | {"rank_pattern": {"q_proj": 2}, "r": 4}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe, inputs, tmp_path):
    argv = [str(recipe), *flags({**inputs, "output_dir": str(tmp_path), "preview": 2})]
    content = yaml.safe_load(recipe.read_text())
    names = ["max_length", "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps"]
    (found,) = run_ranks(1, script_runs.values, argv, names, str(tmp_path))
    assert {name: found[name] for name in names} == {name: content[name] for name in names}


def test_dpo_precomputes_where_the_reference_does_not_fit(inputs, tmp_path):
    argv = flags({**inputs, "trainer": "dpo", "output_dir": str(tmp_path)})
    found = run_ranks(2, script_runs.reference_choices, argv, str(tmp_path))
    assert found == [[False, True, False, False, False]] * 2


def test_the_tokens_are_as_published(inputs):
    rows, texts, prompts = script_runs.encoded(inputs["model_name_or_path"])
    assert rows["input_ids"] == texts
    masked = [[-100] * len(prompt) + ids[len(prompt) :] for prompt, ids in zip(prompts, texts, strict=True)]
    assert rows["labels"] == masked


def test_mistakes_are_one_line_and_cost_nothing(inputs, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "run.json").write_text("{}")
    (tmp_path / "broken.json").write_text('{"zero_optimization": {"stage": 3}')
    (tmp_path / "clip.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "hd_pissa": {}}')
    (tmp_path / "run.yaml").write_text("learning_rat: 1e-4\n")
    cases = {
        "learning_rat": {"learning_rat": 1e-4},
        "run.yaml": {"config": str(tmp_path / "run.yaml"), "learning_rat": None},
        "num_train_epochs": {"num_train_epochs": "two"},
        "hd_pissa.r": {"r": 0},
        "broken.json": {"ds_config": str(tmp_path / "broken.json")},
        "max_grad_norm": {"ds_config": str(tmp_path / "clip.json"), "max_grad_norm": 0.5},
        "zero4": {"ds_config": "zero4"},
        "nowhere.jsonl": {"dataset_name": "nowhere.jsonl"},
        "quest": {"prompt_field": "quest"},
        "run.json": {"output_dir": str(used)},
        "w_proj": {"target_modules": "w_proj"},
        "eval_steps": {"eval_steps": 5},
        "reward_funcs": {"trainer": "grpo", "reward_funcs": "nothing.here"},
        "trainer": {"trainer": "ppo"},
    }
    before = listing(str(used))
    lines = [{**inputs, "output_dir": str(tmp_path / "new"), **changes} for changes in cases.values()]
    argvs = [flags({k: v for k, v in line.items() if v is not None}) for line in lines]
    (found,) = run_ranks(1, script_runs.refusals, argvs, str(tmp_path / "cache"))
    told = dict(zip(cases, found, strict=True))
    assert {name: result["code"] for name, result in told.items()} == dict.fromkeys(cases, 2)
    for name, result in told.items():
        errors = [line for line in result["stderr"].splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result
        assert "Traceback" not in result["stderr"]
        assert name.removesuffix(".yaml") in errors[0] or name == "run.yaml", errors
    assert listing(str(used)) == before


def test_a_run_under_the_deepspeed_launcher(inputs, tmp_path):
    """Two ranks, both exports, evaluation and samples before and after; the export loads and answers as trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "run"
    given = {**inputs, "output_dir": str(output), "eval_dataset_name": inputs["dataset_name"].replace("train", "eval")}
    given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    given |= {"export_format": "both", "sample_prompt": "2 + 3?", "max_new_tokens": 4, "save_strategy": "no"}
    log = tmp_path / "log"
    assert finish(start(command("deepspeed", given), tmp_path / "cache", log)) == 0, log.read_text()
    steps, evaluations = read_metrics(output)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in evaluations] == [0, 4]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert read_json(output / "run_state.json")["state"] == "finished"
    assert read_json(output / "run.json")["arguments"]["dataset_name"] == inputs["dataset_name"]
    after = read_json(output / "sample_after_training.json")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    ids = tokenizer(after["prompt"], return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == after["answer"]
    for name in ("model/README.md", "adapter/README.md", "adapter/adapter_config.json", "adapter/tokenizer.json"):
        assert (output / name).is_file(), name
    assert "learning_rate" in (output / "model/README.md").read_text()


def test_sigterm_is_143_and_auto_goes_on(inputs, tmp_path):
    output = tmp_path / "run"
    given = {**inputs, "output_dir": str(output), "max_steps": 2000, "export_format": "none"}
    (found,) = run_ranks(1, script_runs.stopped, flags(given), str(tmp_path / "cache"), str(output))
    assert (found["code"], found["error"]) == (143, None), found
    state = read_json(output / "run_state.json")
    assert state["state"] == "preempted"
    assert (output / f"checkpoint-{state['step']}").is_dir()
    more = {"max_steps": state["step"] + 1, "resume_from_checkpoint": "auto"}
    (found,) = run_ranks(1, train_here, flags({**given, **more}), str(tmp_path / "cache"))
    assert (found["code"], found["error"]) == (0, None), found
    assert [row["step"] for row in read_metrics(output)[0]] == list(range(1, state["step"] + 2))


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_conversations_by_each_trainer(kind, inputs, tmp_path):
    """A chat template: its end of turn is in what is exported."""
    from transformers import AutoTokenizer, GenerationConfig

    model = tmp_path / "model"
    for path in Path(inputs["model_name_or_path"]).iterdir():
        (model / path.name).parent.mkdir(exist_ok=True)
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}"
    tokenizer.save_pretrained(model)
    asked, good, bad = ([{"role": role, "content": text}] for role, text in
                        (("user", "2 + 3?"), ("assistant", "5"), ("assistant", "6")))  # fmt: skip
    row = {
        "sft": {"messages": asked + good},
        "dpo": {"prompt": asked, "chosen": good, "rejected": bad},
        "grpo": {"prompt": asked},
    }[kind]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    given = {**inputs, "model_name_or_path": str(model), "dataset_name": str(tmp_path / "rows.jsonl"), "trainer": kind}
    given |= {"output_dir": str(tmp_path / "run"), "max_steps": 1, "save_strategy": "no"}
    if kind == "grpo":
        given |= {"reward_funcs": "script_runs.short", "num_generations": 2, "max_completion_length": 4}
        given |= {"per_device_train_batch_size": 2}
    (found,) = run_ranks(1, train_here, flags(given), str(tmp_path / "cache"))
    assert (found["code"], found["error"]) == (0, None), found
    stops = GenerationConfig.from_pretrained(tmp_path / "run/model").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<pad>") in stops
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").chat_template == tokenizer.chat_template


def test_preview_trains_nothing(inputs, tmp_path):
    given = {**inputs, "output_dir": str(tmp_path / "run"), "preview": 3, "prompt_template": "none"}
    ((code, shown),) = run_ranks(1, script_runs.printed, flags(given), str(tmp_path / "cache"))
    assert code == 0
    assert len(re.findall("^--- row", shown, re.M)) == 3
    assert len(re.findall("⟪[^⟫]+<eos>⟫", shown)) == 3
    assert not (tmp_path / "run").exists()
