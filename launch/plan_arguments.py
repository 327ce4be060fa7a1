"""The command line of plan.py, and how it and a DeepSpeed JSON become a run.

Argument names and defaults are train.py's. Where the JSON says something and the command line says something else,
that is an error, not a choice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import command_line, help_pages, shipped_configs
from hdpissa.launch.command_line import option

if TYPE_CHECKING:  # --help and most mistakes need no torch
    from hdpissa.engine.config import HDPissaConfig
    from hdpissa.launch.plan_run import Run

# What a run without a JSON of its own would take.
DEFAULT_JSON = shipped_configs.FOLDER / "zero3.json"


@dataclass
class PlanArguments:
    """Shows before a run whether it fits and how fast it will be. Needs no GPU and no weights."""

    model_name_or_path: str = option("", "Hugging Face folder, config.json or hub name", aliases=["--model"])
    gpu: str = option("H100", "kind of GPU, or a JSON file with its numbers")
    gpus: int = option(8, "number of GPUs, one process each")
    gpus_per_node: int = option(8, "GPUs of a node")
    r: int = option(16, "rank of one slice")
    slices: str = option("auto", "number of slices; auto: one per GPU")
    max_length: int = option(512, "tokens of a row; every row is taken to be full")
    per_device_train_batch_size: int = option(1, "rows of a micro-batch of one GPU")
    gradient_accumulation_steps: int = option(1, "micro-batches of one GPU in an optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    offload_param: bool = option(False, "keep shards and masters in host memory")
    master_format: str = option("split", "exact weights: split (4 bytes per weight in all) or fp32 (6)")
    bf16: bool = option(True, "compute in bf16 where the JSON says auto or nothing; else fp32")
    ds_config: str = option(
        "",
        "DeepSpeed JSON with the section hd_pissa, or the name of one of ds_configs/; default: zero3",
        aliases=["--deepspeed", "--deepspeed_config"],
    )
    trust_remote_code: bool = option(False, "run model code that comes with the config")
    table: bool = option(False, "one line each for 1, 2, 4, … 1024 GPUs")
    explain: bool = option(False, "print formulas and assumptions")
    json: bool = option(False, "print one JSON object instead of tables")


OF_TRAIN = {"num_accelerators": "use --gpus", "num_gpus": "use --gpus"}  # train's names → what to do with them here
HELP = help_pages.Page(
    "Shows before a run whether it fits and how fast it will be. Needs no GPU and no weights.",
    (
        "hdpissa plan --model_name_or_path M --gpu H100 --gpus 8 --gradient_checkpointing",
        "hdpissa plan --model_name_or_path M --gpu H100 --table",
    ),
    ("model_name_or_path",),
)


def parse(argv: list[str] | None = None) -> tuple[PlanArguments, frozenset[str]]:
    """(arguments, names of those that the user set). --help is answered, and ends the process.

    Raises:
        ConfigError: unknown or missing arguments, values out of range.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if help_pages.answered(words, {"plan": PlanArguments}, HELP):
        raise SystemExit(0)
    parser = command_line.make_parser(PlanArguments)
    values, given = command_line.read(parser, words, OF_TRAIN)
    args = PlanArguments(**values)
    args.ds_config = shipped_configs.locate(args.ds_config)
    _check(args)
    return args, frozenset(given)


def _check(args: PlanArguments) -> None:
    if not args.model_name_or_path:
        raise ConfigError("missing --model_name_or_path; see --help")
    command_line.check_paths(args, "model_name_or_path", "gpu")
    counts = ("gpus", "gpus_per_node", "r", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    for name in counts:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}: must be at least 1")
    if args.slices != "auto" and not (args.slices.isdecimal() and int(args.slices) > 0):
        raise ConfigError(f"--slices is {args.slices}: must be an integer of at least 1, or auto (one per GPU)")
    if args.master_format not in ("split", "fp32"):
        raise ConfigError(f"--master_format is {args.master_format}: must be split or fp32")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise ConfigError(
            f"--gpus is {args.gpus} with --gpus_per_node {args.gpus_per_node}: must be whole nodes; "
            f"use {args.gpus // args.gpus_per_node * args.gpus_per_node}"
        )


