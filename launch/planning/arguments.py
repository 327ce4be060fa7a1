"""The command line of plan.py, and how it and a DeepSpeed JSON become a run.

Argument names and defaults are train.py's, the keys of `hd_pissa` among them. Where the JSON says something and the
command line says something else, that is an error, not a choice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import command_line, shipped_configs
from hdpissa.launch.common.command_line import option
from hdpissa.launch.common.section_flags import SectionArguments, merge, section_of
from hdpissa.launch.planning.objective import TRAINERS, Objective

if TYPE_CHECKING:  # --help and most mistakes need no torch
    from hdpissa.engine.config.ds_config import TrainValues
    from hdpissa.launch.planning.hardware import Cluster
    from hdpissa.launch.planning.model import Model
    from hdpissa.launch.planning.run import Run

# What a run without a JSON of its own would take.
DEFAULT_JSON = shipped_configs.FOLDER / "zero3.json"


@dataclass
class PlanArguments:
    """Shows before a run whether it fits and how fast it will be. Needs no GPU and no weights."""

    model_name_or_path: str = option("", "Hugging Face folder, config.json or hub name", aliases=["--model"])
    gpu: str = option("H100", "kind of GPU, or a JSON file with its numbers")
    gpus: int = option(8, "number of GPUs, one process each")
    gpus_per_node: int = option(8, "GPUs of a node")
    trainer: str = option("sft", f"what trains: {', '.join(TRAINERS)}")
    max_length: int | None = option(
        None, "tokens of a sequence, prompt included; every one is taken to be full (default sft 512, others 1024)"
    )
    per_device_train_batch_size: int | None = option(
        None, "rows of a micro-batch of one GPU (default sft 1, others 8); dpo and reward have two sequences in each"
    )
    gradient_accumulation_steps: int = option(1, "micro-batches of one GPU in an optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    cross_entropy: str = option("model", "sft: model, over all logits, or chunked, TRL's head in tiles")
    precompute_ref_log_probs: bool = option(False, "dpo, kto: the reference is asked before training, and not held")
    beta: float = option(0.0, "grpo: weight of the KL to a reference; above 0 one is held")
    ds3_gather_for_generation: bool = option(True, "grpo: gather the whole model while it generates")
    offload_param: bool = option(False, "keep shards and masters in host memory")
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


def parse(argv: list[str] | None = None) -> tuple[PlanArguments, dict[str, Any], frozenset[str]]:
    """(arguments, what flags say of the section, names of those that the user set). --help ends the process.

    Raises:
        ConfigError: unknown or missing arguments, values out of range.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = command_line.make_parser({"plan": PlanArguments, "hd_pissa": SectionArguments}, prog="hdpissa plan")
    values, given = command_line.read(parser, words, {"num_accelerators": "use --gpus", "num_gpus": "use --gpus"})
    args = PlanArguments(**{f.name: values[f.name] for f in fields(PlanArguments)})
    args.ds_config = shipped_configs.locate(args.ds_config)
    _check(args)
    return args, section_of(values), frozenset(given)


