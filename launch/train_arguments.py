"""The command line of train.py: Hugging Face's names, read by Hugging Face's own parser.

`--config run.yaml` gives the same keys from a file; what stands on the command line wins. Unknown names
are refused with the nearest valid one. Imports neither torch nor DeepSpeed at module level.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import command_line
from hdpissa.launch.command_line import option


@dataclass
class TrainArguments:
    """Fine-tunes a causal language model with HD-PiSSA on DeepSpeed ZeRO-3."""

    ds_config: str = option(
        "", "DeepSpeed JSON with the section hd_pissa", aliases=["--deepspeed", "--deepspeed_config"]
    )
    model_name_or_path: str = option("", "Hugging Face folder or hub name")
    dataset_name: str = option("", "jsonl, json, csv or parquet file, a folder of them, or a hub name")
    output_dir: str = option("", "folder for metrics, run state and the trained model")
    dataset_config: str | None = option(None, "configuration of a hub dataset")
    dataset_split: str = option("train", "split to train on; slices such as train[:80] work")
    eval_dataset_name: str | None = option(None, "dataset to evaluate on; default: --eval_split of --dataset_name")
    eval_split: str | None = option(None, "split to evaluate on (default 'train' of --eval_dataset_name)")
    prompt_field: str = option("instruction", "column with the prompt")
    response_field: str = option("response", "column with the answer")
    prompt_template: str = option("alpaca", "'alpaca', 'none', a file, or a text with {instruction}")
    max_length: int = option(512, "tokens of prompt and answer together; longer rows are cut")
    per_device_train_batch_size: int = option(1, "rows of a micro-batch")
    per_device_eval_batch_size: int = option(8, "rows of an evaluation batch")
    gradient_accumulation_steps: int = option(1, "micro-batches of a rank in an optimizer step")
    learning_rate: float = option(2e-5, "peak learning rate")
    lr_scheduler_type: str = option("cosine", "cosine, linear, constant or constant_with_warmup")
    warmup_ratio: float = option(0.03, "share of all steps, rounded down, that warm up")
    warmup_steps: int | None = option(None, "warm-up steps; wins over --warmup_ratio")
    num_train_epochs: float = option(1.0, "epochs")
    max_steps: int = option(-1, "optimizer steps; when positive it wins over --num_train_epochs")
    max_grad_norm: float = option(0.0, "clips the L2 norm over all slices' factor gradients; 0 is off, as published")
    seed: int = option(42, "seed of the data order")
    bf16: bool = option(False, "compute in bf16 where the JSON says auto; else fp32")
    gradient_checkpointing: bool = option(False, "recompute activations in backward (non-reentrant)")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    logging_steps: int = option(1, "optimizer steps between two lines and metrics rows")
    eval_steps: int = option(0, "optimizer steps between evaluations; 0: before and after training only")
    save_strategy: str = option("steps", "when to save a checkpoint: steps (and at the end), epoch, or no")
    save_steps: int = option(500, "optimizer steps between two checkpoints")
    save_total_limit: int | None = option(None, "checkpoints to keep; default: all")
    checkpoint_kind: str = option("full", "full: exact; small: without weights, exact to first order")
    async_save: bool = option(False, "write checkpoints in the background, from copies in host memory")
    stop_on_save_error: bool = option(False, "end the run when a checkpoint cannot be saved; else it goes on")
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint's folder; auto: the latest one of --output_dir, or a new run where there is none"
    )
    ignore_data_skip: bool = option(False, "resume with other data, from their beginning")
    export_format: str = option("hf", "hf: the model in model/; peft: a LoRA adapter in adapter/; both, or none")
    export_dtype: str = option("auto", "dtype of what is exported: auto (compute dtype; adapter: fp32), bf16 or fp32")
    export_rank: int | None = option(None, "cuts the adapter to this rank; all of it is 2·r·S")
    sample_prompt: str | None = option(None, "an instruction whose greedy answer is printed before and after training")
    max_new_tokens: int = option(128, "length of that answer")
    preprocessing_num_workers: int | None = option(None, "processes that tokenise")
    ddp_timeout: int = option(1800, "seconds that ranks wait for each other; then the run has lost one, and ends")
    hang_timeout: int | None = option(
        None, "seconds within which a run that stands still ends and names who hangs; default 600, or --ddp_timeout"
    )
    max_skipped_steps: int = option(10, "skipped steps in a row that end the run (not finite); 0: never")
    integrity_steps: int = option(
        0, "optimizer steps between two checks that what must not differ, or change, does not; 0: none"
    )
    overwrite_output_dir: bool = option(False, "let this run replace the one in --output_dir")
    local_rank: int = option(-1, "set by the deepspeed launcher; the environment is what counts")

    @property
    def hang_s(self) -> int:
        """Seconds within which a run that stands still ends."""
        return min(self.ddp_timeout, 600) if self.hang_timeout is None else self.hang_timeout

    @property
    def required(self) -> tuple[str, ...]:
        return ("ds_config", "model_name_or_path", "dataset_name", "output_dir")


def parse(argv: list[str] | None = None) -> tuple[TrainArguments, frozenset[str]]:
    """(arguments, names of those that the user set).

    Raises:
        ConfigError: unknown or missing arguments, values out of range.
    """
    parser = command_line.make_parser(TrainArguments)
    parser.add_argument("--config", help="YAML file with the same keys; the command line wins")
    values, on_command_line = command_line.read(parser, list(sys.argv[1:] if argv is None else argv))
    file = values.pop("config")
    on_command_line.discard("config")
    from_file = _read_yaml(file) if file else {}
    for name, value in from_file.items():
        if name not in on_command_line:
            values[name] = value
    args = TrainArguments(**values)
    _check(args)
    return args, frozenset(on_command_line | set(from_file))


def _read_yaml(path: str) -> dict[str, Any]:
    """The keys of a YAML file, with the types that the dataclass declares."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not UTF-8 text; give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold keys and values, such as 'learning_rate: 2e-5'")
    # not dataclasses.fields: the parser has replaced the types there
    fields = get_type_hints(TrainArguments)
    spellings = [name for name in ("ds_config", "deepspeed", "deepspeed_config") if name in content]
    if len(spellings) > 1:
        raise ConfigError(f"--config {path}: {' and '.join(spellings)} mean the same; keep one of them")
    if spellings:
        content["ds_config"] = content.pop(spellings[0])
    for name, value in content.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(fields)}"
            raise ConfigError(f"--config {path}: unknown key {name}; {hint}")
        content[name] = _convert(name, value, fields[name])
    return content


