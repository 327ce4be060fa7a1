"""Commands in Markdown: found, and put before the parsers that would read them; cheap ones are run.

A command of a kind that is not known here is an error: whoever writes one says how it is held.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hdpissa.launch import cli, train_launcher
from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.planning import report as plan_report
from hdpissa.launch.training import script_arguments

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"sh", "python", "json", "yaml", "text", ""}
# Models on the hub, which tests cannot ask: hidden, kv heads, intermediate, layers, heads, vocabulary
HUB = {
    "meta-llama/Llama-2-7b-hf": (4096, 32, 11008, 32, 32, 32000),
    "meta-llama/Llama-3.1-8B": (4096, 8, 14336, 32, 32, 128256),
    "meta-llama/Llama-3.1-70B": (8192, 8, 28672, 80, 64, 128256),
    "Qwen/Qwen2.5-7B": (3584, 4, 18944, 28, 28, 152064),
}
OTHERS = ("cd", "git", "python3", "vllm")  # programs that are not ours, and that need not be installed
RECORDED = ("hdpissa", "deepspeed", "torchrun", "srun")  # what shell scripts of ours call in the end


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """All fenced blocks of a Markdown file."""
    text = path.read_text()
    for found in FENCE.finditer(text):
        yield Block(str(path.relative_to(ROOT)), text[: found.start()].count("\n") + 1, found[1], found[2])


def commands(text: str) -> list[str]:
    """The commands of a shell block, one line each; comments and continuations worked out."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


# ---------------------------------------------------------------- one command


@dataclass
class Place:
    """Where commands are tried: a scratch folder with configs of the hub's models, and what was found.

    Attributes:
        most_layers: a model of the hub is cut to so many, which takes a plan a tenth of the time.
        fits: whether each plan that was asked for fits. plans: those that are made, by their arguments.
    """

    folder: Path
    most_layers: int = 80
    fits: list[bool] = field(default_factory=list)
    plans: dict[tuple[str, ...], bool] = field(default_factory=dict)

    def write(self, block: Block | None) -> None:
        """The page's YAML file, which its commands call run.yaml."""
        if block is not None:
            (self.folder / "run.yaml").write_text(block.text)

    def local(self, name: str) -> str:
        """A config.json with a hub model's shapes."""
        hidden, kv, ff, layers, heads, vocabulary = HUB[name]
        layers = min(layers, self.most_layers)
        file = self.folder / f"{name.replace('/', '--')}.json"
        content = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
            "num_key_value_heads": kv, "intermediate_size": ff, "num_hidden_layers": layers,
            "num_attention_heads": heads, "vocab_size": vocabulary, "tie_word_embeddings": False,
        }  # fmt: skip
        file.write_text(json.dumps(content))
        return str(file)


def check(command: str, place: Place) -> None:
    """Runs or parses a command; what is wrong with it raises."""
    words = shlex.split(command, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    words = [str(place.folder / word) if word == "run.yaml" else word for word in words]
    environment = {}
    while "=" in words[0] and not words[0].startswith(("-", ".", "/")):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    check_words(words, place, environment)


def check_words(words: list[str], place: Place, environment: dict[str, str]) -> None:
    name = words[0]
    if name == "hdpissa":
        _hdpissa(words[1:], place)
    elif name in ("deepspeed", "torchrun"):
        _launch(name, words[1:])
    elif name == "srun":
        script = words.index("launch/train.py")
        _train(words[script + 1 :], 16)
    elif name == "sbatch":
        _script(words[1:], place, {**environment, "SLURM_SUBMIT_DIR": str(ROOT)})
    elif name.startswith("launch/") and name.endswith(".sh"):
        _script(words, place, environment)
    elif name in ("python", ".venv/bin/python"):
        _python(words[1:])
    elif name == "make":
        _make(words[1:])
    elif name == "hf":
        _hugging_face(words[1:])
    elif name == "pip":
        _pip(words[1], words[2:])
    elif name == ".":
        assert words[1:] == [".venv/bin/activate"]
    elif name in OTHERS:
        return
    else:
        raise AssertionError(f"no test knows what {name} is; say in tests/unit/doc_commands.py how it is held")


def _hdpissa(words: list[str], place: Place) -> None:
    command, rest = words[0], words[1:]
    assert command in cli.COMMANDS, command
    if "--help" in rest or command == "env":
        run(words)
    elif cli.COMMANDS[command][0] == "train_launcher":
        kind = [] if command == "train" else ["--trainer", command]
        started = train_launcher.command([*rest, *kind], {})
        _launch(Path(started[1]).name, started[2:])
    elif command == "plan":
        _plan(rest, place)
    else:
        parse_only(f"hdpissa.launch.{cli.COMMANDS[command][0]}", rest)


def run(words: list[str]) -> None:
    """In this process; --help ends by SystemExit."""
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    assert not code, words


def _plan(words: list[str], place: Place) -> None:
    if tuple(words) not in place.plans:
        local = [place.local(word) if word in HUB else word for word in words]
        run_ = plan_arguments.resolve(*plan_arguments.parse(local))
        if "--table" in words:  # eleven plans; tests/cli/test_plan_command.py makes them
            return
        place.plans[tuple(words)] = plan_report.make_plan(run_).fits
    place.fits.append(place.plans[tuple(words)])


def _launch(launcher: str, words: list[str]) -> None:
    """The real launcher's parser, and train.py's with as many processes as it would start."""
    if launcher == "deepspeed":
        from deepspeed.launcher import runner

        found = runner.parse_args(words)
        script, rest = found.user_script, found.user_args
        hosts = runner.fetch_hostfile(found.hostfile) if Path(found.hostfile).is_file() else None
        processes = sum(hosts.values()) if hosts else max(1, found.num_gpus)
    else:
        from torch.distributed.run import parse_args

        found = parse_args(words)
        script, rest = found.training_script, found.training_script_args
        processes = int(found.nnodes) * int(found.nproc_per_node)
    if Path(script).name == "train.py":
        _train(rest, processes)
    else:
        parse_only(_module(script), rest)


def _train(words: list[str], processes: int) -> None:
    """Everything about a run that can be known without its model and its data."""
    from hdpissa.engine.config import ds_config
    from hdpissa.engine.resolved_config import make_plan

    variables = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": processes}
    variables |= {"MASTER_ADDR": "node1", "MASTER_PORT": 29500}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, str(value))
        _, values = script_arguments.read(words)
        _, section = ds_config.split_section(values["deepspeed"])
        plan = make_plan(section, values["gradient_accumulation_steps"])
    assert plan.world_size == processes


