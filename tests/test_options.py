"""Options that no other test holds: each is given, and what it changes is looked at, in one process for all.

`options_held.py` says which test holds which option.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launch_runs import flags, make_inputs, read_json, train_here, write_ds_config
from option_runs import look, sections, train_and_record, who_decomposes
from ranks import run_ranks
from safetensors.torch import load_file

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import demo_model, plan

# A DeepSpeed config that says all that the command line could say, too, and what it comes to.
BY_JSON = {
    "train_micro_batch_size_per_gpu": 3, "train_batch_size": 12, "gradient_clipping": 0.5, "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.125}},
}  # fmt: skip
AGREED = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "learning_rate": 0.125,
    "bf16": True,
}  # fmt: skip

# A model whose class comes with the checkpoint: what --trust_remote_code is for.
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def inputs(folder):
    made = make_inputs(folder / "inputs", train=32, evaluate=10)
    return made | {"output_dir": str(folder / "out"), "prompt_template": "none", "max_length": 96, "max_steps": 1}


def with_own_code(folder, model):
    shutil.copytree(model, folder)
    (folder / "code_of_it.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_llama", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "code_of_it.MyConfig", "AutoModelForCausalLM": "code_of_it.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def with_two_configurations(folder, rows):
    """A dataset as the hub has them: a README whose head names the configurations and their files."""
    folder.mkdir()
    for name, some in (("short", rows[:4]), ("long", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("short", "long"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    return str(folder)


@pytest.fixture(scope="module")
def seen(folder, inputs):
    rows = [json.loads(line) for line in (folder / "inputs" / "train.jsonl").read_text().splitlines()]
    renamed = folder / "renamed.jsonl"
    renamed.write_text("".join(json.dumps({"q": r["instruction"], "a": r["response"]}) + "\n" for r in rows))
    own_code = with_own_code(folder / "own_code", inputs["model_name_or_path"])
    two = with_two_configurations(folder / "two", rows)
    without = {"eval_dataset_name": None}
    by_json = folder / "all.json"
    by_json.write_text(json.dumps(json.loads(Path(inputs["ds_config"]).read_text()) | BY_JSON))
    cases = {
        "plain": {},
        "renamed": {"dataset_name": renamed, "prompt_field": "q", "response_field": "a", **without},
        "swapped": {"prompt_field": "response", "response_field": "instruction", "max_length": 250},
        "split": {"dataset_split": "train[:8]", **without},
        "eval_split": {"eval_split": "train[:5]", **without},
        "eval_split_of_another": {"eval_split": "train[:5]"},
        "short": {"dataset_name": two, "dataset_config": "short", **without},
        "long": {"dataset_name": two, "dataset_config": "long", **without},
        "template": {"prompt_template": "Q: {instruction} A:", "sample_prompt": "one?", "max_new_tokens": 7},
        "cut": {"max_length": 64},
        "workers": {"preprocessing_num_workers": 2, "max_length": 95},
        "seed": {"seed": 7},
        "batch": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
        "epochs": {"max_steps": -1, "num_train_epochs": 0.5},
        "eval batch": {"per_device_eval_batch_size": 3},
        "clipping": {"max_grad_norm": 0.5, "learning_rate": 0.25, "bf16": True},
        "by the json": {"ds_config": str(by_json)},
        "distrusted": {"model_name_or_path": own_code},
        "trusted": {"model_name_or_path": own_code, "trust_remote_code": True},
        "attention": {"attn_implementation": "eager"},
    }
    lines = {name: flags({k: v for k, v in (inputs | more).items() if v is not None}) for name, more in cases.items()}
    return run_ranks(1, look, lines, str(folder / "cache"))[0]


def test_columns(seen):
    assert [seen[name]["error"] for name in ("plain", "renamed", "swapped")] == [None] * 3
    assert seen["renamed"]["data"] == seen["plain"]["data"] != seen["swapped"]["data"]


def test_splits_and_configurations(seen):
    rows = {name: seen[name]["rows"] for name in ("plain", "split", "short", "long")}
    assert rows == {"plain": 32, "split": 8, "short": 4, "long": 32}
    held_out = {name: seen[name]["held_out"] for name in ("plain", "split", "eval_split", "eval_split_of_another")}
    assert held_out == {"plain": 10, "split": None, "eval_split": 5, "eval_split_of_another": 5}


def test_prompts_and_lengths(seen):
    assert seen["template"]["first"].startswith("Q: ")
    assert " A:" in seen["template"]["first"]
    assert (seen["template"]["prompt"], seen["template"]["max_new_tokens"]) == ("Q: one? A:", 7)
    assert (seen["plain"]["prompt"], seen["plain"]["max_new_tokens"]) == (None, 128)
    assert seen["cut"]["longest"] == 64 < seen["plain"]["longest"] <= 96


def test_workers(seen):
    assert (seen["workers"]["workers"], seen["plain"]["workers"]) == (2, None)


def test_batches_and_steps(seen):
    assert not torch.equal(seen["seed"]["batch"], seen["plain"]["batch"])
    assert (len(seen["batch"]["batch"]), len(seen["plain"]["batch"])) == (3, 1)
    assert seen["batch"]["ds"]["train_batch_size"] == 15
    assert (seen["epochs"]["total_steps"], seen["plain"]["total_steps"]) == (16, 1)
    assert (seen["eval batch"]["eval_batches"], seen["plain"]["eval_batches"]) == (4, 2)


def test_what_goes_into_the_json(seen):
    ds = seen["clipping"]["ds"]
    assert (ds["gradient_clipping"], ds["bf16"]["enabled"]) == (0.5, True)
    assert (seen["plain"]["ds"]["gradient_clipping"], seen["plain"]["ds"]["bf16"]["enabled"]) == (0.0, False)
    assert ds["optimizer"]["params"]["lr"] == 0.25


def test_what_the_json_says_is_what_is_recorded(seen):
    """run.json, checkpoints, callbacks and the model card have the values of the run, not defaults of the command."""
    assert seen["by the json"]["agreed"] == AGREED
    assert seen["plain"]["agreed"]["bf16"] is False


def test_code_of_the_model(seen):
    assert "trust_remote_code" in seen["distrusted"]["error"]
    assert seen["trusted"]["error"] is None


# --- what is saved ---------------------------------------------------------------------------------


def test_saving_and_export(folder, inputs, tmp_path):
    """Small checkpoints in the background, one kept, a model in fp32 although bf16 was computed, eager attention."""
    chosen = inputs | {"output_dir": str(tmp_path / "out"), "max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    chosen |= {"checkpoint_kind": "small", "async_save": True, "bf16": True, "export_dtype": "fp32"}
    chosen |= {"attn_implementation": "eager", "gradient_checkpointing": True, "save_strategy": "steps"}
    (done,) = run_ranks(1, train_and_record, flags(chosen), str(folder / "cache"))
    assert (done["code"], done["error"]) == (0, None), done["stderr"]
    assert done["saves"] == [{"kind": "small", "async_save": True, "save_total_limit": 1, "best": False}] * 3
    assert done["models"] == [("eager", True)] * 3
    out = tmp_path / "out"
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not list((out / "checkpoint-3").glob("weights-*"))  # the small kind has none
    assert {t.dtype for t in load_file(out / "model" / "model.safetensors").values()} == {torch.float32}
    again = chosen | {"overwrite_output_dir": True, "save_strategy": "no", "export_format": "none", "max_steps": 2}
    (done,) = run_ranks(1, train_here, flags(again), str(folder / "cache"))
    assert (done["code"], done["error"]) == (0, None), done["stderr"]
    assert not list(out.glob("checkpoint-*"))
    assert read_json(out / "run_state.json")["step"] == 2


# --- the section hd_pissa --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines():
    return run_ranks(
        1,
        sections,
        {
            "plain": {"slices": 1},
            "buckets": {"slices": 1, "delta": {"bucket_bytes": 1}},
            "dense": {"slices": 1, "delta": {"exchange": "dense"}},
            "fp32 master": {"slices": 1, "master": {"format": "fp32"}},
            "master on the host": {"slices": 1, "master": {"device": "cpu"}},
            "torch kernels": {"slices": 1, "kernels": {"impl": "torch", "linear": "separate"}},
            "no method": {"slices": 1, "init": {"method": "gram", "tol": 1e-30}},
        },
    )[0]


def test_section_keys_reach_the_engine(engines):
    plain = engines["plain"]
    assert (plain["buckets"], engines["buckets"]["buckets"]) == (1, 14)
    assert (plain["kinds"], engines["dense"]["kinds"]) == ({"factor"}, {"dense"})
    assert engines["fp32 master"]["memory"]["master"] == 2 * plain["memory"]["master"]
    assert (plain["master"], engines["master on the host"]["master"]) == ({"auto"}, {"cpu"})
    assert (plain["kernels"], engines["torch kernels"]["kernels"]) == (("auto", "auto"), ("torch", "separate"))


def test_method_and_tolerance(engines):
    """A tolerance that no method reaches is refused with the method's name; the default finds another method."""
    assert "init.method 'gram'" in engines["no method"]["error"]
    assert "tol is 1.0e-30" in engines["no method"]["error"]