def _check(args: PlanArguments) -> None:
    if not args.model_name_or_path:
        raise ConfigError("missing --model_name_or_path; see --help")
    command_line.check_paths(args, "model_name_or_path", "gpu")
    command_line.one_of(args, "trainer", TRAINERS)
    command_line.one_of(args, "cross_entropy", ("model", "chunked"))
    if args.max_length is None:
        args.max_length = 512 if args.trainer == "sft" else 1024
    if args.per_device_train_batch_size is None:
        args.per_device_train_batch_size = 1 if args.trainer == "sft" else 8
    counts = ("gpus", "gpus_per_node", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    command_line.at_least(args, 1, *counts)
    command_line.at_least(args, 0, "beta")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise ConfigError(
            f"--gpus is {args.gpus} with --gpus_per_node {args.gpus_per_node}: must be whole nodes; "
            f"use {args.gpus // args.gpus_per_node * args.gpus_per_node}"
        )


def resolve(args: PlanArguments, flags: dict[str, Any], given: frozenset[str]) -> Run:
    """The run that arguments and JSON describe.

    Raises:
        ConfigError: what does not exist, is not valid, or is said in two ways.
    """
    from hdpissa.launch.planning.hardware import Cluster, read_gpu

    content = shipped_configs.read(args.ds_config or DEFAULT_JSON)
    if not args.ds_config:
        content.pop("hd_pissa", None)
    return make_run(args, content, flags, given, Cluster(read_gpu(args.gpu), args.gpus, args.gpus_per_node))


def make_run(
    args: PlanArguments, content: dict[str, Any], flags: dict[str, Any], given: frozenset[str], cluster: Cluster
) -> Run:
    """The same from a DeepSpeed JSON that has been read; `args` has no None."""
    from hdpissa.engine.config import ds_config, leaf_modules
    from hdpissa.launch.planning.gathers import Policy
    from hdpissa.launch.planning.run import Batch, Placement, Run

    merged, differ = merge(content, flags, {})
    raw, section = ds_config.split_section(merged)
    ds_config.check_ds_config(raw)
    said = _place_weights(raw, args, given, differ)
    model_config, values = _read_model(args, given)
    filled, values = ds_config.fill_auto(raw, values, differ)
    bf16 = ds_config.compute_dtype(filled) == "bf16"
    model = _build(model_config, args, bf16)
    objective = Objective.of(
        args.trainer,  # type: ignore[arg-type]
        args.cross_entropy,
        precomputed=args.precompute_ref_log_probs,
        beta=args.beta,
        gather=args.ds3_gather_for_generation,
    )
    batch = Batch(
        values.per_device_train_batch_size,
        args.max_length,  # type: ignore[arg-type]
        values.gradient_accumulation_steps,
        args.gradient_checkpointing,
        objective.sequences,
    )
    zero = leaf_modules.fill(ds_config.engine_ds_config(filled), model.module)["zero_optimization"]
    offload = (zero.get("offload_param") or {}).get("device") == "cpu"
    hpz = zero.get("zero_hpz_partition_size") or 1
    placement = Placement(2 if bf16 else 4, offload, section.master.format, section.master.device == "cpu", hpz)
    return Run(model, section, cluster, batch, placement, Policy.of(zero), zero, said, objective)


def _place_weights(
    raw: dict[str, Any], args: PlanArguments, given: frozenset[str], differ: list[str]
) -> dict[str, Any]:
    """Puts --offload_param into the JSON, or what they say differently into `differ`; returns `zero_optimization`."""
    zero: dict[str, Any] = raw["zero_optimization"]
    device = (zero.get("offload_param") or {}).get("device")
    if device is not None and "offload_param" in given and (device == "cpu") != args.offload_param:
        word = "is given" if args.offload_param else "is off"
        differ.append(f"zero_optimization.offload_param.device is {device} but --offload_param {word}")
    if args.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return dict(zero)


def _read_model(args: PlanArguments, given: frozenset[str]) -> tuple[Any, TrainValues]:
    """(the model's configuration, what the command line says about things that the JSON says too)."""
    from hdpissa.engine.config import ds_config
    from hdpissa.launch.planning.model import read_config

    model_config = read_config(args.model_name_or_path, args.trust_remote_code)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return model_config, ds_config.TrainValues(
        per_device_train_batch_size=args.per_device_train_batch_size,  # type: ignore[arg-type]
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.gpus,
        max_grad_norm=0.0,
        learning_rate=2e-5,
        bf16=args.bf16,
        hidden_size=getattr(text, "hidden_size", None),
        given=given,
    )


def _build(model_config: Any, args: PlanArguments, bf16: bool) -> Model:
    from hdpissa.launch.planning.model import build

    kind = {"trust_remote_code": args.trust_remote_code, "reward": args.trainer == "reward"}
    model = build(model_config, args.model_name_or_path, bf16=bf16, **kind)
    if args.gradient_checkpointing and not model.checkpointing:
        raise ConfigError(f"--gradient_checkpointing: {model.family} does not support it; leave it out")
    return model
