"""Everything of a training run that is known before any weight is read; what a person can get wrong ends here.

Runs on every rank alike, writes nothing and starts no process group, so that a mistake costs seconds and nothing
is lost. Heavy imports stay inside the functions: most mistakes are found without torch.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.engine.hub_errors import explain, reason
from hdpissa.launch import model_checks, shipped_configs
from hdpissa.launch.options_method import section_options
from hdpissa.launch.train_callbacks import load
from hdpissa.launch.train_model import check_model, model_options

MOST_STEPS = 10**9
AUTO = ("auto", "true", "True")  # --resume_from_checkpoint; the latter two are how Hugging Face's True arrives


@dataclass
class Job:
    """What is known of a run before any weight is read."""

    ds: dict
    plan: Any
    weights: int  # that a token is multiplied with
    tokenizer: Any
    rows: Any  # what was read
    data: Any  # training batches
    total_steps: int
    callbacks: list[Any] = field(default_factory=list)  # instances
    notes: list[str] = field(default_factory=list)  # what counts for nothing in this run, a line each


def check(args: Any, given: frozenset[str]) -> Job:
    """Reads everything but weights, on every rank alike; writes nothing and starts no process group.

    Args:
        args: get what the JSON says instead of a default, and whole numbers for shares of all steps.
    """
    from hdpissa.engine import ds_config
    from hdpissa.engine.settings import check_kernels, make_plan
    from hdpissa.launch.model_work import active_weights
    from hdpissa.launch.train_data import make_batches, read_rows
    from hdpissa.launch.train_notes import notes
    from hdpissa.launch.train_schedule import check_schedule, resolve_shares

    check_output_dir(args)
    model_config = read_model_config(args)
    ds, hd, values = resolve_ds_config(args, given, model_config)
    for name in ds_config.AGREED:  # so that run.json, checkpoints, callbacks and the card say what is run
        setattr(args, name, getattr(values, name))
    plan = make_plan(hd, args.gradient_accumulation_steps)
    check_kernels(hd)
    model = check_targets(model_config, hd, plan, args)
    callbacks = load(args.callbacks or [])
    tokenizer = read_tokenizer(args)
    rows = read_rows(args, given, tokenizer)
    data = make_batches(
        args,
        rows,
        tokenizer,
        slices=plan.slices,
        micro_batches=plan.micro_batches_per_slice(args.gradient_accumulation_steps),
        size=args.per_device_train_batch_size,
    )
    total_steps = count_steps(args, data.steps_per_epoch)
    resolve_shares(args, total_steps)
    check_schedule(args, args.learning_rate, total_steps)
    check_vocabulary(rows, data, model_config)
    told = notes(args, given, rows, total_steps)
    return Job(ds, plan, active_weights(model), tokenizer, rows, data, total_steps, callbacks, told)


def check_files(args: Any, given: frozenset[str]) -> None:
    """As much of `check` as takes neither torch nor knowing how many processes there are: folders, files, the JSON."""
    from hdpissa.engine import data_sources, ds_config

    check_output_dir(args)
    check_model_folder(args.model_name_or_path)
    raw, _, differ = read_section(args, given)
    # Of the reference's --accumulation_steps each process has a share, and nobody knows yet how many there are.
    known = given - {"gradient_accumulation_steps"}
    ds_config.check_values(raw, train_values(args, known, world_size=1), differ)  # 1: any number will do
    for option in ("dataset_name", "eval_dataset_name"):
        if name := getattr(args, option):
            for source in data_sources.parse_sources(name, f"--{option}"):
                data_sources.check_there(source.name)


def check_output_dir(args: Any) -> None:
    """Refuses a folder that holds another run; every rank looks before any rank writes. A preview writes nothing."""
    if args.preview:
        return
    folder = Path(args.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir {folder}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--output_dir {folder}: {there} must be writable; give another folder")
    used = next((name for name in ("run.json", "checkpoint-*/checkpoint.json") if any(folder.glob(name))), None)
    if used and not args.overwrite_output_dir and not goes_on(args, folder):
        raise ConfigError(f"--output_dir {folder} holds another run ({used}); {_instead(args)}")
    for name in export_folders(args.export_format).values():
        model_checks.check_export(folder / name, f"--output_dir {folder}", base=args.model_name_or_path)


def _instead(args: Any) -> str:
    """Of a folder with another run."""
    if args.resume_from_checkpoint in AUTO:  # which only a finished run without checkpoints does not allow
        return "it is finished and kept no checkpoint to go on from: give another folder, or --overwrite_output_dir"
    return "give another folder, --overwrite_output_dir, or --resume_from_checkpoint auto to go on with it"


def export_folders(formats: str) -> dict[str, str]:
    """Format → the name of its folder in the output folder, of those that --export_format says."""
    names = {"hf": "model", "peft": "adapter"}
    return {kind: name for kind, name in names.items() if formats in (kind, "both")}


def goes_on(args: Any, folder: Path) -> bool:
    """Whether the run in the folder is the one that is to be resumed."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return False
    if wanted not in AUTO:
        return folder.absolute() in (Path(wanted).absolute(), *Path(wanted).absolute().parents)
    state = folder / "run_state.json"
    return any(folder.glob("checkpoint-*")) or not state.exists() or '"finished"' not in state.read_text()


