"""Combines TrainingArguments and the DeepSpeed JSON into one config for `initialize`, before a weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from hdpissa.engine.config import ds_config
from hdpissa.engine.config.section import HDPissaConfig
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.method import adapt
from hdpissa.engine.resolved_config import check_kernels, make_plan
from hdpissa.engine.sharding.slicing import SlicePlan

from .arguments import option

LAUNCHED = "ACCELERATE_DEEPSPEED_CONFIG_FILE"  # where `accelerate launch` puts the path of its JSON


@dataclass(frozen=True)
class RunConfig:
    """What a trainer's run is made from.

    Attributes:
        ds: the DeepSpeed JSON with all values of TrainingArguments filled in, and the section `hd_pissa`.
        section: the section, parsed. plan: slices and ranks.
    """

    ds: dict[str, Any]
    section: HDPissaConfig
    plan: SlicePlan


def read(args: TrainingArguments, defaults: dict[str, Any]) -> RunConfig:
    """Reads and checks the JSON of `TrainingArguments(deepspeed=…)`.

    Args:
        defaults: keys of the section that this trainer sets where the JSON is silent.

    Raises:
        ConfigError: anything in JSON or arguments that HD-PiSSA cannot run, or that they say differently.
    """
    source = args.deepspeed or os.environ.get(LAUNCHED)
    if not source:
        raise ConfigError(
            'TrainingArguments have no deepspeed=: give a DeepSpeed JSON with the section "hd_pissa", as in '
            "ds_configs/zero3.json"
        )
    raw = ds_config.read_ds_config(source)
    if "hd_pissa" not in raw:
        ds_config.split_section(raw)  # names a misspelt one
        raise ConfigError('the DeepSpeed config has no section "hd_pissa": add one; {} takes all defaults')
    _refuse(args)
    raw["hd_pissa"] = _with_adam({**defaults, **(raw["hd_pissa"] or {})}, raw, args)
    rest, section = ds_config.split_section(raw)
    ds_config.check_ds_config(rest)
    filled, _ = ds_config.fill_auto(rest, _train_values(args))
    plan = make_plan(section, args.gradient_accumulation_steps)
    check_kernels(section)
    return RunConfig(filled | {"hd_pissa": raw["hd_pissa"]}, section, plan)


def check_targets(model: Any, run: RunConfig, model_init_kwargs: dict[str, Any]) -> None:
    """Finds the weights that the section names, in the model or, given by name, in one of its class without weights.

    Raises:
        ConfigError: nothing matches, or a weight is too small for so many slices.
    """
    if isinstance(model, str):
        model = _without_weights(model, model_init_kwargs)
    if model is None:  # of a class of remote code: found out when it is there
        return
    adapt.find_targets(model, run.section, run.plan)


def _without_weights(name: str, kwargs: dict[str, Any]) -> Any:
    import transformers

    known = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = transformers.AutoConfig.from_pretrained(name, **known)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(config)


def _train_values(args: TrainingArguments) -> ds_config.TrainValues:
    return ds_config.TrainValues(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.world_size,
        max_grad_norm=args.max_grad_norm or 0.0,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        given=frozenset(ds_config.AGREED),
    )


def _with_adam(section: dict[str, Any], raw: dict[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """The section with `adam_beta1`, `adam_beta2`, `adam_epsilon` where the JSON is silent."""
    params = (raw.get("optimizer") or {}).get("params") or {}
    silent = [key for key in ("betas", "eps") if params.get(key, "auto") == "auto"]
    values = {"betas": [args.adam_beta1, args.adam_beta2], "eps": args.adam_epsilon}
    adam = {key: values[key] for key in silent} | (section.get("adam") or {})
    return {**section, "adam": adam} if adam else section


def _refuse(args: TrainingArguments) -> None:
    """Refuses arguments that would be ignored, or would change the order or number of a slice's rows."""
    accelerator: Any = args.accelerator_config  # an AcceleratorConfig once the arguments are made
    by_length = getattr(args, "train_sampling_strategy", "random") == "group_by_length"
    off = {
        "fp16": (args.fp16, "slice gradients would carry its loss scale; use bf16"),
        "use_cpu": (args.use_cpu, "it switches DeepSpeed off; without a GPU the CPU is taken by itself"),
        "weight_decay": (args.weight_decay, "the method has no such term; leave it out"),
        "auto_find_batch_size": (args.auto_find_batch_size, "slices have fixed micro-batches; ask `hdpissa plan`"),
        "torch_compile": (args.torch_compile, "ZeRO-3's hooks cut every layer into pieces; leave it out"),
        "save_only_model": (args.save_only_model, "a checkpoint is what a run goes on from; export it instead"),
        "load_best_model_at_end": (
            args.load_best_model_at_end and option(args, "checkpoint_kind") == "small",
            "small checkpoints (checkpoint_kind) hold no weights to put back",
        ),
        "fsdp": (args.fsdp, "W is sharded by ZeRO-3; leave it out"),
        "enable_jit_checkpoint": (
            getattr(args, "enable_jit_checkpoint", False),
            "it saves on one rank alone; SIGTERM saves on all of them here without it",
        ),
        "accelerator_config.split_batches": (accelerator.split_batches, "it would cut slices' micro-batches"),
        "accelerator_config.dispatch_batches": (
            accelerator.dispatch_batches,
            "each rank reads its slices' rows itself",
        ),
        "train_sampling_strategy": (by_length and "group_by_length", "the order of a slice's rows is fixed"),
    }
    found = [f"{name} is {value}: must be off, because {why}" for name, (value, why) in off.items() if value]
    if not str(getattr(args.optim, "value", args.optim)).startswith("adamw"):
        found.append(f"optim is {args.optim}: must be adamw_torch, because slices have their own Adam")
    if args.push_to_hub and args.hub_strategy != "end":
        strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
        found.append(f"hub_strategy is {strategy}: must be end, because checkpoints are not pushed")
    if found:
        raise ConfigError("; ".join(found))
