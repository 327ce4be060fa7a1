"""The command `hdpissa`: its words, the launchers behind `hdpissa train`, --help by section, `hdpissa env`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import cli, env_report, help_pages, plan_arguments, shipped_configs, train_arguments, train_launcher
from hdpissa.launch.command_line import option

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["--ds_config", "zero3", "--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]


def call(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(words))
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    return code, said.out, said.err


# --- the words -------------------------------------------------------------------------------------


def test_the_entry_point_is_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["hdpissa"].split(":")
    assert getattr(importlib.import_module(module), name) is cli.main


def test_every_word_has_a_script_and_stands_in_the_overview(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for word, (module, text) in cli.COMMANDS.items():
        assert importlib.util.find_spec(f"hdpissa.launch.{module}"), word
        assert f"{word:<12}{text}" in out
    assert call(capsys)[:2] == (2, out)


def test_unknown_word_and_version(capsys):
    assert call(capsys, "trian") == (2, "", "error: unknown command trian; did you mean train?\n")
    assert "there are train, plan" in call(capsys, "frobnicate")[2]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call(capsys, "--version")[1] == f"hdpissa {version}\n"


def test_mistakes_are_one_line_and_exit_code_2(capsys):
    for words, said in {
        ("train", "--learning_rate", "1e-4x"): "--learning_rate is 1e-4x: must be a number, such as 1e-4",
        ("train", "--max_steps", "1.5"): "--max_steps is 1.5: must be a whole number",
        ("train", "--bf16", "maybe"): "--bf16 is maybe: must be true or false",
        ("train", "--max_steps", "--bf16"): "--max_steps has no value; give one",
        ("train", "--num_accelerators", "two", *NEEDED): "--num_accelerators is two: must be a whole number",
        ("train", *NEEDED, "--dataset_name", "a.jsonl", "b.csv"): (
            "unknown argument b.csv; a value stands behind its option, several in quotes: --dataset_name 'a.jsonl"
        ),
        ("plan", "--modl=x", "--gpus", "8", "--gpu_count", "8"): (
            "unknown arguments --modl; did you mean --model?, and --gpu_count; see --help"
        ),
        ("plan", "--modl", "x"): "unknown argument --modl; did you mean --model?",
        ("train", "--learning_rte", "1", *NEEDED): "unknown argument --learning_rte; did you mean --learning_rate?",
        ("train", "--num_accelerators", "2"): "missing --ds_config, --model_name_or_path",
        ("export", "--checkpoint", "C", "--output_dir", "O", "--rank", "0"): "--rank is 0 with --format hf",
    }.items():
        code, out, err = call(capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {said}")
        assert err.count("\n") == 1


def test_help_imports_neither_torch_nor_transformers():
    """A person who asks for help waits for nothing; each command in a process of its own would be as fast."""
    code = """
import sys
from hdpissa.launch import cli
for words in (["--help"], ["plan", "--help"], ["train", "--help"], ["train", "--help", "all"], ["export", "--help"]):
    try:
        assert cli.main(words) == 0
    except SystemExit as ended:
        assert not ended.code, words