def _convert(name: str, value: Any, declared: Any) -> Any:
    """YAML reads 2e-5 as text and 3 as an integer; a wrong type is refused."""
    kinds = get_args(declared) or (declared,)  # of `int | None` both
    words_of_yaml = {("save_strategy", False): "no", ("resume_from_checkpoint", True): "auto"}
    if isinstance(value, bool) and (name, value) in words_of_yaml:
        return words_of_yaml[name, value]
    if type(value) in kinds:  # type(): a bool is an int to isinstance
        return value
    if float in kinds and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            return float(value)
    words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f"--config: {name} is {value!r}, must be {words}; correct it")


_SAVE_STRATEGIES, _CHECKPOINT_KINDS = ("steps", "epoch", "no"), ("full", "small")
_EXPORT_FORMATS = ("hf", "peft", "both", "none")
_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def _check(args: TrainArguments) -> None:
    missing = [f"--{name}" for name in args.required if not getattr(args, name)]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}; see --help")
    if args.lr_scheduler_type not in _SCHEDULES:
        raise ConfigError(f"--lr_scheduler_type is {args.lr_scheduler_type}: must be one of {', '.join(_SCHEDULES)}")
    for name, valid in (("save_strategy", _SAVE_STRATEGIES), ("checkpoint_kind", _CHECKPOINT_KINDS)):
        if getattr(args, name) not in valid:
            raise ConfigError(f"--{name} is {getattr(args, name)}: must be one of {', '.join(valid)}")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise ConfigError(
            f"--save_total_limit is {args.save_total_limit}: must be at least 1; leave it out to keep all"
        )
    _check_export(args)
    for name in (
        "max_length",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "max_new_tokens",
        "ddp_timeout",
        "save_steps",
    ):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}: must be at least 1")
    if not 1 <= args.hang_s <= args.ddp_timeout:
        raise ConfigError(
            f"--hang_timeout is {args.hang_s} and --ddp_timeout {args.ddp_timeout}: must be from 1 to --ddp_timeout, "
            f"after which a collective ends the run anyway"
        )
    if not 0 <= args.warmup_ratio <= 1:
        raise ConfigError(
            f"--warmup_ratio is {args.warmup_ratio}: must be from 0 to 1; use --warmup_steps for a number"
        )
    counts = ("warmup_steps", "eval_steps", "max_skipped_steps", "integrity_steps")
    for name in ("learning_rate", *counts, "max_grad_norm", "seed"):
        if not (getattr(args, name) or 0) >= 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}: must not be negative")
    if args.max_steps == 0 or (args.max_steps < 0 and not 0 < args.num_train_epochs < float("inf")):
        raise ConfigError(
            f"--max_steps is {args.max_steps} and --num_train_epochs {args.num_train_epochs}: nothing to train; "
            "make one of them positive"
        )


def _check_export(args: TrainArguments) -> None:
    if args.export_format not in _EXPORT_FORMATS:
        raise ConfigError(f"--export_format is {args.export_format}: must be one of {', '.join(_EXPORT_FORMATS)}")
    if args.export_rank is not None and (args.export_rank < 1 or args.export_format not in ("peft", "both")):
        raise ConfigError(
            f"--export_rank is {args.export_rank}: must be at least 1, with --export_format peft or both; leave it out "
            f"for the whole adapter"
        )
    if args.export_dtype not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"--export_dtype is {args.export_dtype}: must be auto, bf16 or fp32")