def read_model_config(args: Any) -> Any:
    """The model's config.json; ConfigError when there is no such model."""
    from transformers import AutoConfig

    name = args.model_name_or_path
    check_model_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # whatever a damaged file leads to
        said, remedy = explained(name, error, "give a Hugging Face folder or name")
        raise ConfigError(f"--model_name_or_path {name}: no usable model there ({said}); {remedy}") from None
    model_checks.check_config(name, config)
    return config


def check_model_folder(name: str) -> None:
    """Refuses a path that is not there, and a folder that holds an adapter."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"--model_name_or_path {name}: no such folder; give a Hugging Face folder or hub name")
    model_checks.check_folder(name)


def explained(name: str, error: Exception, otherwise: str) -> tuple[str, str]:
    """(what is wrong, the remedy) of what cannot be read from a folder, or from the hub."""
    if "trust_remote_code" in str(error):
        return reason(error), "read that code, and give --trust_remote_code"
    return (None if Path(name).exists() else explain(error)) or (reason(error), otherwise)


def read_section(args: Any, given: frozenset[str]) -> tuple[dict, Any, list[str]]:
    """(DeepSpeed's part of the JSON, ours with what the command line says, values in which the two differ)."""
    from hdpissa.engine import ds_config, overrides

    adam = {name: getattr(args, name) for name in overrides.ADAM if name in given}
    merged, differ = overrides.merge(shipped_configs.read(args.ds_config), section_options(args), adam)
    raw, hd = ds_config.split_section(merged)
    ds_config.check_ds_config(raw)
    return raw, hd, differ


def resolve_ds_config(args: Any, given: frozenset[str], model_config: Any) -> tuple[dict, Any, Any]:
    """(DeepSpeed config with every "auto" filled, hd_pissa config, the values both sides agree on)."""
    from hdpissa.engine import ds_config, zero3

    raw, hd, differ = read_section(args, given)
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    hidden_size = getattr(text_config, "hidden_size", None)
    asked = train_values(args, given, world_size=zero3.read_launcher()[1], hidden_size=hidden_size)
    filled, values = ds_config.fill_auto(raw, asked, differ)
    zero3.check_zero_section(ds_config.engine_ds_config(filled)["zero_optimization"])
    return {**filled, "hd_pissa": hd.model_dump(mode="json")}, hd, values


def train_values(args: Any, given: frozenset[str], **known: Any) -> Any:
    """What the command line says of values that the JSON may have, too."""
    from hdpissa.engine.ds_config import AGREED, TrainValues

    return TrainValues(**{name: getattr(args, name) for name in AGREED}, given=given, **known)


def check_targets(model_config: Any, hd: Any, plan: Any, args: Any) -> Any:
    """Finds the targets on an empty (meta) model, and returns that."""
    import torch
    from transformers import AutoModelForCausalLM

    from hdpissa.engine import adapt, modules_to_save, peft_export

    try:
        with torch.device("meta"), model_checks.quiet_transformers():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), **model_options(args))
    except Exception as error:  # no causal language model, an attention that is not there, sizes that do not fit
        attention = f", --attn_implementation {args.attn_implementation}" if args.attn_implementation else ""
        raise ConfigError(
            f"--model_name_or_path {args.model_name_or_path}{attention}: cannot be built ({reason(error)}); "
            f"give a causal language model, and an attention that it has, such as eager or sdpa"
        ) from None
    model_checks.check_causal(args.model_name_or_path, model)
    model_checks.check_weights(args.model_name_or_path)
    targets = adapt.find_targets(model, hd, plan)
    modules_to_save.find(model, hd.modules_to_save, targets)
    if args.packing:
        refuse_stateful(model)
    if args.export_format in ("peft", "both"):
        peft_export.refuse_tied(model, targets)
        peft_export.refuse_beside(hd.modules_to_save)
    check_model(args, model)
    return model