print("heavy:", {"torch", "transformers", "deepspeed", "datasets"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: set()"


# --- train -----------------------------------------------------------------------------------------


def tail(words: list[str]) -> tuple[str, list[str]]:
    """(name of the launcher, its words and train.py's) of a command."""
    assert words[0] == sys.executable
    return Path(words[1]).name, words[2:]


def test_the_launcher_gets_its_options_and_train_the_rest():
    words = ["--max_steps", "3", "--num_accelerators", "2", *NEEDED, "--master_port=29501", "--no_ssh", "--bf16"]
    launcher, rest = tail(train_launcher.command(words, {}))
    assert launcher == "deepspeed"
    place = rest.index(str(train_launcher.TRAIN))
    assert rest[:place] == ["--quiet", "--num_accelerators", "2", "--master_port=29501", "--no_ssh"]
    assert rest[place + 1 :] == ["--max_steps", "3", *NEEDED, "--bf16"]
    launcher, rest = tail(train_launcher.command(["--nproc-per-node", "2", *NEEDED, "--standalone"], {}))
    assert launcher == "torchrun"
    assert rest == ["--nproc-per-node", "2", "--standalone", str(train_launcher.TRAIN), *NEEDED]
    assert tail(train_launcher.command(NEEDED, {})) == ("deepspeed", ["--quiet", str(train_launcher.TRAIN), *NEEDED])


def test_the_launcher_is_quiet_unless_its_log_is_wanted():
    for words in (["--log_level", "info"], ["--log_level=debug"], ["--quiet"]):
        launcher, rest = tail(train_launcher.command([*words, *NEEDED], {}))
        assert (launcher, rest[: len(words)]) == ("deepspeed", words)
        assert rest.count("--quiet") == ("--quiet" in words)


def test_what_files_say_is_refused_before_a_launcher_starts(capsys, tmp_path, monkeypatch):
    """One line and nothing else, not even the command; on other machines the files may be others."""
    monkeypatch.setattr(train_launcher.os, "execv", lambda *words: 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "run.json").touch()
    (tmp_path / "done" / "run_state.json").write_text('{"state": "finished"}')
    (tmp_path / "bad.json").write_text('{"hd_pissa": {"rank": 4}, "zero_optimization": {"stage": 3}}')
    (tmp_path / "two.json").write_text(
        '{"hd_pissa": {"r": 4}, "zero_optimization": {"stage": 3}, "optimizer": {"params": {"lr": 0.001}}}'
    )
    (tmp_path / "rows.xlsx").touch()
    (tmp_path / "model").mkdir()
    fixed = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 8}
    (tmp_path / "eight.json").write_text(json.dumps(fixed))
    reference = ("--world_size", "8", "--accumulation_steps", "64", "--ds_config", str(tmp_path / "eight.json"))
    assert call(capsys, "train", *NEEDED, *reference)[0] == 0
    for options, said in {
        ("--output_dir", str(tmp_path / "run")): "holds another run (run.json)",
        (
            "--output_dir",
            str(tmp_path / "done"),
            "--resume_from_checkpoint",
            "auto",
        ): "kept no checkpoint to go on",
        ("--ds_config", str(tmp_path / "bad.json")): "rank",
        ("--ds_config", str(tmp_path / "none.json")): "none.json",
        ("--model_name_or_path", str(tmp_path / "none")): "no such folder",
        ("--dataset_name", str(tmp_path / "none.jsonl")): "none.jsonl': no such file or folder; check the path",
        ("--dataset_name", f"org/set:5 {tmp_path}/rows.xlsx"): "rows.xlsx' is none of .jsonl, .json",
        ("--eval_dataset_name", str(tmp_path / "none.csv")): "none.csv': no such file or folder",
        ("--ds_config", str(tmp_path / "two.json"), "--learning_rate", "1e-4"): "lr is 0.001 but --learning_rate is",
        ("--ds_config", str(tmp_path / "two.json"), "--r", "2"): "hd_pissa.r is 4 but --r is 2",
    }.items():
        words = ["train", "--num_accelerators", "2", *NEEDED, *options]
        code, out, err = call(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert said in err
        code, _, err = call(capsys, *words, "--hostfile", "hosts")
        assert (code, err[:2]) == (0, "+ ")


def test_the_launchers_are_those_of_this_python():
    for words in (["--num_accelerators", "1"], ["--nproc_per_node", "1"]):
        assert Path(train_launcher.command(words, {})[1]).parent == Path(sys.executable).parent


def test_inside_a_launcher_it_is_one_of_its_processes():
    """`srun hdpissa train …`: no second launcher inside the first."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert train_launcher.command(NEEDED, environment)[-len(NEEDED) - 1 :] == [str(train_launcher.TRAIN), *NEEDED]
    assert "deepspeed" not in " ".join(train_launcher.command(NEEDED, environment)[: -len(NEEDED)])
    with pytest.raises(ConfigError, match="--num_accelerators: this process has a launcher already"):
        train_launcher.command(["--num_accelerators", "2", *NEEDED], environment)


def test_the_reference_s_world_size_is_the_number_of_processes():
    """As long as no option of the launcher says it."""
    for given, added in (
        ([], ["--quiet", "--num_accelerators", "4"]),
        (["--master_port", "1"], ["--quiet", "--master_port", "1", "--num_accelerators", "4"]),
        (["--standalone"], ["--standalone", "--nproc_per_node", "4"]),
        (["--num_gpus", "2"], ["--quiet", "--num_gpus", "2"]),
    ):
        for words in (["--world_size", "4"], ["--world_size=4"]):
            rest = train_launcher.command([*given, *words, *NEEDED], {})[2:]
            assert rest == [*added, str(train_launcher.TRAIN), *words, *NEEDED]


def test_two_launchers_are_refused():
    with pytest.raises(ConfigError, match="--include and --nnodes are of two launchers"):
        train_launcher.command(["--nnodes", "2", "--include", "a:0", *NEEDED], {})
    with pytest.raises(ConfigError, match="--hostfile has no value"):
        train_launcher.command([*NEEDED, "--hostfile"], {})


def test_launchers_know_these_options_and_train_has_none_of_them():
    """Against the parsers of the installed deepspeed and torchrun: names, and whether a value follows."""
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    def arity(parse) -> dict[str, bool]:
        """Option → whether it takes a value."""
        import argparse

        found: dict[str, bool] = {}
        original = argparse.ArgumentParser.parse_args

        def look(self, *args, **kwargs):
            found.update({n.lstrip("-"): a.nargs != 0 for a in self._actions for n in a.option_strings})
            raise StopIteration

        argparse.ArgumentParser.parse_args = look
        try:
            parse([])
        except StopIteration:
            pass
        finally:
            argparse.ArgumentParser.parse_args = original
        return found

    torchrun = {n.lstrip("-"): a.nargs != 0 for a in get_args_parser()._actions for n in a.option_strings}
    for (values, switches), theirs in (
        (train_launcher.DEEPSPEED, arity(runner.parse_args)),
        (train_launcher.TORCHRUN, torchrun),
    ):
        assert {name: theirs.get(name) for name in values} == dict.fromkeys(values, True)
        assert {name: theirs.get(name) for name in switches} == dict.fromkeys(switches, False)
    ours = {f.name for f in fields(train_arguments.TrainArguments)}
    assert not ours & {name for launcher in (train_launcher.DEEPSPEED, train_launcher.TORCHRUN) for name in
                       launcher[0] | launcher[1]}  # fmt: skip


def test_a_yaml_file_may_be_the_first_word(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "M", "dataset_name": "D", "output_dir": "O", "seed": 3}))
    for words in ([str(file)], ["--local_rank=0", str(file)], ["--config", str(file)]):
        args, given = train_arguments.parse([*words, "--ds_config", "zero3"])
        assert (args.seed, args.model_name_or_path) == (3, "M")
        assert "seed" in given


def test_configs_by_name(tmp_path, monkeypatch):
    """`zero3` is the shipped one, in every folder; a file of that name wins."""
    monkeypatch.chdir(tmp_path)
    assert train_arguments.parse(NEEDED)[0].ds_config == str(ROOT / "ds_configs" / "zero3.json")
    plan = plan_arguments.parse(["--model", "M", "--ds_config", "zero3_hpz"])[0]
    assert plan.ds_config == str(ROOT / "ds_configs" / "zero3_hpz.json")
    assert shipped_configs.locate("zero4") == "zero4"
    with pytest.raises(ConfigError, match=r"--ds_config zero4: .*did you mean zero3\? there are zero3, zero3_70b"):
        shipped_configs.read("zero4")
    (tmp_path / "zero3").write_text("{}")
    assert train_arguments.parse(NEEDED)[0].ds_config == "zero3"


# --- --help ----------------------------------------------------------------------------------------


def test_the_first_page_fits_a_screen_and_names_every_option(capsys):
    code, out, _ = call(capsys, "train", "--help")
    assert code == 0
    assert len(out.splitlines()) <= 48
    words = out.replace(",", " ").split()
    for section, cls in train_arguments.SECTIONS.items():
        assert section in out
        assert [f.name for f in fields(cls) if f.name not in words] == []


def test_every_option_is_on_its_section_s_page_with_default_and_meaning(capsys):
    for section, cls in train_arguments.SECTIONS.items():
        page = call(capsys, "train", "--help", section)[1]
        for each in fields(cls):
            (line,) = [line for line in page.splitlines() if line.startswith(f"--{each.name} ")]
            default = "required" if each.name in train_arguments.REQUIRED else help_pages.default_of(each)
            assert default[:10] in line
            assert each.metadata["help"].split()[0] in line or len(default) > 10
    every = call(capsys, "train", "--help", "all")[1]
    assert all(f"--{f.name} " in every for f in fields(train_arguments.TrainArguments))


def test_help_finds_words(capsys):
    found = call(capsys, "train", "--help", "warm")[1]
    assert "--warmup_ratio" in found
    assert "--max_length" not in found
    assert call(capsys, "train", "--help", "max_length")[1].count("\n  ") <= 3  # that option alone
    assert "--learning_rate" in call(capsys, "train", "--help", "--lr")[1]  # the reference's name
    assert "there is no --lora_dropout here: slices have no" in call(capsys, "train", "--help", "--lora-dropout")[1]
    assert "--hostfile is the launcher's: see deepspeed --help" in call(capsys, "train", "--help", "--hostfile")[1]
    code, out, err = call(capsys, "train", "--help", "frobnicate")
    assert (code, out) == (2, "")
    assert "error: --help frobnicate: no option has that word; sections: run, data" in err


def test_only_one_rank_answers(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, "train", "--help", "data") == (0, "", "")


@dataclass
class Some:
    """Options of all kinds."""

    name: str = option("", "a name", aliases=["--title"])
    rows: int = option(3, "[bold] is no markup here")
    fast: bool = option(False, "a switch")
    limit: int | None = option(None, "nothing is the default")


def test_a_page_of_one_section(capsys):
    assert help_pages.answered(["--help"], {"some": Some}, help_pages.Page("Does it.", ["do --name N"], ["name"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["Does it.", "", "do --name N"]
    rows = [" ".join(line.split()) for line in lines[4:]]
    assert rows == [
        "option default meaning",
        "--name required a name (also --title)",
        "--rows 3 [bold] is no markup here",
        "--fast off a switch",
        "--limit nothing is the default",
    ]
    assert not help_pages.answered(["--name", "x"], {"some": Some}, help_pages.Page("", []))


# --- env -------------------------------------------------------------------------------------------


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    code, out, _ = call(capsys, "env", "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report) == {"hdpissa", "system", "packages", "torch", "devices", "launcher", "variables"}
    assert [part for part, found in report.items() if "error" in found] == []
    import torch

    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"].keys() >= {"deepspeed", "transformers", "triton", "datasets", "accelerate"}
    assert "gloo" in report["torch"]["communication"]
    assert report["devices"]["deepspeed takes"]
    assert report["launcher"]["place"] == "rank 0 of 1, 0 of 1 on this host"
    shown = report["variables"]
    assert (shown["NCCL_DEBUG"], shown["TOKENIZERS_PARALLELISM"]) == ("INFO", "false")
    assert shown["WANDB_API_KEY"] == "(set)"
    assert "0123456789" not in out
    assert "hf_secret" not in out
    text = env_report.text(report)
    for words in ("version ", "cpu ", "NCCL_DEBUG", torch.__version__, "deepspeed takes"):
        assert words in text


def test_env_tells_what_is_broken_and_goes_on(monkeypatch):
    """An environment that contradicts itself, a package that cannot be imported: an entry each, not the end."""
    monkeypatch.setattr(env_report, "_torch", lambda: (_ for _ in ()).throw(OSError("libcuda.so is gone")))
    report = env_report.collect({"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert report["torch"] == {"error": "OSError: libcuda.so is gone"}
    assert report["launcher"]["error"].startswith("ConfigError: environment: RANK and WORLD_SIZE says rank 3 of 2")
    assert report["variables"] == {"LOCAL_RANK": "0", "RANK": "3", "WORLD_SIZE": "2"}
    assert report["packages"]["torch"]