def _script(words: list[str], place: Place, environment: dict[str, str]) -> None:
    """Runs a shell script, the launchers in it replaced by one that writes down how it was called; checks that."""
    for call in recorded([str(ROOT / words[0]), *words[1:]], place.folder, environment):
        check_words(call, place, {})


def recorded(words: list[str], folder: Path, environment: dict[str, str]) -> list[list[str]]:
    """What a script calls."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    log = folder / "calls"
    log.write_text("")
    for name in RECORDED:
        program = programs / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> "{log}"\nprintf "\\n" >> "{log}"\n')
        program.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *words],
        env={**inherited, **environment, "PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = [line.split("\0")[:-1] for line in log.read_text().splitlines()]
    assert calls, f"{words[0]} calls none of {RECORDED}"
    return calls


# ---------------------------------------------------------------- other programs


class Parsed(Exception):  # noqa: N818
    """The real parser has taken the arguments; what the program would do with them is not done."""


def parse_only(module: str, words: list[str]) -> None:
    """Calls a program's `main` up to where its arguments are parsed."""
    original = argparse.ArgumentParser.parse_known_args

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        _, unknown = original(self, *args, **kwargs)
        assert not unknown, f"{module} knows no {unknown[0]}"
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [module, *words])
        try:
            found = importlib.import_module(module)
            main = found.main
            main(words) if main.__code__.co_argcount else main()
        except Parsed:
            return
    raise AssertionError(f"{module} has parsed nothing")


def _module(script: str) -> str:
    path = Path(script)
    assert (ROOT / path).is_file(), script
    return ".".join(["hdpissa", *path.parent.parts, path.stem])


def none_of(program: str, unknown: Iterable[str]) -> None:
    """What a program does not know is an error."""
    words = list(unknown)
    assert not words, f"{program} knows no {words[0]}"


def _python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        assert (ROOT / words[2]).is_file(), words[2]
    elif words[0] == "launch/train.py":
        _train(words[1:], 1)
    elif words[0] == "convert_hf_to_gguf.py":  # llama.cpp's
        return
    elif words[0].startswith("tests/"):
        source = (ROOT / words[0]).read_text()
        none_of(words[0], (word for word in words[1:] if word.startswith("--") and f'"{word}"' not in source))
    else:
        parse_only(_module(words[0]), words[1:])


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    none_of("make", (word for word in words if "=" not in word and word not in targets))


def _pip(command: str, words: list[str]) -> None:
    """pip's own parser; nothing is fetched."""
    from pip._internal.commands import create_command

    _, packages = create_command(command).parse_args(words)
    pinned = (ROOT / "constraints.txt").read_text().replace("_", "-")
    none_of("constraints.txt", (name for name in packages if "==" in name and name not in pinned))


def _hugging_face(words: list[str]) -> None:
    """The hub's own command; nothing is fetched."""
    command = getattr(importlib.import_module(f"huggingface_hub.cli.{words[0]}"), words[0])
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(command).parameters}
    none_of("hf", (word for word in words if word.startswith("--") and word not in known))