def refuse_stateful(model: Any) -> None:
    """What a model carries along from token to token it carries from one packed row into the next, too."""
    config = model.config.get_text_config()
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if "attention" not in kind or "linear" in kind}
    if kinds or getattr(model, "_is_stateful", False):
        raise ConfigError(
            f"--packing: {type(model).__name__} carries a state from one packed row into the next"
            f"{f' ({chr(44).join(sorted(kinds))})' if kinds else ''}; leave it out"
        )


def read_tokenizer(args: Any, *, option: str = "--model_name_or_path") -> Any:
    """The model's tokenizer, with the EOS as pad token where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # the tokenizers library raises just that
        said, remedy = explained(args.model_name_or_path, error, "put the model's tokenizer files beside it")
        raise ConfigError(f"{option} {args.model_name_or_path}: no usable tokenizer there ({said}); {remedy}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(rows: Any, data: Any, model_config: Any) -> None:
    """Refuses token ids that the model has no embedding for; they would be an IndexError in the first forward."""
    import pyarrow.compute as pc

    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    size = getattr(text_config, "vocab_size", None)
    tables = [part.dataset.data for part in (rows.train, rows.held_out) if hasattr(part, "dataset")]
    found = [pc.max(pc.list_flatten(table.column("input_ids"))).as_py() for table in tables]
    if not hasattr(rows.train, "dataset"):  # a stream: what it begins with
        found += [max(row["input_ids"]) for unit in data.units(0, 0, 0) for row in unit]
    for largest in found:
        if size is not None and largest is not None and largest >= size:
            raise ConfigError(
                f"the tokenizer gives token {largest} but the model has {size} embeddings; use the tokenizer that "
                f"belongs to the model"
            )


def count_steps(args: Any, steps_per_epoch: int) -> int:
    """Optimizer steps of the run; refuses a run of none."""
    if args.max_steps > 0:
        return args.max_steps
    wanted = args.num_train_epochs * steps_per_epoch
    if wanted > MOST_STEPS:
        raise ConfigError(
            f"--num_train_epochs is {args.num_train_epochs} and an epoch has {steps_per_epoch} steps: must be at most "
            f"{MOST_STEPS} in all; lower it"
        )
    steps = int(wanted)
    if steps == 0:
        raise ConfigError(
            f"--num_train_epochs is {args.num_train_epochs} and an epoch has {steps_per_epoch} steps: not one whole "
            f"step to train; raise it, or give --max_steps"
        )
    return steps
