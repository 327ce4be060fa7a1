"""The documentation says what is: its commands are run or parsed, its settings, options, links and recipes exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from doc_commands import ROOT, Block, Place, blocks, check, commands

from hdpissa.engine.config import ds_config
from hdpissa.engine.config.section import HDPissaConfig
from hdpissa.launch import cli, train_launcher
from hdpissa.launch.common import section_flags
from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.training import script_arguments

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.sh"))
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, command) for block in BLOCKS if block.language == "sh" for command in commands(block.text)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"), most_layers=2)


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    """Paths in the documentation are those of the repository."""
    monkeypatch.chdir(ROOT)


# --- commands --------------------------------------------------------------------------------------


def test_every_block_says_what_it_is():
    assert [str(b) for b in BLOCKS if b.language not in ("sh", "python", "json", "yaml", "text")] == []
    assert len(COMMANDS) > 50
    hidden = [str(b) for b in BLOCKS if b.language == "text" and re.search(r"^\s*(hdpissa|make|python) ", b.text, re.M)]
    assert hidden == []


@pytest.mark.parametrize(
    ("block", "command"), COMMANDS, ids=[f"{block.file}-{i}" for i, (block, _) in enumerate(COMMANDS)]
)
def test_command(block, command, place, capsys):
    place.write(next((b for b in of("yaml") if b.file == block.file), None))
    check(command, place)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("hdpissa train --ds_config zero3 --model_name_or_path M --dataset_name D --output_dir O --sed 1", "--sed"),
        ("hdpissa train --ds_config zero4 --model_name_or_path M --dataset_name D --output_dir O", "zero4"),
        ("hdpissa plan --model_name_or_path meta-llama/Llama-3.1-8B --gpu H900", "H900"),
        ("hdpissa export --checkpoint C --output_dir O --rnk 3", "--rnk"),
        ("python benchmarks/compare.py OLD NEW --everything", "--everything"),
        ("make coffee", "coffee"),
        ("frobnicate now", "frobnicate"),
        ("deepspeed --num_gpu launch/train.py", ""),
        ("launch/recipes/paper_math.sh --max_stps 3", "--max_stps"),
    ],
)
def test_wrong_commands_are_noticed(command, said, place, capsys):
    with pytest.raises((Exception, SystemExit)) as found:
        check(command, place)
    assert said in str(found.value) + capsys.readouterr().err


def test_commands_are_found_whole():
    text = "# a comment\nmake demo   # what it does\nhdpissa plan \\\n    --gpus 8\n\n"
    assert commands(text) == ["make demo   # what it does", "hdpissa plan --gpus 8"]


# --- recipes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans():
    """What recipes have in common is planned once, the models whole."""
    return {}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, plans, capsys, tmp_path):
    """The plan that it shows fits, and the run that it starts is one that train.py takes."""
    (tmp_path / "train.jsonl").touch()
    place = Place(tmp_path, plans=plans)
    data = f"{tmp_path}/train.jsonl" if "${1:" in recipe.read_text() else ""
    check(f"launch/recipes/{recipe.name} {data} --max_steps 5", place)
    assert place.fits == [True]
    assert f"`{recipe.name}`" in (ROOT / "docs" / "training.md").read_text()
    assert recipe.stat().st_mode & 0o111


def test_shell_scripts_are_shell():
    for script in [*RECIPES, *(ROOT / "launch" / "nodes").glob("*.s*"), ROOT / "launch" / "demo.sh"]:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_paper_s_batch():
    """128 rows a step on 8 GPUs, and on one."""
    paper = yaml.safe_load((ROOT / "launch" / "recipes" / "paper.yaml").read_text())
    assert paper["per_device_train_batch_size"] * paper["gradient_accumulation_steps"] * 8 == 128
    assert "--gradient_accumulation_steps 64 " in (ROOT / "launch" / "recipes" / "one_gpu.sh").read_text()
    assert {name: float(paper[name]) for name in ("learning_rate", "warmup_ratio", "num_train_epochs")} == {
        "learning_rate": 2e-5, "warmup_ratio": 0.03, "num_train_epochs": 1,
    }  # fmt: skip


# --- settings, Python, links -----------------------------------------------------------------------


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json(block):
    content = json.loads(block.text)
    if "hd_pissa" in content:
        ds_config.split_section(content)


def test_the_section_with_its_defaults():
    (shown,) = [json.loads(b.text)["hd_pissa"] for b in of("json") if '"bucket_bytes"' in b.text]
    assert shown == HDPissaConfig().model_dump(mode="json")


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml(block, tmp_path):
    (tmp_path / "run.yaml").write_text(block.text)
    required = ["--ds_config", "zero3", "--model_name_or_path", "x", "--output_dir", "x"]
    script_arguments.read([*required, "--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python(block):
    """It compiles, what it imports is there, and so are the methods of the engine that it calls."""
    from hdpissa.engine import HDPissaEngine

    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("engine."):
            assert hasattr(HDPissaEngine, ast.unparse(node.func).split(".")[1]) or "plan" in ast.unparse(node.func)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hdpissa.engine."):
            assert hasattr(importlib.import_module("hdpissa.engine"), ast.unparse(node.func).split(".")[2])


# Options of programs that are not ours, or that have no parser to ask.
OTHERS = {"help", "version", "no_ssh", "module", "lanes", "golden", "data", "method", "checkpoint", "format", "dtype"}
OTHERS |= {
    "index-url",
    "torch-backend",
    "max-lora-rank",
    "config",
    "rank",
    "base_model",
    "json",
    "write",
    "signal",
    "import-mode",
    "logdir",
    "apply_chat_template",
}


@pytest.fixture(scope="module")
def options() -> set[str]:
    """All options that there are."""
    known = {f.name for cls in (plan_arguments.PlanArguments, section_flags.SectionArguments) for f in fields(cls)}
    for kind in script_arguments.KINDS:
        known |= {action.dest for action in script_arguments.Parser(kind)._actions} | script_arguments.SPELLINGS.keys()
    for command in ("evaluate", "export"):
        with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        known |= set(re.findall(r"--(\w+)", page.getvalue()))
    for values, switches in (train_launcher.DEEPSPEED, train_launcher.TORCHRUN):
        known |= values | switches
    return known | OTHERS


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_options_in_the_text_exist(page, options):
    """A renamed option is still in the text of a page."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    if page.parent.name == "benchmarks":  # options of scripts, in its blocks alone
        return
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", prose))
    assert sorted(mentioned - options) == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).lower() for text in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page):
    broken = []
    lines = [line for line in page.read_text().splitlines() if "**not measured yet**" not in line]
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(lines)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert broken == []


def test_every_page_is_linked_from_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text] == []


def test_hooks_use_what_is_installed():
    """.pre-commit-config.yaml: local hooks, whose programs `make venv` installs."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        done = subprocess.run(
            [*hook["entry"].split(), *(["--check"] if "format" in hook["entry"] else []), "setup.py"],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
