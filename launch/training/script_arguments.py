"""The command line of train.py: TRL's parser over TRL's argument classes, ours, and the keys of `hd_pissa`.

The JSON overrides the script's defaults. Where it differs from an option that the user gave, the run ends before
anything is read.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

import torch
import trl
import yaml

from hdpissa.engine.config import ds_config
from hdpissa.engine.distributed.launcher import read_launch
from hdpissa.engine.errors import ConfigError
from hdpissa.launch import trainers
from hdpissa.launch.common import shipped_configs
from hdpissa.launch.common.section_flags import ADAM, SectionArguments, merge, section_of
from hdpissa.launch.trainers.arguments import (
    HDPissaDPOConfig,
    HDPissaGRPOConfig,
    HDPissaKTOConfig,
    HDPissaRewardConfig,
    HDPissaSFTConfig,
)

Kind = Literal["sft", "dpo", "grpo", "kto", "reward"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Where TRL's defaults differ. docs/training.md has the table.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "max_grad_norm": 0.0,
    "logging_steps": 1, "gradient_checkpointing": False, "bf16": torch.cuda.is_available(),
}  # fmt: skip
SFT_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5, "per_device_train_batch_size": 1, "max_length": 512, "loss_normalization": "mean",
    "cross_entropy": None,
}  # fmt: skip
SPELLINGS = {  # other names of the same options
    "ds_config": "deepspeed", "deepspeed_config": "deepspeed", "dataset_split": "dataset_train_split",
    "eval_split": "dataset_test_split",
}  # fmt: skip
# What TRL's scripts take for PEFT: the remedy here.
OF_PEFT = {
    "use_peft": "leave it out, W itself is trained", "lora_r": "the rank of a slice is --r",
    "lora_target_modules": "name them by --target_modules", "lora_modules_to_save": "name them by --modules_to_save",
    "lora_dropout": "leave it out, the method has none", "load_in_4bit": "leave it out, W is trained and stays exact",
    "load_in_8bit": "leave it out, W is trained and stays exact",
}  # fmt: skip
REQUIRED = ("deepspeed", "model_name_or_path", "output_dir")


@dataclass
class ScriptArguments(trl.ScriptArguments):
    """Options of train.py that are not its trainer's."""

    trainer: Kind = field(default="sft", metadata={"help": "What trains."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hugging Face folder or hub name."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, …"})
    dataset_name: str | None = field(  # type: ignore[assignment]  # None: the file of --config has `datasets`
        default=None, metadata={"help": "jsonl, json, csv, parquet file, folder (saved by datasets, too), or hub name."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub dataset."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on, also train[:80]. (--dataset_split)"}
    )
    dataset_test_split: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Split to evaluate on; of --eval_dataset_name train. (--eval_split)"}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Dataset to evaluate on."})
    prompt_field: str | None = field(default=None, metadata={"help": "Column of prompts; default instruction."})
    response_field: str | None = field(default=None, metadata={"help": "Column of answers; default response."})
    prompt_template: str = field(
        default="alpaca", metadata={"help": "Of those two columns: alpaca, none, a file, or text with {instruction}."}
    )
    sample_prompt: list[str] | None = field(
        default=None, metadata={"help": "Instructions whose greedy answers are kept before and after training."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Length of these answers."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Evaluations without improvement that end the run; 0: never."}
    )
    export_format: Literal["hf", "peft", "both", "none"] = field(
        default="hf", metadata={"help": "hf: the model in model/; peft: a LoRA adapter in adapter/."}
    )
    export_dtype: Literal["auto", "bf16", "fp32"] = field(
        default="auto", metadata={"help": "auto: the compute dtype; of an adapter fp32."}
    )
    export_rank: int | None = field(default=None, metadata={"help": "Cuts the adapter to this rank; whole it is 2rS."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run in output_dir."})
    preview: int = field(
        default=0, metadata={"help": "Print this many training rows, what carries loss marked, and train nothing."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "GRPO: names in trl.rewards, or import paths such as my_package.rewards.short."}
    )
    reward_model_name_or_path: str | None = field(default=None, metadata={"help": "GRPO: a reward model."})


@dataclass(frozen=True)
class Arguments:
    """A command line: of the script, of the trainer, of the data mixture; `given`: options that the user set."""

    script: ScriptArguments
    training: HDPissaSFTConfig | HDPissaDPOConfig | HDPissaGRPOConfig | HDPissaKTOConfig | HDPissaRewardConfig
    mixture: trl.DatasetMixtureConfig
    given: frozenset[str]

    @property
    def kind(self) -> Kind:
        return self.script.trainer


class Parser(trl.TrlParser):
    """`trl.TrlParser` whose values are a namespace, whose mistakes are ConfigErrors; `given`: what the user set."""

    def __init__(self, kind: str) -> None:
        name = kind.upper() if kind != "reward" else "Reward"
        config = getattr(trainers, f"HDPissa{name}Config")
        types = [ScriptArguments, SectionArguments, config, trl.DatasetMixtureConfig]
        super().__init__(types, prog="train.py", allow_abbrev=False)
        self.set_defaults(**DEFAULTS, **(SFT_DEFAULTS if kind == "sft" else {}), disable_tqdm=not sys.stderr.isatty())
        self.given: set[str] = set()
        for action in self._actions:
            if action.nargs is None and getattr(action.type, "__name__", "") == "string_to_bool":
                action.nargs, action.const = "?", True  # of `bool | None`: --bf16 alone means yes, too

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        named = {SPELLINGS.get(key, key): value for key, value in config.items()}
        for key, value in named.items():
            if key.endswith("_strategy") and value is False:  # what YAML makes of `no`
                named[key] = "no"
        self._refuse(sorted(named.keys() - {action.dest for action in self._actions}))
        self.given |= named.keys()
        return super().set_defaults_with_config(**named)

    def parse_args_into_dataclasses(self, args: Any = None, **_: Any) -> Any:  # type: ignore[override]
        values, unknown = self.parse_known_args(args)
        self._refuse(unknown)
        names = {name: action.dest for action in self._actions for name in action.option_strings}
        self.given |= {names[word.split("=")[0]] for word in args if word.split("=")[0] in names}
        return values

    def _refuse(self, unknown: list[str]) -> None:
        if unknown:
            name = unknown[0].split("=")[0].lstrip("-")
            near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1, cutoff=0.7)
            remedy = OF_PEFT.get(name) or (f"did you mean --{near[0]}?" if near else "see --help")
            raise ConfigError(f"unknown argument {unknown[0]}; {remedy}")


def parse(argv: list[str]) -> Arguments:
    """The whole command line, and the YAML of `--config`; values agree with the DeepSpeed JSON.

    Raises:
        ConfigError: an option that is unknown, missing, out of range, or differs from the JSON.
    """
    parser, values = read(argv)
    with _mistakes():
        script, _, training, mixture = parser.parse_dict(values)
    return Arguments(script, training, mixture, frozenset(parser.given))


def read(argv: list[str]) -> tuple[Parser, dict[str, Any]]:
    """The same before the argument classes are made, which set up devices and wait for all ranks."""
    parser, values = parse_options(argv)
    with _mistakes():
        _agree(values, parser.given)
        _choose_evaluation(values, parser.given)
        if "activation_checkpointing" in values and values["activation_checkpointing"] is None:  # its new name
            values["activation_checkpointing"] = values["gradient_checkpointing"]
    return parser, values


def parse_options(argv: list[str]) -> tuple[Parser, dict[str, Any]]:
    """The options alone, as the command line and the YAML have them; asks neither launcher nor devices.

    Raises:
        ConfigError: an option that is unknown or missing, a value that its option does not take, an unreadable YAML.
    """
    with _mistakes():
        words = _spelt(argv)
        parser = Parser(_kind(words))
        values = vars(parser.parse_args_and_config(words))
        if missing := [f"--{name}" for name in REQUIRED if not values[name]]:
            raise ConfigError(f"missing {', '.join(missing)}; see --help")
    return parser, values


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """Turns what parsers and argument classes raise into ConfigErrors."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def help_text(argv: list[str]) -> str:
    """The --help text for the trainer that a command line names."""
    return Parser(_kind(argv)).format_help()


def _spelt(argv: list[str]) -> list[str]:
    """One spelling of each option; `run.yaml` first is `--config run.yaml` (deepspeed puts --local_rank before it)."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name == "--config" and equals:
            words += [name, value]
        elif word.endswith((".yaml", ".yml")) and all(w.startswith("--local_rank=") for w in words):
            words += ["--config", word]
        elif name.startswith("--"):
            words.append(f"--{SPELLINGS.get(name[2:], name[2:])}{equals}{value}")
        else:
            words.append(word)
    return words


def _kind(words: list[str]) -> str:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--trainer")
    first.add_argument("--config")
    found = first.parse_known_args(words)[0]
    kind = found.trainer
    if kind is None and found.config:
        with open(found.config, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        kind = content.get("trainer") if isinstance(content, dict) else None
    if kind not in (None, *KINDS):
        raise ConfigError(f"--trainer is {kind}: must be one of {', '.join(KINDS)}")
    return kind or "sft"


def _agree(values: dict[str, Any], given: set[str]) -> None:
    """Merges the flags of `hd_pissa` into the JSON, and the JSON's values into the defaults."""
    raw = shipped_configs.read(shipped_configs.locate(values["deepspeed"]))
    adam = {name: values[name] for name in ADAM if name in given}
    merged, differ = merge(raw, section_of(values), adam)
    rest, _ = ds_config.split_section(merged)
    ds_config.check_ds_config(rest)
    shared = {name: values[name] for name in ds_config.AGREED}
    wanted = ds_config.TrainValues(**shared, world_size=read_launch(os.environ).world_size, given=frozenset(given))
    _, agreed = ds_config.fill_auto(rest, wanted, differ)
    batch = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )  # zero.Init reads them
    values |= {name: getattr(agreed, name) for name in ds_config.AGREED} | {"deepspeed": batch | merged}


EVALUATING = {"eval_strategy", "eval_steps"}


def _choose_evaluation(values: dict[str, Any], given: set[str]) -> None:
    """With evaluation rows: before and after training, and every eval_steps; without: never."""
    if values["push_to_hub"]:
        raise ConfigError("--push_to_hub: a run pushes nothing; afterwards `hf upload REPO OUTPUT_DIR/model`")
    best = values["metric_for_best_model"] or values["load_best_model_at_end"]
    if values["early_stopping_patience"] and not (best and given & EVALUATING):
        raise ConfigError(
            "--early_stopping_patience needs evaluations to compare: give --eval_steps and --metric_for_best_model "
            "eval_loss"
        )
    rows = values["eval_dataset_name"] or values["dataset_test_split"] or values["test_split_size"]
    if not rows:
        wanted = next((name for name in ("eval_strategy", "eval_steps", "eval_on_start") if name in given), None)
        if wanted and values[wanted] not in ("no", False):
            raise ConfigError(f"--{wanted} needs evaluation rows: give --eval_dataset_name or --eval_split")
        return
    if "eval_strategy" not in given and "eval_steps" in given:
        values["eval_strategy"] = "steps"
    if "eval_on_start" not in given:
        values["eval_on_start"] = True
