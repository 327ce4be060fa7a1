"""What a person can get wrong, in each command: one line on standard error, exit code 2, and nothing is lost.

train.py's cases run in one process in which no weight can be read; those of the other commands by `cli.main`.
"""

from __future__ import annotations

import json
import shutil

import pytest
import script_runs
from launch_runs import flags, listing, make_inputs, write_ds_config
from ranks import run_ranks

from hdpissa.launch import cli

# What replaces arguments of a run that would be fine; "DIR" is the folder of all files, None leaves one out.
TRAIN = {
    "unknown option": {"learning_rte": "1e-4"},
    "required options left out": {"ds_config": None, "dataset_name": None},
    "a word for a number": {"max_steps": "many"},
    "a schedule that is none": {"lr_scheduler_type": "cosin"},
    "a rank without an adapter": {"export_rank": 8},
    "no such YAML": {"config": "DIR/none.yaml"},
    "YAML that is a list": {"config": "DIR/list.yaml"},
    "broken YAML": {"config": "DIR/broken.yaml"},
    "unknown key in YAML": {"config": "DIR/key.yaml"},
    "no such JSON": {"ds_config": "DIR/none.json"},
    "broken JSON": {"ds_config": "DIR/broken.json"},
    "a key twice": {"ds_config": "DIR/twice.json"},
    "ZeRO stage 2": {"ds": {"zero_optimization": {"stage": 2}}},
    "fp16": {"ds": {"fp16": {"enabled": True}}},
    "another optimizer": {"ds": {"optimizer": {"type": "Lion", "params": {}}}},
    "JSON and command line differ": {"ds": {"gradient_clipping": 0.5}, "max_grad_norm": 1.0},
    "misspelt key": {"ds": {"hd_pissa": {"target_module": ["q_proj"]}}},
    "rank of 0": {"ds": {"hd_pissa": {"r": 0}}},
    "targets that are not there": {"ds": {"hd_pissa": {"target_modules": ["query"]}}},
    "more singular vectors than there are": {"ds": {"hd_pissa": {"r": 5, "slices": 4}}},
    "accumulation that does not fit the slices": {"ds": {"hd_pissa": {"r": 2, "slices": 3}}},
    "another optimizer for Trainer": {"optim": "adafactor"},
    "weight decay": {"weight_decay": 0.1},
    "another order of rows": {"train_sampling_strategy": "group_by_length"},
    "no such model": {"model_name_or_path": "DIR/none"},
    "broken config.json": {"model_name_or_path": "DIR/broken_model"},
    "an encoder-decoder": {"model_name_or_path": "DIR/t5"},
    "no tokenizer": {"model_name_or_path": "DIR/mute"},
    "a truncated shard": {"model_name_or_path": "DIR/cut"},
    "a quantised model": {"model_name_or_path": "DIR/gptq"},
    "an adapter for a model": {"model_name_or_path": "DIR/adapter"},
    "no such data": {"dataset_name": "DIR/none.jsonl"},
    "broken data": {"dataset_name": "DIR/broken.jsonl"},
    "empty data": {"dataset_name": "DIR/empty.jsonl"},
    "wrong column": {"prompt_field": "prompt"},
    "rows of another trainer": {"trainer": "dpo"},
    "a row without answer": {"dataset_name": "DIR/hole.jsonl"},
    "unknown split": {"dataset_split": "valid"},
    "template without placeholder": {"prompt_template": "DIR/notes.txt"},
    "evaluations of nothing": {"eval_steps": 2, "eval_dataset_name": None},
    "another run's folder": {"output_dir": "DIR/used"},
    "a file for a folder": {"output_dir": "DIR/notes.txt"},
    "an export that would replace the base": {"output_dir": "DIR"},
}
RUN = ["train", "--ds_config", "zero3_cpu", "--model_name_or_path", "DIR/model", "--output_dir", "DIR/new"]
COMMANDS = {
    "no such command": ["trian"],
    "two launchers": ["train", "--nnodes", "2", "--include", "a:0"],
    "an option that does not exist": [*RUN, "--sed", "1"],
    "an option of PEFT's": [*RUN, "--use_peft", "true"],
    "processes in words": ["train", "--num_accelerators", "two"],
    "plan: unknown option": ["plan", "--modl", "x"],
    "plan: no model": ["plan"],
    "plan: no such model": ["plan", "--model", "DIR/none"],
    "plan: no such GPU": ["plan", "--model", "DIR/model", "--gpu", "H900"],
    "plan: half a node": ["plan", "--model", "DIR/model", "--gpus", "12"],
    "export: unknown option": ["export", "--checkpoint", "DIR/used", "--output_dir", "DIR/new", "--rnk", "3"],
    "export: no checkpoint": ["export", "--checkpoint", "DIR/used", "--output_dir", "DIR/new"],
    "export: a rank without an adapter": ["export", "--checkpoint", "DIR", "--output_dir", "DIR/new", "--rank", "4"],
    "export: into a run": ["export", "--checkpoint", "DIR", "--output_dir", "DIR/used"],
    "evaluate: no model": ["evaluate", "--model", "DIR/none", "--dataset_name", "DIR/train.jsonl"],
    "evaluate: neither model nor adapter": ["evaluate", "--model", "DIR/used"],
    "evaluate: no data": ["evaluate", "--model", "DIR/model", "--dataset_name", "DIR/none.jsonl"],
    "evaluate: options of two ways": ["evaluate", "--model", "DIR/model", "--tasks", "a", "--max_length", "9"],
    "report: no run": ["report", "DIR/none"],
}
TEXTS = {
    "list.yaml": "- max_steps\n",
    "broken.yaml": "max_steps: 1\nseed: [1\n",
    "key.yaml": "learning_rat: 1e-4\n",
    "broken.json": '{"bf16": {"enabled": true},\n "hd_pissa": {"r": 4},}',
    "twice.json": '{"zero_optimization": {"stage": 2, "stage": 3}}',
    "notes.txt": "Nothing to see here.\n",
    "broken.jsonl": '{"instruction": "1 + 1", "response": "2"}\n{"instruction": \n',
    "empty.jsonl": "",
    "hole.jsonl": '{"instruction": "2 + 2", "response": "4"}\n{"instruction": "2 + 2", "response": null}\n',
    "broken_model/config.json": '{"model_type": ',
    "t5/config.json": '{"model_type": "t5"}',
    "used/run.json": "{}",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(folder of all files, the arguments of a run that would be fine)."""
    folder = tmp_path_factory.mktemp("bad") / "inputs"
    found = make_inputs(folder, train=16, evaluate=4)
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("mute", "cut", "gptq", "adapter"):
        shutil.copytree(folder / "model", folder / name)
    for path in (folder / "mute").glob("token*"):
        path.unlink()
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((folder / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "gptq" / "config.json").write_text(json.dumps(config))
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    batch = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    return folder, found | batch | {"output_dir": "DIR/new"}


@pytest.fixture(scope="module")
def refused(inputs):
    """What train.py makes of every case, and whether a file was changed."""
    folder, right = inputs
    lines = []
    for number, changes in enumerate(TRAIN.values()):
        more = dict(changes)
        if "ds" in more:
            path = folder / f"ds_{number}.json"
            more["ds_config"] = str(write_ds_config(path, **more.pop("ds")))
        line = {name: value for name, value in (right | more).items() if value is not None}
        lines.append([word.replace("DIR", str(folder)) for word in flags(line)])
    before = listing(str(folder))
    (found,) = run_ranks(1, script_runs.refusals, lines, str(folder.parent / "cache"))
    return dict(zip(TRAIN, found, strict=True)), before == listing(str(folder))


@pytest.mark.parametrize("case", TRAIN)
def test_train(refused, case):
    found = refused[0][case]
    assert found["code"] == 2, found
    assert [line[:7] for line in found["stderr"].splitlines() if line.startswith("error: ")] == ["error: "], found
    assert "Traceback" not in found["stderr"]


def test_a_damaged_line_is_named_by_its_number(refused):
    assert "line 2 " in refused[0]["broken data"]["stderr"]


def test_nothing_is_lost(refused):
    assert refused[1]


@pytest.mark.parametrize("case", COMMANDS)
def test_the_other_commands(case, inputs, capsys):
    folder = str(inputs[0])
    before = listing(folder)
    assert cli.main([word.replace("DIR", folder) for word in COMMANDS[case]]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in told if line.startswith(("error: ", "Traceback"))] == ["error: "], told
    assert listing(folder) == before
