"""The command `hdpissa`: its words, the launchers behind `hdpissa train`, --help by section, `hdpissa env`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import cli, env_report, train_launcher
from hdpissa.launch.common import shipped_configs
from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.training import script_arguments

ROOT = Path(__file__).resolve().parents[2]
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
    assert call(capsys, "trian")[:2] == (2, "")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call(capsys, "--version")[1] == f"hdpissa {version}\n"


def test_help_imports_no_torch():
    """Help comes at once; but train's options are TRL's own."""
    code = """
import sys
from hdpissa.launch import cli
for words in (["--help"], ["plan", "--help"], ["export", "--help"], ["evaluate", "--help"]):
    try:
        assert cli.main(words) == 0
    except SystemExit as ended:
        assert not ended.code, words
print("heavy:", {"torch", "deepspeed", "datasets"} & sys.modules.keys())
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


def test_the_launchers_are_those_of_this_python():
    for words in (["--num_accelerators", "1"], ["--nproc_per_node", "1"]):
        assert Path(train_launcher.command(words, {})[1]).parent == Path(sys.executable).parent


def test_inside_a_launcher_it_is_one_of_its_processes():
    """`srun hdpissa train …`: no second launcher inside the first."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert train_launcher.command(NEEDED, environment)[-len(NEEDED) - 1 :] == [str(train_launcher.TRAIN), *NEEDED]
    assert "deepspeed" not in " ".join(train_launcher.command(NEEDED, environment)[: -len(NEEDED)])
    with pytest.raises(ConfigError, match="--num_accelerators"):
        train_launcher.command(["--num_accelerators", "2", *NEEDED], environment)


@pytest.mark.parametrize("kind", script_arguments.KINDS)
def test_each_trainer_has_its_command(kind, monkeypatch):
    started = []
    monkeypatch.setattr(train_launcher.os, "execv", lambda program, words: started.append(words) or 0)
    assert cli.main([kind, *NEEDED]) == 0
    assert started[0][-2:] == ["--trainer", kind]


def test_two_launchers_are_refused():
    with pytest.raises(ConfigError, match="--include and --nnodes"):
        train_launcher.command(["--nnodes", "2", "--include", "a:0", *NEEDED], {})
    with pytest.raises(ConfigError, match="hostfile"):
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
    theirs = set.union(*train_launcher.DEEPSPEED, *train_launcher.TORCHRUN) - {"log_level"}  # Trainer's, too
    for kind in script_arguments.KINDS:
        assert not theirs & {action.dest for action in script_arguments.Parser(kind)._actions}


def test_configs_by_name(tmp_path, monkeypatch):
    """`zero3` is the shipped one, in every folder; a file of that name wins."""
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "ds_configs" / "zero3.json")
    assert shipped_configs.locate("zero3") == shipped
    assert plan_arguments.parse(["--model", "M", "--ds_config", "zero3"])[0].ds_config == shipped
    assert shipped_configs.locate("zero4") == "zero4"
    with pytest.raises(ConfigError, match="zero3"):
        shipped_configs.read("zero4")
    (tmp_path / "zero3").write_text("{}")
    assert shipped_configs.locate("zero3") == "zero3"


# --- --help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", script_arguments.KINDS)
def test_help_has_every_option_of_a_trainer(kind, capsys):
    code, out, _ = call(capsys, kind, "--help")
    assert code == 0
    assert {"--deepspeed", "--learning_rate", "--r", "--init_tol", "--output_dir", "--preview"} <= set(
        re.findall(r"--\w+", out)
    )
    assert ("--num_generations" in out) is (kind == "grpo")


# --- env -------------------------------------------------------------------------------------------


def test_env(capsys, monkeypatch):
    import torch

    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, _ = call(capsys, "env")
    assert code == 0
    for found in (
        f"torch {torch.__version__}",
        "deepspeed 0.",
        "NCCL_DEBUG=INFO",
        "WANDB_API_KEY=(set)",
        "rank 0 of 1",
    ):
        assert found in out
    assert "0123456789" not in out
    assert "hf_secret" not in out


def test_env_reports_a_broken_part_and_goes_on(monkeypatch):
    """An environment that contradicts itself, a torch that cannot look at its devices: an error each, not the end."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: 1 / 0)
    out = env_report.report({"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert "ZeroDivisionError" in out
    assert "rank 3 of 2" in out
    assert "WORLD_SIZE=2" in out
