"""Which test holds which public option: one that fails when the option is ignored.

    python tests/options_held.py

prints the table as Markdown. Options are found by asking the commands themselves, so that a new one without a test is
noticed: `test_options_held.py` fails and says what to add here. A test is named "file::function", without ".py".
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LAUNCH = TESTS.parent / "launch"
# Command: the module of launch/ whose function (by default `parse`) makes its parser; absent ones are passed over.
COMMANDS = {
    "plan": ("plan_arguments", "parse"),
    "export": ("export", "parse"),
    "report": ("report", "parse"),
    "env": ("env_report", "main"),
    "demo-model": ("demo_model", "main"),
}
# Scripts of launch/ that are no command of their own.
NO_COMMANDS = {"train", "evaluate_model", "plan", "cli", "demo_report", "demo_data", "train_launcher"}

HELD: dict[str, dict[str, str]] = {
    "plan": {
        "--model_name_or_path": "test_plan_command::test_json",
        "--model": "test_plan_command::test_json",
        "--gpu": "test_plan_command::test_own_gpu",
        "--gpus": "test_plan_command::test_json",
        "--gpus_per_node": "test_options::test_plan",
        "--r": "test_options::test_plan",
        "--slices": "test_plan_command::test_table",
        "--max_length": "test_options::test_plan",
        "--per_device_train_batch_size": "test_options::test_plan",
        "--gradient_accumulation_steps": "test_options::test_plan",
        "--gradient_checkpointing": "test_options::test_plan",
        "--offload_param": "test_options::test_plan",
        "--master_format": "test_options::test_plan",
        "--bf16": "test_options::test_plan",
        "--ds_config": "test_plan_command::test_ds_config",
        "--deepspeed": "test_options::test_plan",
        "--deepspeed_config": "test_options::test_plan",
        "--trust_remote_code": "test_options::test_plan",
        "--table": "test_plan_command::test_table",
        "--explain": "test_plan_command::test_the_70b_plan",
        "--json": "test_plan_command::test_json",
    },
    "export": {
        "--checkpoint": "test_export_command::test_a_full_checkpoint_gives_what_the_engine_exports",
        "--format": "test_export_command::test_an_adapter_from_either_kind_is_the_engines",
        "--output_dir": "test_export_command::test_a_full_checkpoint_gives_what_the_engine_exports",
        "--dtype": "test_export_command::test_a_full_checkpoint_gives_what_the_engine_exports",
        "--rank": "test_export_command::test_a_cut_adapter_in_bf16",
        "--base_model": "test_export_command::test_bases_that_cannot_be_read",
    },
    "report": {"--output_dir": "test_report_of_a_run::test_the_command_draws_it_again"},
    "env": {"--json": "test_commands::test_env"},
    "demo-model": {"--output_dir": "test_options::test_demo_model_goes_where_it_is_told"},
    "hd_pissa": {
        "r": "test_engine::test_variants_against_the_oracle",
        "lora_alpha": "test_engine::test_variants_against_the_oracle",
        "slices": "test_engine::test_slices_are_not_ranks",
        "target_modules": "test_engine::test_variants_against_the_oracle",
        "exclude_modules": "test_engine::test_variants_against_the_oracle",
        "rank_pattern": "test_engine::test_rank_pattern_gives_each_module_its_own_rank",
        "modules_to_save": "test_modules_to_save::test_against_torch",
        "modules_to_save_learning_rate": "test_modules_to_save::test_against_torch",
        "init.method": "test_options::test_method_and_tolerance",
        "init.placement": "test_options::test_placement",
        "init.tol": "test_options::test_method_and_tolerance",
        "init.cache_dir": "test_decompose::test_a_second_start_reads_the_cache",
        "delta.exchange": "test_options::test_section_keys_reach_the_engine",
        "delta.dtype": "test_engine::test_bf16_on_the_wire",
        "delta.precision": "test_bad_input::test_one_line_and_exit_code_2",
        "delta.second_order": "test_engine::test_variants_against_the_oracle",
        "delta.bucket_bytes": "test_options::test_section_keys_reach_the_engine",
        "adam.betas": "test_engine::test_variants_against_the_oracle",
        "adam.eps": "test_engine::test_variants_against_the_oracle",
        "master.format": "test_options::test_section_keys_reach_the_engine",
        "master.device": "test_options::test_section_keys_reach_the_engine",
        "kernels.impl": "test_options::test_section_keys_reach_the_engine",
        "kernels.linear": "test_options::test_section_keys_reach_the_engine",
    },
}


# --- what there is ---------------------------------------------------------------------------------


class _FoundError(Exception):
    """Raised in place of parsing."""


@contextlib.contextmanager
def _parsers_kept() -> Iterator[list[argparse.ArgumentParser]]:
    """Within, no parser parses: it is put on the list, and whoever asked it is interrupted."""
    kept: list[argparse.ArgumentParser] = []
    originals = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")}

    def keep(self, *args, **kwargs):
        kept.append(self)
        raise _FoundError

    for name in originals:
        setattr(argparse.ArgumentParser, name, keep)
    try:
        yield kept
    finally:
        for name, original in originals.items():
            setattr(argparse.ArgumentParser, name, original)


def options_of(make: Callable) -> list[str]:
    """The long options of the parser that `make` asks to parse, in its order."""
    with _parsers_kept() as kept, contextlib.suppress(_FoundError):
        make(*([[]] if inspect.signature(make).parameters else []))
    (parser,) = kept
    spelt = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    names = dict.fromkeys(f"--{name[2:].replace('-', '_')}" for name in spelt)  # either spelling is one option
    others = {"--help", *(f"--no_{name[2:]}" for name in names)}  # of a switch that is on by default
    return [name for name in names if name not in others]


@functools.cache
def public_options() -> dict[str, list[str]]:
    """Command, or "hd_pissa" for the section of the JSON: its options."""
    found = {}
    for command, (module, function) in COMMANDS.items():
        if (LAUNCH / f"{module}.py").exists():
            found[command] = options_of(getattr(importlib.import_module(f"hdpissa.launch.{module}"), function))
    found["hd_pissa"] = section_keys()
    return found


def section_keys() -> list[str]:
    from pydantic import BaseModel

    from hdpissa.engine.config import HDPissaConfig

    keys = []
    for name, field in HDPissaConfig.model_fields.items():
        kind = field.annotation
        inner = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    return keys


# --- what holds it ---------------------------------------------------------------------------------


@functools.cache
def tests_in(file: str) -> frozenset[str]:
    """The test functions of tests/<file>.py."""
    path = TESTS / f"{file}.py"
    if not path.exists():
        return frozenset()
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset(n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


@functools.cache
def words_of(file: str) -> str:
    """The text of a test file and of the helpers in tests/ that it imports."""
    text = (TESTS / f"{file}.py").read_text()
    imported = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}
    return text + "".join((TESTS / f"{m}.py").read_text() for m in sorted(imported) if (TESTS / f"{m}.py").exists())


def problems() -> list[str]:
    """A line for everything that is wrong with the table, each saying what to do."""
    found = []
    for command, options in public_options().items():
        held = HELD.get(command, {})
        for option in options:
            if option not in held:
                found.append(
                    f"{command}: {option} is held by no test. Write one that fails when the option is ignored, and add "
                    f'"{option}": "test_file::test_function" to HELD["{command}"] in tests/options_held.py.'
                )
        found += [
            f'{command}: {option} stands in HELD["{command}"] of tests/options_held.py and is no option any more; '
            "remove the line, or correct the name."
            for option in held
            if option not in options
        ]
    return found + [problem for command, held in HELD.items() for problem in _idle_tests(command, held)]


def _idle_tests(command: str, held: dict[str, str]) -> Iterator[str]:
    for option, test in held.items():
        file, _, function = test.partition("::")
        where = f'HELD["{command}"]["{option}"] of tests/options_held.py names {test}'
        if function not in tests_in(file):
            yield f"{where}: there is no such test; correct the name (file without .py, two colons, function)."
        elif option.rsplit(".", 1)[-1].lstrip("-") not in words_of(file):
            yield f"{where}, but neither {file}.py nor a helper it imports mentions the option; name the right one."


def scripts_without_a_command() -> list[str]:
    """Scripts of launch/ that can be started and are in neither list."""
    known = {module for module, _ in COMMANDS.values()} | NO_COMMANDS
    return sorted(p.stem for p in LAUNCH.glob("*.py") if "__main__" in p.read_text() and p.stem not in known)


def main() -> int:
    print("| where | option | test |\n| --- | --- | --- |")
    for command, options in public_options().items():
        for option in options:
            print(f"| {command} | `{option}` | {HELD.get(command, {}).get(option, '**none**')} |")
    for problem in problems():
        print(problem, file=sys.stderr)
    return 1 if problems() else 0


if __name__ == "__main__":
    sys.exit(main())
