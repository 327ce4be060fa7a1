"""The command line of train.py: Hugging Face's names, read by Hugging Face's own parser.

`--config run.yaml`, or `run.yaml` as the first word, gives the same keys from a file; what stands on the command
line wins. Unknown names are refused with the nearest valid one; those of the published reference are understood
(reference_names.py). Imports neither torch nor DeepSpeed at module level.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from hdpissa.engine.errors import ConfigError
from hdpissa.engine.launcher import read_launch, speaking_rank
from hdpissa.launch import (
    command_line,
    help_pages,
    options_data,
    options_evaluation,
    options_method,
    options_reporting,
    options_running,
    options_saving,
    options_training,
    reference_names,
    shipped_configs,
)
from hdpissa.launch.foreign_names import hint

OPTIONS = {  # in the order of --help; each file has its options and what their values may be
    "run": (options_running.RunningOptions, options_running.check),
    "data": (options_data.DataOptions, options_data.check),
    "method": (options_method.MethodOptions, options_method.check),
    "training": (options_training.TrainingOptions, options_training.check),
    "evaluation": (options_evaluation.EvaluationOptions, options_evaluation.check),
    "logging": (options_reporting.ReportingOptions, options_reporting.check),
    "checkpoints and export": (options_saving.SavingOptions, options_saving.check),
}
REQUIRED = ("ds_config", "model_name_or_path", "dataset_name", "output_dir")
SECTIONS = {name: section for name, (section, _) in OPTIONS.items()}
HELP = help_pages.Page(
    "Fine-tunes a causal language model with HD-PiSSA on DeepSpeed ZeRO-3.",
    (
        "hdpissa train [launcher] [run.yaml] --ds_config F --model_name_or_path M --dataset_name D --output_dir O",
        "",
        "launcher   --num_accelerators N, --hostfile F, --master_port P, …: deepspeed's;",
        "           --nproc_per_node N, --nnodes N, --rdzv_endpoint H, …: torchrun's;",
        "           none: the deepspeed launcher with all devices of this machine",
        "run.yaml   the same names in a file (also --config run.yaml); what stands on the command line wins",
        "",
        "Names of the reference code (--model_path, --ranks_per_gpu, --lr, …) are understood, too.",
    ),
    REQUIRED,
    reference_names.SAME,
)


@dataclass
class TrainArguments(
    options_saving.SavingOptions,
    options_reporting.ReportingOptions,
    options_evaluation.EvaluationOptions,
    options_training.TrainingOptions,
    options_method.MethodOptions,
    options_data.DataOptions,
    options_running.RunningOptions,
):
    """Fine-tunes a causal language model with HD-PiSSA on DeepSpeed ZeRO-3."""


def help_shown(argv: list[str]) -> bool:
    """Whether the command line has asked for help, and got it."""
    return help_pages.answered(argv, SECTIONS, HELP)


def parse(argv: list[str] | None = None, *, launched: bool = True) -> tuple[TrainArguments, frozenset[str]]:
    """(arguments, names of those that the user set). --help is answered, and ends the process.

    Args:
        launched: False where a launcher is still to be started, and so nobody knows how many processes there are.

    Raises:
        ConfigError: unknown or missing arguments, values out of range.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if help_shown(words):
        raise SystemExit(0)
    processes = read_launch(os.environ).world_size if launched else None
    words, notes = reference_names.translate(_with_config(words), processes)
    parser = command_line.make_parser(SECTIONS)
    parser.add_argument("--config", help="YAML file with the same keys; the command line wins")
    values, on_command_line = command_line.read(parser, words)
    file = values.pop("config")
    on_command_line.discard("config")
    from_file, more = _read_yaml(file, processes) if file else ({}, [])
    for name, value in from_file.items():
        if name not in on_command_line:
            values[name] = value
    args = TrainArguments(**values)
    args.ds_config = shipped_configs.locate(args.ds_config)
    notes += options_running.shorten_timeout(args)
    _check(args)
    if launched and speaking_rank(os.environ) == "0":
        for note in [*notes, *more]:
            print(f"note: {note}", file=sys.stderr)
    return args, frozenset(on_command_line | set(from_file))


def _with_config(words: list[str]) -> list[str]:
    """`run.yaml …` as `--config run.yaml …`; the deepspeed launcher puts --local_rank=N before it."""
    for place, word in enumerate(words[:2]):
        if word.endswith((".yaml", ".yml")) and all(before.startswith("--local_rank=") for before in words[:place]):
            return [*words[:place], "--config", *words[place:]]
    return words


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f'the key "{twice}" stands twice; keep one of them')
        return super().construct_mapping(node, deep)


def _read_yaml(path: str, processes: int | None) -> tuple[dict[str, Any], list[str]]:
    """(keys of a YAML file with the types that the dataclass declares, notes on the reference's names)."""
    try:
        content = yaml.load(Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig"), Loader=_OnceLoader)
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
    notes = reference_names.rename(content, processes)
    for name, value in content.items():
        if name not in fields:
            raise ConfigError(f"--config {path}: unknown key {name}; {hint(str(name), fields)}")
        content[name] = _convert(name, value, fields[name])
    return content, notes


TYPES = {
    type(None): "null", list[str]: "a list of texts", str: "a text", float: "a number", int: "a whole number",
    bool: "true or false",
}  # fmt: skip


def _convert(name: str, value: Any, declared: Any) -> Any:
    """YAML reads 2e-5 as text and 3 as an integer; a wrong type is refused."""
    kinds = get_args(declared) or (declared,)  # of `int | None` both
    words_of_yaml = {(name, False): "no" for name in ("save_strategy", "eval_strategy")}
    words_of_yaml |= {("resume_from_checkpoint", True): "auto"}
    if isinstance(value, bool) and (name, value) in words_of_yaml:
        return words_of_yaml[name, value]
    if isinstance(value, dict) and str in kinds:  # an option that takes JSON
        with contextlib.suppress(TypeError, ValueError):  # a date, say, which JSON does not know
            return json.dumps(value)
    if list[str] in kinds and isinstance(value, list | str):
        return [str(part) for part in value] if isinstance(value, list) else [value]
    if isinstance(value, list) and name.endswith("dataset_name"):  # several sets, which the command line has in quotes
        return " ".join(map(str, value))
    if type(value) in kinds:  # type(): a bool is an int to isinstance
        return value
    if str in kinds and type(value) in (int, float):  # slices: 8, where there may also stand auto
        return str(value)
    if list[str] in kinds and (type(value) is str or (isinstance(value, list) and all(type(v) is str for v in value))):
        return [value] if isinstance(value, str) else value
    if float in kinds and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            return float(value)
    words = " or ".join(TYPES.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
    raise ConfigError(f"--config: {name} is {value!r}, must be {words}; correct it")


def _check(args: TrainArguments) -> None:
    missing = [f"--{name}" for name in REQUIRED if not getattr(args, name)]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}; see --help")
    for _, check in OPTIONS.values():
        check(args)  # type: ignore[operator]
