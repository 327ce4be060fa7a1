"""The command line of launch/train.py: flags, YAML, other spellings."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import yaml
from launch_runs import flags

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import command_line, foreign_names, train_arguments

STEPS = 8


@pytest.fixture
def inputs() -> dict[str, str]:
    """The four required arguments but the output folder; nothing looks for them here."""
    names = ("ds_config", "model_name_or_path", "dataset_name", "eval_dataset_name")
    return {name: f"some/{name}" for name in names}


def arguments(inputs, output, **changes):
    chosen = {**inputs, "output_dir": str(output), "max_steps": STEPS, "learning_rate": 3e-3, "warmup_ratio": 0.25}
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    return chosen | {"max_length": 128, "prompt_template": "none"} | changes


def test_yaml_equals_the_same_flags(inputs, tmp_path):
    wanted = arguments(inputs, tmp_path / "out", warmup_steps=3, eval_split="train", bf16=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted))
    assert train_arguments.parse(["--config", str(tmp_path / "run.yaml")]) == train_arguments.parse(flags(wanted))


def test_yaml_numbers_as_people_write_them(inputs, tmp_path):
    """YAML takes 2e-5 for text, 1 for an integer; null is the default of what may be absent."""
    text = "learning_rate: 2e-5\nnum_train_epochs: 1\nwarmup_steps: null\nmax_grad_norm: '0.5'\n"
    (tmp_path / "run.yaml").write_text(text + yaml.safe_dump({**inputs, "output_dir": "out"}))
    args, _ = train_arguments.parse(["--config", str(tmp_path / "run.yaml")])
    found = (args.learning_rate, args.num_train_epochs, args.warmup_steps, args.max_grad_norm)
    assert found == (2e-5, 1.0, None, 0.5)
    assert isinstance(args.num_train_epochs, float)


def test_a_number_in_yaml_may_be_a_text_here(inputs, tmp_path):
    """Of `slices`, which also takes "auto", and of names."""
    (tmp_path / "run.yaml").write_text("slices: 8\nrun_name: 2024\n" + yaml.safe_dump({**inputs, "output_dir": "out"}))
    args, _ = train_arguments.parse(["--config", str(tmp_path / "run.yaml")])
    assert (args.slices, args.run_name) == ("8", "2024")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lora_r", "the rank of a slice is --r"),  # not --lora_alpha, which would be another run
        ("weight_decay", "the method has none; leave it out"),
        ("fp16", "use --bf16"),
        ("dataset_num_proc", "use --preprocessing_num_workers"),
        ("max_seq_length", "use --max_length"),
        ("max_lenght", "did you mean --max_length?"),
        ("reprt", "did you mean --report?"),
        ("disable_gradient_checkpointing", "off unless --gradient_checkpointing turns it on"),
        ("disable_bf16", "see --help"),  # not --bf16, the opposite
        ("no_packing", "see --help"),
        ("disable_tqmd", "did you mean --disable_tqdm?"),
        ("train_on_inputs", "use --train_on_prompt"),
        ("mask_history", "all of the assistant's turns carry loss"),
        ("neat_packing", "use --packing, in which no row sees another"),
        ("lora_target", "use --target_modules; 'all' is all-linear here"),
        ("sliding_window", "see --help"),  # like nothing here
    ],
)
def test_names_of_other_trainers(inputs, tmp_path, name, told):
    with pytest.raises(ConfigError, match=re.escape(f"unknown argument --{name}; ") + ".*" + re.escape(told)) as error:
        train_arguments.parse(flags({**inputs, "output_dir": "out", name: "0"}))
    assert "\n" not in str(error.value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**inputs, "output_dir": "out", name: 0}))
    with pytest.raises(ConfigError, match=f"unknown key {name}; .*" + re.escape(told.replace("mean --", "mean "))):
        train_arguments.parse(["--config", str(tmp_path / "run.yaml")])


def test_what_to_use_instead_is_there():
    """No name that is an option here, and every option that is advised."""
    options = {field.name for field in fields(train_arguments.TrainArguments)}
    assert not options & foreign_names.INSTEAD.keys()
    advised = set(re.findall(r"--(\w+)", " ".join(foreign_names.INSTEAD.values())))
    assert advised <= options | set(foreign_names.LAUNCHERS)
    assert len(advised) > 10


def test_what_another_command_has_not_is_not_advised():
    assert "--model_name_or_path" in foreign_names.hint("model", ["model_name_or_path"])
    assert foreign_names.hint("model", ["checkpoint", "mode"]) == "did you mean mode?"
    assert foreign_names.hint("dataset", ["checkpoint"]) == "see --help"
    assert foreign_names.hint("eval_max_lengths", ["max_length"]) == "see --help"  # which is of other rows
    for misspelt, meant in {"evl_steps": "eval_steps", "evl_strategy": "eval_strategy"}.items():
        assert foreign_names.hint(misspelt, ["max_steps", "save_strategy", meant]) == f"did you mean {meant}?"
    assert "leave it out" in foreign_names.hint("eval_accumulation_steps", ["gradient_accumulation_steps"])


def test_command_line_wins_over_yaml(inputs, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments(inputs, "out", seed=1)))
    argv = ["--config", str(tmp_path / "run.yaml"), "--learning_rate=0.5", "--seed", "2"]
    args, given = train_arguments.parse(argv)
    assert (args.learning_rate, args.seed, args.max_steps) == (0.5, 2, STEPS)
    assert {"learning_rate", "seed", "max_steps"} <= given
    assert "logging_steps" not in given


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_config"])
def test_other_names_of_the_config(inputs, tmp_path, name):
    """As the Trainer and DeepSpeed's own scripts call it, on the command line and in YAML."""
    others = {**{k: v for k, v in inputs.items() if k != "ds_config"}, "output_dir": "out"}
    expected = train_arguments.parse(flags({**others, "ds_config": "a.json"}))
    assert train_arguments.parse(flags({**others, name: "a.json"})) == expected
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**others, name: "a.json"}))
    assert train_arguments.parse(["--config", str(tmp_path / "run.yaml")]) == expected
    args, _ = train_arguments.parse(["--config", str(tmp_path / "run.yaml"), "--ds_config", "b.json"])
    assert args.ds_config == "b.json"