def test_placement():
    """All 14 matrices on rank 0, or half of them on each."""
    assert run_ranks(2, who_decomposes, ["rank0", "round_robin"]) == [[14, 7], [0, 7]]


# --- the other commands ----------------------------------------------------------------------------


def planned(capsys, model, *words):
    plan.main(["--model_name_or_path", str(model), "--gpus", "2", "--json", *map(str, words)])
    return json.loads(capsys.readouterr().out)["run"]


def test_plan(capsys, inputs, tmp_path):
    """Each option of plan.py in the run that it describes."""
    model = inputs["model_name_or_path"]
    changes = {
        ("--gpus_per_node", 1): ("nodes", 2),
        ("--r", 4): ("r", 4),
        ("--max_length", 64): ("max_length", 64),
        ("--per_device_train_batch_size", 3): ("per_device_train_batch_size", 3),
        ("--gradient_accumulation_steps", 5): ("gradient_accumulation_steps", 5),
        ("--gradient_checkpointing",): ("gradient_checkpointing", True),
        ("--offload_param",): ("offload_param", True),
        ("--master_format", "fp32"): ("master_format", "fp32"),
    }
    before = planned(capsys, model, "--r", 2)
    for words, (key, value) in changes.items():
        found = planned(capsys, model, *(() if words[0] == "--r" else ("--r", 2)), *words)
        assert (found[key], before[key] == value) == (value, False), words
    ds = write_ds_config(tmp_path / "ds.json", train_micro_batch_size_per_gpu=7)
    for name in ("--deepspeed", "--deepspeed_config"):
        assert planned(capsys, model, name, ds)["per_device_train_batch_size"] == 7
    found = planned(capsys, model, "--ds_config", ds, "--bf16", "false")
    assert (found["compute_dtype"], before["compute_dtype"]) == ("fp32", "bf16")
    own_code = with_own_code(tmp_path / "own_code", model)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        planned(capsys, own_code, "--r", 2)
    assert planned(capsys, own_code, "--r", 2, "--trust_remote_code")["r"] == 2


def test_demo_model_goes_where_it_is_told(monkeypatch, capsys):
    monkeypatch.setattr(demo_model, "ensure_demo_model", lambda folder: f"made in {folder}")
    monkeypatch.setattr(sys, "argv", ["demo_model.py", "--output_dir", "there"])
    assert demo_model.main() == 0
    assert capsys.readouterr().out == "made in there\n"