def resolve(args: PlanArguments, given: frozenset[str]) -> Run:
    """The run that arguments and JSON describe.

    Raises:
        ConfigError: what does not exist, is not valid, or is said in two ways.
    """
    from hdpissa.engine import ds_config, leaf_modules
    from hdpissa.launch.plan_gathers import Policy
    from hdpissa.launch.plan_hardware import Cluster, read_gpu
    from hdpissa.launch.plan_model import build, read_config
    from hdpissa.launch.plan_run import Batch, Placement, Run

    cluster = Cluster(read_gpu(args.gpu), args.gpus, args.gpus_per_node)
    raw, section = _sections(args, given)
    model_config = read_config(args.model_name_or_path, args.trust_remote_code)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    values = ds_config.TrainValues(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.gpus,
        max_grad_norm=0.0,
        learning_rate=2e-5,
        bf16=args.bf16,
        hidden_size=getattr(text, "hidden_size", None),
        given=given,
    )
    filled, values = ds_config.fill_auto(raw, values)
    bf16 = ds_config.compute_dtype(filled) == "bf16"
    model = build(model_config, args.model_name_or_path, trust_remote_code=args.trust_remote_code, bf16=bf16)
    if args.gradient_checkpointing and not model.checkpointing:
        raise ConfigError(f"--gradient_checkpointing: {model.family} does not support it; leave it out")
    micro, accumulation = values.per_device_train_batch_size, values.gradient_accumulation_steps
    batch = Batch(micro, args.max_length, accumulation, args.gradient_checkpointing)
    master = section.master
    zero = leaf_modules.fill(ds_config.engine_ds_config(filled), model.module)["zero_optimization"]
    offload = (zero.get("offload_param") or {}).get("device") == "cpu"
    hpz = zero.get("zero_hpz_partition_size") or 1
    placement = Placement(2 if bf16 else 4, offload, master.format, master.device == "cpu", hpz)
    return Run(model, section, cluster, batch, placement, Policy.of(zero), zero)


def _sections(args: PlanArguments, given: frozenset[str]) -> tuple[dict[str, Any], HDPissaConfig]:
    """DeepSpeed's part of the JSON and ours, the command line worked in."""
    from hdpissa.engine import ds_config

    content = shipped_configs.read(args.ds_config or DEFAULT_JSON)
    if not args.ds_config:
        content.pop("hd_pissa", None)
    raw, section = ds_config.split_section(content)  # refuses what is malformed
    ds_config.check_ds_config(raw)
    said = content.get("hd_pissa", {})
    differ: list[str] = []
    slices = "auto" if args.slices == "auto" else int(args.slices)
    ours = {"r": args.r, "slices": slices}
    for name, value in ours.items():
        if name in given and said.get(name, "auto") not in ("auto", value):
            differ.append(f"hd_pissa.{name} is {said[name]} but --{name} is {value}")
    form = said.get("master", {}).get("format")
    if form is not None and "master_format" in given and form != args.master_format:
        differ.append(f"hd_pissa.master.format is {form} but --master_format is {args.master_format}")
    zero = raw["zero_optimization"]
    device = (zero.get("offload_param") or {}).get("device")
    if device is not None and "offload_param" in given and (device == "cpu") != args.offload_param:
        word = "is given" if args.offload_param else "is off"
        differ.append(f"zero_optimization.offload_param.device is {device} but --offload_param {word}")
    if differ:
        raise ConfigError(
            f"config and command line must agree: {', '.join(differ)}; correct {args.ds_config} or drop the arguments"
        )
    if args.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    changes: dict[str, Any] = {name: value for name, value in ours.items() if said.get(name, "auto") == "auto"}
    if form is None:
        changes["master"] = section.master.model_copy(update={"format": args.master_format})
    return raw, section.model_copy(update=changes)