def test_a_huge_timeout_is_the_longest(inputs, tmp_path, capsys):
    """As LLaMA-Factory's examples have it; a note says what it is taken for."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**inputs, "output_dir": "out", "ddp_timeout": 180000000}))
    args, _ = train_arguments.parse(["--config", str(tmp_path / "run.yaml")])
    assert (args.ddp_timeout, args.hang_s) == (10**7, 600)
    assert capsys.readouterr().err == "note: --ddp_timeout is 180000000: taken for 10000000, four months\n"
    assert train_arguments.parse(flags({**inputs, "output_dir": "out", "ddp_timeout": 10**7}))[0].ddp_timeout == 10**7
    assert capsys.readouterr().err == ""


def test_unknown_yaml_key_is_refused(inputs, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**inputs, "output_dir": "out", "learning_rat": 1e-4}))
    with pytest.raises(ConfigError, match=r"unknown key learning_rat; did you mean learning_rate\?"):
        train_arguments.parse(["--config", str(tmp_path / "run.yaml")])


def test_several_datasets_in_yaml_are_a_list_or_a_text(inputs, tmp_path):
    path = tmp_path / "run.yaml"
    for sets in (["a.jsonl:9", "b.csv"], "a.jsonl:9 b.csv"):
        path.write_text(yaml.safe_dump({**inputs, "output_dir": "out", "dataset_name": sets}))
        assert train_arguments.parse(["--config", str(path)])[0].dataset_name == "a.jsonl:9 b.csv"


def test_yaml_words(tmp_path):
    """`no` and `true` are booleans to YAML; here they are what Hugging Face's users mean."""
    path = tmp_path / "run.yaml"
    required = dict.fromkeys(("ds_config", "model_name_or_path", "dataset_name", "output_dir"), "x")
    path.write_text(yaml.safe_dump({**required, "save_strategy": False, "resume_from_checkpoint": True}))
    args, _ = train_arguments.parse(["--config", str(path)])
    assert (args.save_strategy, args.resume_from_checkpoint) == ("no", "auto")


def test_help_does_not_show_empty_defaults():
    text = command_line.make_parser({n: s for n, (s, _) in train_arguments.OPTIONS.items()}).format_help()
    assert "(default: instruction)" in text
    assert "(default: )" not in text
    assert "(default: None)" not in text


def test_home_is_meant_by_a_tilde(monkeypatch, tmp_path):
    """Which a shell leaves as it is in --output_dir=~/run, and YAML everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text("{}")
    file = tmp_path / "run.yaml"
    names = ("output_dir", "model_name_or_path", "ds_config", "logging_dir", "resume_from_checkpoint")
    paths = {name: "~/ds.json" if name == "ds_config" else f"~/{name}" for name in names}
    file.write_text(yaml.safe_dump(paths | {"dataset_name": "D"}))
    args, _ = train_arguments.parse(["--config", "~/run.yaml"])
    assert {name: getattr(args, name) for name in names} == {
        name: f"{tmp_path}/{'ds.json' if name == 'ds_config' else name}" for name in names
    }


def test_a_folder_that_may_not_be_searched_is_told(tmp_path):
    """As another user, in a process of its own: root may search all."""
    (tmp_path / "closed").mkdir(mode=0)
    pid = os.fork()
    if not pid:
        said = ""
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            command_line.check_paths(SimpleNamespace(output_dir=f"{tmp_path}/closed/run"), "output_dir")
        except ConfigError as error:
            said = str(error)
        finally:
            os._exit(0 if said.startswith(f"--output_dir {tmp_path}/closed/run: permission denied; give a path") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
