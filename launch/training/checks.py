"""Checks a run of train.py before it starts: the output folder, the model, its targets.

Nothing is written, and only the model's configuration and the headers of its files are read.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import trainers
from hdpissa.launch.common import hub
from hdpissa.launch.training import model_checks
from hdpissa.launch.training.results import wanted_exports
from hdpissa.launch.training.script_arguments import Arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

AUTO = ("auto", "true", "True", True)


def trainer_class(kind: str) -> Any:
    return getattr(trainers, f"HDPissa{kind.upper() if kind != 'reward' else 'Reward'}Trainer")


def check(arguments: Arguments) -> Any:
    """Runs all checks, alike on every rank; returns the model with empty (meta) weights."""
    from hdpissa.launch.trainers import config

    script, cls = arguments.script, trainer_class(arguments.kind)
    if not script.preview:
        check_output_dir(arguments)
    if script.export_rank is not None and (script.export_rank < 1 or script.export_format not in ("peft", "both")):
        raise ConfigError(
            f"--export_rank is {script.export_rank}: must be at least 1, with --export_format peft or both; leave it "
            f"out for the whole adapter"
        )
    run = config.read(arguments.training, cls.section_defaults)
    return check_targets(arguments, run)


def check_output_dir(arguments: Arguments) -> None:
    """Refuses a folder that holds another run, or a model that no export wrote."""
    script, args = arguments.script, arguments.training
    folder = Path(str(args.output_dir))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir {folder}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--output_dir {folder}: {there} must be writable; give another folder")
    used = next((name for name in ("run.json", "checkpoint-*/checkpoint.json") if any(folder.glob(name))), None)
    if used and not script.overwrite_output_dir and not _goes_on(args.resume_from_checkpoint, folder):
        raise ConfigError(
            f"--output_dir {folder} holds another run ({used}); give another folder, --overwrite_output_dir, or, to go "
            f"on with it from a checkpoint, --resume_from_checkpoint auto"
        )
    for name in wanted_exports(script.export_format).values():
        model_checks.check_export(folder / name, f"--output_dir {folder}", base=script.model_name_or_path)


def _goes_on(wanted: Any, folder: Path) -> bool:
    """Whether the run in the folder is the one that is to be resumed."""
    if wanted is None:
        return False
    if wanted not in AUTO:
        return folder.absolute() in (Path(wanted).absolute(), *Path(wanted).absolute().parents)
    state = folder / "run_state.json"
    return any(folder.glob("checkpoint-*")) or not state.exists() or '"finished"' not in state.read_text()


def check_targets(arguments: Arguments, run: Any) -> Any:
    """Finds the targets on an empty (meta) model, and returns that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from hdpissa.engine.export import lora_adapter
    from hdpissa.engine.method import adapt
    from hdpissa.engine.optim import modules_to_save

    script, trust = arguments.script, arguments.training.trust_remote_code
    name, more = str(script.model_name_or_path), dict[str, Any](trust_remote_code=trust)
    hub.check_model("--model_name_or_path", name)
    model_checks.check_folder(name)
    reward = {"num_labels": 1} if arguments.kind == "reward" else {}
    config = _read(name, lambda: AutoConfig.from_pretrained(name, revision=script.model_revision, **more, **reward))
    model_checks.check_config(name, config)
    kind = AutoModelForSequenceClassification if arguments.kind == "reward" else AutoModelForCausalLM
    if script.attn_implementation:
        more["attn_implementation"] = script.attn_implementation
    with torch.device("meta"), model_checks.quiet_transformers(), _without_zero_init(arguments.training):
        model = _read(name, lambda: kind.from_config(copy.deepcopy(config), **more))
    model_checks.check_causal(name, model)
    model_checks.check_weights(name)
    targets = adapt.find_targets(model, run.section, run.plan)
    modules_to_save.find(model, run.section.modules_to_save, targets)
    if script.export_format in ("peft", "both"):
        lora_adapter.refuse_modules_to_save(run.section.modules_to_save)
    return model


@contextlib.contextmanager
def _without_zero_init(training: TrainingArguments) -> Iterator[None]:
    """TrainingArguments have every model shard itself as it is made; one that is only looked at has no weights."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(training.hf_deepspeed_config)


def choose_reference(arguments: Arguments, rows: Any) -> None:
    """Has DPO precompute its reference's log-probabilities where memory requires it, unless the user decided."""
    from hdpissa.launch.training import reference as plan_reference

    with _without_zero_init(arguments.training):
        decision = plan_reference.choose(arguments, rows, plan_reference.smallest_gpu())
    if decision and arguments.training.process_index == 0:
        print(decision, file=sys.stderr)


def read_tokenizer(name: str, revision: str, trust_remote_code: bool) -> Any:
    """The model's tokenizer, with the EOS as pad token where it has none."""
    from transformers import AutoTokenizer

    more = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = _read(name, lambda: AutoTokenizer.from_pretrained(name, **more))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read(name: str, read: Any) -> Any:
    return hub.reading("--model_name_or_path", name, read, "give a causal language model")
