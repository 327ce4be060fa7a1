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
    "train": ("train_arguments", "parse"),
    "plan": ("plan_arguments", "parse"),
    "export": ("export", "parse"),
    "evaluate": ("evaluate", "parse"),
    "report": ("report", "main"),
    "env": ("env_report", "main"),
    "demo-model": ("demo_model", "main"),
}
# Scripts of launch/ that are no command of their own.
NO_COMMANDS = {"train", "plan", "cli", "demo_report", "demo_data", "train_launcher"}

HELD: dict[str, dict[str, str]] = {
    "train": {
        # run
        "--config": "test_train_arguments::test_yaml_equals_the_same_flags",
        "--ds_config": "test_train::test_run_json_tells_what_was_run",
        "--deepspeed": "test_train_arguments::test_other_names_of_the_config",
        "--deepspeed_config": "test_train_arguments::test_other_names_of_the_config",
        "--model_name_or_path": "test_families::test_gpt2_by_the_command",
        "--output_dir": "test_train::test_state_is_finished",
        "--ddp_timeout": "test_hosts::test_each_host_ends_in_time_and_says_why",
        "--hang_timeout": "test_faults::test_a_rank_that_hangs_is_named_in_time",
        "--max_skipped_steps": "test_nonfinite::test_skipped_steps_in_a_row_end_the_run",
        "--integrity_steps": "test_integrity::test_every_n_steps",
        "--local_rank": "test_train::test_from_a_yaml_file_the_run_is_described_alike",
        # data
        "--dataset_name": "test_options::test_splits_and_configurations",
        "--dataset_config": "test_options::test_splits_and_configurations",
        "--dataset_split": "test_options::test_splits_and_configurations",
        "--eval_dataset_name": "test_options::test_splits_and_configurations",
        "--eval_dataset_config": "test_eval_sets::test_a_configuration_and_a_revision_are_of_one_set",
        "--eval_dataset_revision": "test_eval_sets::test_a_configuration_and_a_revision_are_of_one_set",
        "--eval_dataset_format": "test_eval_sets::test_evaluation_rows_have_columns_and_a_format_of_their_own",
        "--eval_prompt_field": "test_eval_sets::test_evaluation_rows_have_columns_and_a_format_of_their_own",
        "--eval_response_field": "test_eval_sets::test_evaluation_rows_have_columns_and_a_format_of_their_own",
        "--eval_split": "test_eval_sets::test_a_split_for_each_evaluation_set",
        "--prompt_field": "test_options::test_columns",
        "--response_field": "test_options::test_columns",
        "--prompt_template": "test_options::test_prompts_and_lengths",
        "--max_length": "test_options::test_prompts_and_lengths",
        "--preprocessing_num_workers": "test_options::test_workers",
        "--dataset_revision": "test_data_options::test_revision_configuration_and_split_reach_the_hub_for_each_set",
        "--dataset_format": "test_data_options::test_format_is_recognised_told_and_given",
        "--dataset_text_field": "test_data_options::test_format_is_recognised_told_and_given",
        "--chat_template": "test_data_options::test_a_chat_template_is_used_for_alpaca_too_and_exported",
        "--train_on_prompt": "test_data_options::test_what_carries_loss",
        "--completion_only_loss": "test_data_options::test_what_carries_loss",
        "--assistant_only_loss": "test_data_options::test_what_carries_loss",
        "--truncation": "test_data_options::test_lengths_are_reported",
        "--packing": "test_data_options::test_packing_grouping_and_streaming",
        "--group_by_length": "test_data_options::test_packing_grouping_and_streaming",
        "--streaming": "test_data_options::test_packing_grouping_and_streaming",
        "--shuffle_buffer_size": "test_data_options::test_packing_grouping_and_streaming",
        "--loss_normalization": "test_data_options::test_first_loss_of_a_packed_run_is_that_of_its_rows_alone",
        "--preview": "test_data_options::test_preview_shows_rows_and_trains_nothing",
        # method
        "--r": "test_training_options::test_the_section_is_as_given",
        "--lora_alpha": "test_training_options::test_the_section_is_as_given",
        "--slices": "test_training_options::test_the_section_is_as_given",
        "--target_modules": "test_training_options::test_the_section_is_as_given",
        "--exclude_modules": "test_training_options::test_the_section_is_as_given",
        "--rank_pattern": "test_training_options::test_the_section_is_as_given",
        "--modules_to_save": "test_training_options::test_the_section_is_as_given",
        "--modules_to_save_learning_rate": "test_training_options::test_the_section_is_as_given",
        # training
        "--lr_scheduler_kwargs": "test_training_options::test_the_section_is_as_given",
        "--adam_beta1": "test_training_options::test_the_section_is_as_given",
        "--adam_beta2": "test_training_options::test_the_section_is_as_given",
        "--adam_epsilon": "test_training_options::test_the_section_is_as_given",
        "--activation_offloading": "test_training_options::test_offloading_activations_changes_no_bit",
        "--activation_offload": "test_training_options::test_offloading_activations_changes_no_bit",
        "--neftune_noise_alpha": "test_training_options::test_noise_is_added_in_training_only",
        "--use_liger_kernel": "test_training_options::test_liger_is_applied_where_it_is_installed",
        "--torch_compile": "test_training_options::test_mistakes_are_told_before_weights_are_read",
        "--callbacks": "test_callbacks::test_what_one_rank_wants_all_do",
        "--per_device_train_batch_size": "test_options::test_batches_and_steps",
        "--gradient_accumulation_steps": "test_options::test_batches_and_steps",
        "--learning_rate": "test_train::test_learning_rate_column",
        "--lr_scheduler_type": "test_training_options::test_the_section_is_as_given",
        "--warmup_ratio": "test_train::test_learning_rate_column",
        "--warmup_steps": "test_training_options::test_the_section_is_as_given",
        "--num_train_epochs": "test_options::test_batches_and_steps",
        "--max_steps": "test_options::test_batches_and_steps",
        "--max_grad_norm": "test_options::test_what_goes_into_the_json",
        "--seed": "test_options::test_batches_and_steps",
        "--bf16": "test_options::test_what_goes_into_the_json",
        "--gradient_checkpointing": "test_options::test_saving_and_export",
        "--attn_implementation": "test_options::test_saving_and_export",
        "--trust_remote_code": "test_options::test_code_of_the_model",
        # evaluation and logging
        "--per_device_eval_batch_size": "test_options::test_batches_and_steps",
        "--eval_steps": "test_train::test_rows_every_third_step_and_the_last",
        "--sample_prompt": "test_options::test_prompts_and_lengths",
        "--max_new_tokens": "test_options::test_prompts_and_lengths",
        "--logging_steps": "test_train::test_rows_every_third_step_and_the_last",
        "--eval_strategy": "test_evaluate_options::test_when_it_evaluates",
        "--eval_on_start": "test_evaluation::test_the_run_ends_early_and_exports_the_best",
        "--eval_exact_match": "test_evaluation::test_the_run_ends_early_and_exports_the_best",
        "--eval_max_samples": "test_evaluation::test_the_run_ends_early_and_exports_the_best",
        "--sample_steps": "test_evaluation::test_rows_of_all_kinds",
        "--num_samples": "test_evaluation::test_rows_of_all_kinds",
        "--load_best_model_at_end": "test_evaluation::test_the_run_ends_early_and_exports_the_best",
        "--metric_for_best_model": "test_evaluate_options::test_patience_threshold_and_metric",
        "--greater_is_better": "test_evaluate_options::test_patience_threshold_and_metric",
        "--early_stopping_patience": "test_evaluation::test_the_run_ends_early_and_exports_the_best",
        "--early_stopping_threshold": "test_evaluate_options::test_patience_threshold_and_metric",
        "--logging_first_step": "test_evaluation::test_rows_of_all_kinds",
        "--disable_tqdm": "test_evaluate_options::test_a_bar_on_a_terminal_unless_it_is_disabled",
        "--report_to": "test_evaluation::test_tensorboard_and_wandb_have_every_row",
        "--run_name": "test_evaluation::test_tensorboard_and_wandb_have_every_row",
        "--logging_dir": "test_evaluate_options::test_where_tensorboard_writes",
        "--slice_metrics_steps": "test_evaluation::test_rows_of_all_kinds",
        "--silent_slice_steps": "test_evaluate_options::test_patience_with_silent_slices",
        # checkpoints and export
        "--save_strategy": "test_options::test_saving_and_export",
        "--save_steps": "test_resume::test_checkpoints_every_two_steps_and_at_the_end",
        "--save_total_limit": "test_options::test_saving_and_export",
        "--checkpoint_kind": "test_options::test_saving_and_export",
        "--async_save": "test_options::test_saving_and_export",
        "--stop_on_save_error": "test_storage::test_a_run_that_cannot_save_goes_on_or_stops",
        "--resume_from_checkpoint": "test_resume::test_a_damaged_latest_checkpoint_is_passed_over",
        "--ignore_data_skip": "test_resume::test_other_data_begin_anew_where_that_is_wanted",
        "--export_format": "test_train::test_both_exports",
        "--export_dtype": "test_options::test_saving_and_export",
        "--export_rank": "test_train::test_both_exports",
        "--overwrite_output_dir": "test_train::test_overwriting_replaces_the_earlier_run",
    },
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
    "evaluate": {
        "--model": "test_evaluate::test_data_are_read_as_the_run_did",
        "--tasks": "test_evaluate::test_what_is_handed_to_lm_eval",
        "--num_fewshot": "test_evaluate::test_what_is_handed_to_lm_eval",
        "--limit": "test_evaluate::test_what_is_handed_to_lm_eval",
        "--trust_remote_code": "test_evaluate::test_what_is_handed_to_lm_eval",
        "--eval_exact_match": "test_evaluate_options::test_answers_and_results",
        "--eval_max_samples": "test_evaluate_options::test_answers_and_results",
        "--output_path": "test_evaluate_options::test_answers_and_results",
        "--device": "test_evaluate_options::test_answers_and_results",
        "--max_new_tokens": "test_evaluate_options::test_answers_and_results",
        "--batch_size": "test_evaluate_options::test_batches_are_of_that_size",
        "--dataset_name": "test_evaluate_options::test_templates_and_columns",
        "--prompt_field": "test_evaluate_options::test_templates_and_columns",
        "--response_field": "test_evaluate_options::test_templates_and_columns",
        "--dataset_format": "test_evaluate_options::test_templates_and_columns",
        "--dataset_text_field": "test_evaluate_options::test_templates_and_columns",
        "--prompt_template": "test_evaluate_options::test_templates_and_columns",
        "--chat_template": "test_evaluate_options::test_templates_and_columns",
        "--assistant_only_loss": "test_evaluate_options::test_templates_and_columns",
        "--dataset_split": "test_evaluate_options::test_which_tokens_count",
        "--max_length": "test_evaluate_options::test_which_tokens_count",
        "--truncation": "test_evaluate_options::test_which_tokens_count",
        "--train_on_prompt": "test_evaluate_options::test_which_tokens_count",
        "--completion_only_loss": "test_evaluate_options::test_which_tokens_count",
        "--dataset_config": "test_evaluate_options::test_what_reaches_the_reader",
        "--dataset_revision": "test_evaluate_options::test_what_reaches_the_reader",
        "--preprocessing_num_workers": "test_evaluate_options::test_what_reaches_the_reader",
    },
    "report": {},
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
