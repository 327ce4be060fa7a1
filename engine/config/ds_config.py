"""The DeepSpeed JSON: read it, refuse what HD-PiSSA cannot run, fill "auto", add what our engine needs.

In this order: `read_ds_config`, `split_section`, `check_ds_config`, `fill_auto`, `engine_ds_config`.
Every function works on plain dicts and returns a new one; neither deepspeed nor torch is imported, so
that a bad config is refused in milliseconds, on every rank alike, before the first collective.

"Works unchanged" is the aim for configs published for the Hugging Face Trainer: the same keys may be
"auto" as there (transformers, `HfTrainerDeepSpeedConfig`), and Accelerate's YAML is read as Accelerate
reads it. What would be ignored in silence (weight decay, a schedule, fp8) is refused instead.

It does not check the values that DeepSpeed checks itself.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from . import leaf_modules
from .section import HDPissaConfig, fail, show
from .section import read_ds_config as read_ds_config  # the first of the steps above


@dataclasses.dataclass(frozen=True)
class TrainValues:
    """The settings that both the command line and the JSON have."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    max_grad_norm: float
    learning_rate: float
    bf16: bool
    hidden_size: int | None = None  # of the model; None while it is unknown
    given: frozenset[str] = frozenset()  # the fields that the user set, as opposed to our defaults


# The fields that are agreed on.
AGREED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "learning_rate", "bf16"
)  # fmt: skip


def _at(ds: Any, path: str) -> Any:
    """The value at a dotted path, None if any part of it is absent or no object."""
    for key in path.split("."):
        ds = ds.get(key) if isinstance(ds, dict) else None
    return ds


def _object_at(ds: Any, path: str) -> dict[str, Any]:
    """The object at a dotted path, empty if there is none."""
    value = _at(ds, path)
    return value if isinstance(value, dict) else {}


def _put(ds: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        ds[key] = ds.get(key) or {}  # null counts as absent
        ds = ds[key]
    ds[last] = value


def _is_on(value: Any) -> bool:
    """Whether a switch is on: true, "true" (pydantic takes it), a positive size, or a section that is
    not empty and not disabled. "auto" is off: nothing here fills it with true."""
    if isinstance(value, dict):
        return bool(value) and _is_on(value.get("enabled", True))
    if isinstance(value, str):
        return value.lower() == "true"
    return value > 0 if isinstance(value, int | float) else bool(value)


def split_section(ds: dict[str, Any]) -> tuple[dict[str, Any], HDPissaConfig]:
    """Takes `hd_pissa` out: (the rest, our config). No section means all defaults.

    `betas` and `eps` of the DeepSpeed optimizer section become ours where `hd_pissa.adam` is silent.

    Raises ConfigError for a misspelt section name, for anything wrong in the section, and where
    `hd_pissa.adam` and the optimizer section disagree.
    """
    rest = copy.deepcopy(ds)
    section = rest.pop("hd_pissa", {})
    # DeepSpeed takes unknown top-level keys in silence; "hdpissa" would train with the defaults.
    misspelt = difflib.get_close_matches("hd_pissa", [str(key).lower() for key in rest], n=1, cutoff=0.75)
    if misspelt:
        fail([f'{misspelt[0]}: unknown section; did you mean "hd_pissa"?'])
    return rest, HDPissaConfig.from_dict(section).with_optimizer(_object_at(rest, "optimizer.params"))


_OBJECTS: tuple[str, ...] = ("zero_optimization", "bf16", "bfloat16", "fp16", "optimizer", "scheduler")
_OBJECTS += ("zero_optimization.offload_param", "zero_optimization.offload_optimizer")
_OBJECTS += ("optimizer.params", "scheduler.params")

_QUANTIZED = "the update needs W's own 16-bit shard, not a quantised one"
_ONE_GROUP = "all ranks together must hold each W in one group of shards"
_REMOVED = "DeepSpeed 0.19.8 has no such feature any more"

# Switches that must be off, with the reason and, where it is not "remove it", the remedy.
_MUST_BE_OFF = {
    "fp16.enabled": "slice gradients would carry its loss scale; use bf16",
    "fp8.enabled": "there are no fp8 matrix products here; use bf16",
    "torch_autocast.enabled": "W would be kept in another dtype than bf16.enabled says; use bf16",
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": "slice gradients do not pass through ZeRO",
    "weight_quantization": _QUANTIZED,
    "zero_optimization.zenflow": "it transposes W in place",
    "zero_optimization.offload_optimizer.super_offload": "slices have their own Adam",
    "hybrid_engine.enabled": "it holds a second copy of W that updates would not reach",
    "pipeline": _ONE_GROUP,
    "sequence_parallel.enabled": _ONE_GROUP,
    "expert_parallel.enabled": _ONE_GROUP,
    "compile.deepcompile": "it replaces the gathers that the update relies on; use torch.compile",
    "checkpoint.load_universal": "it restores the base W without an error; remove it",
    "zero_optimization.zeropp_loco_param": _REMOVED,
}
_MUST_BE_ONE = {
    "sequence_parallel_size": _ONE_GROUP,
    "tensor_parallel.autotp_size": _ONE_GROUP,
    "tensor_parallel.tp.tp_size": _ONE_GROUP,
}
# DeepSpeed 0.19.8 raises if one of these is so much as present. Switched on it is refused; switched
# off (older configs carry `"amp": {"enabled": false}`) it has no effect, and `engine_ds_config` drops it.
_REMOVED_SECTIONS: tuple[str, ...] = ("amp", "elasticity", "sparse_gradients", "sparse_attention", "nebula")
_REMOVED_SECTIONS += ("eigenvalue", "compression_training", "quantize_training", "graph_harvesting")
_REMOVED_SECTIONS += ("curriculum_learning", "progressive_layer_drop")


def check_ds_config(ds: dict[str, Any]) -> None:
    """Refuses what would fail later, give wrong weights, or be ignored silently.

    Raises ConfigError: one line that names every such key with the reason and the remedy.
    """
    problems = _misspelt(ds) + _malformed(ds) + _zero_problems(ds)
    wrong = [
        (path, "off", reason)
        for path, reason in (_MUST_BE_OFF | dict.fromkeys(_REMOVED_SECTIONS, _REMOVED)).items()
        if _is_on(_at(ds, path))
    ] + [(path, "1", reason) for path, reason in _MUST_BE_ONE.items() if _at(ds, path) not in (None, "auto", 0, 1)]
    for path, rule, reason in wrong:
        remedy = "" if ";" in reason else "; remove it"
        problems.append(f"{path} is {show(_at(ds, path), 60)}: must be {rule}, because {reason}{remedy}")
    problems += _optimizer_problems(ds) + _scheduler_problems(ds)
    problems += [
        f'{key} is "auto": nothing fills it in; remove it'
        for key, value in ds.items()
        if value == "auto" and key not in _FILLED and key != "train_batch_size"
    ]
    if problems:
        fail(["DeepSpeed config: " + problems[0], *problems[1:]])


# What DeepSpeed would pass over in silence if it were misspelt, and what looks like one of them but is another key.
_SPELT: tuple[str, ...] = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SPELT += ("gradient_clipping", "zero_optimization", "optimizer", "scheduler", "fp16", "bf16")
_ALIKE = ("bfloat16", "fp8")


def _misspelt(ds: dict[str, Any]) -> list[str]:
    found = []
    for key in ds.keys() - {*_SPELT, *_ALIKE}:
        if near := difflib.get_close_matches(str(key).lower(), _SPELT, n=1, cutoff=0.85):
            found.append(f'{key}: unknown key; did you mean "{near[0]}"?')
    return sorted(found)


def _malformed(ds: dict[str, Any]) -> list[str]:
    values = {path: _at(ds, path) for path in _OBJECTS}
    return [
        f"{path} is {show(value, 60)}: must be an object; see DeepSpeed's config documentation"
        for path, value in values.items()
        if value is not None and not isinstance(value, dict)
    ]


def _zero_problems(ds: dict[str, Any]) -> list[str]:
    zero, problems = _object_at(ds, "zero_optimization"), []
    if zero.get("stage") != 3:
        found = f"is {show(zero['stage'])}" if "stage" in zero else "is missing"
        reason = "because W is updated in the shards of ZeRO-3; set it"
        problems.append(f"zero_optimization.stage {found}: must be 3, {reason}")
    if _at(zero, "offload_param.device") == "nvme":
        reason = "because a shard on NVMe cannot be updated in place"
        problems.append(f'zero_optimization.offload_param.device is "nvme": must be "cpu", {reason}; set it')
    return problems + [
        f"zero_optimization.{key} is {show(value)}: must be off, because {_REMOVED}; remove it"
        for key, value in zero.items()
        if key.startswith("mics_") and _is_on(value)
    ]


# Taken over (lr, betas, eps), or only a choice of DeepSpeed's implementation.
_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "torch_adam", "adam_w_mode", "fused")


def _optimizer_problems(ds: dict[str, Any]) -> list[str]:
    """Adam is ours (`hd_pissa.adam`), so the section may only say what we do anyway."""
    kind, problems = _object_at(ds, "optimizer").get("type", "AdamW"), []
    if str(kind).lower() not in ("adam", "adamw"):
        problems.append(f'optimizer.type is {show(kind)}: must be "AdamW", because slices use Adam; set it')
    ours = {"weight_decay": 0, "bias_correction": True, "amsgrad": False}
    return problems + [
        f"optimizer.params.{name} is {show(value)}: must be left out, because the method has no such term"
        for name, value in _object_at(ds, "optimizer.params").items()
        if name not in _OPTIMIZER_PARAMS and value not in (None, "auto", ours.get(name))
    ]


def _scheduler_problems(ds: dict[str, Any]) -> list[str]:
    """A section with nothing but "auto" and defaults has no effect; it is dropped later on."""
    params = _object_at(ds, "scheduler.params")
    idle = {"warmup_min_lr": 0, "last_batch_iteration": -1}  # DeepSpeed's own defaults
    given = [key for key, value in params.items() if value not in (None, "auto", idle.get(key))]
    remedy = "use --lr_scheduler_type, --warmup_ratio and --learning_rate"
    reason = f"must be left out, because the schedule is ours and it would be ignored; {remedy}"
    return [f"scheduler sets {', '.join(given)}: {reason}"] if given else []


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 1  # type(): a bool is an int to isinstance


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


# JSON path: the field of TrainValues, what makes a value valid, and the rule for messages.
_FILLED: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", _is_count, "an integer of at least 1"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", _is_count, "an integer of at least 1"),
    "gradient_clipping": ("max_grad_norm", _is_amount, "a finite number of at least 0"),
    "optimizer.params.lr": ("learning_rate", _is_amount, "a finite number of at least 0"),
    "bf16.enabled": ("bf16", lambda value: isinstance(value, bool), "true or false"),
}


def fill_auto(ds: dict[str, Any], args: TrainValues, differ: Sequence[str] = ()) -> tuple[dict[str, Any], TrainValues]:
    """Fills "auto" and absent values from the command line: (the config, the values both agree on).

    A concrete value in the JSON wins over a default of ours. If `train_batch_size` is concrete and
    neither source fixes the accumulation, the accumulation follows from it. Sizes that depend on the model stay
    "auto" while `hidden_size` is unknown (DeepSpeed then takes its defaults). `differ`: further
    disagreements of JSON and command line that the caller has found, reported with the rest.

    Raises ConfigError: one line with all values that are invalid, and all that the JSON and an
    argument given by the user set differently.
    """
    out, values, fixed, problems, differ = _fill(ds, args, differ)
    if not problems:
        values = _fit_batch(out, values, "gradient_accumulation_steps" not in fixed | args.given, differ)
    problems += second_copy_problems(_at(out, "zero_optimization.zero_hpz_partition_size"), args.world_size)
    if differ:
        remedy = 'set these config values to "auto" or drop the arguments'
        problems = [*problems, f"config and command line must agree: {', '.join(differ)}; {remedy}"]
    if problems:
        fail(["DeepSpeed config: " + problems[0], *problems[1:]])
    _fill_off_and_sizes(out, args.hidden_size)
    return out, values


def _fill(
    ds: dict[str, Any], args: TrainValues, differ: Sequence[str]
) -> tuple[dict[str, Any], TrainValues, set[str], list[str], list[str]]:
    """(config, values both agree on, those that the config fixes, invalid ones, disagreements)."""
    if problems := _malformed(ds):
        fail(problems)
    out, values, differ = copy.deepcopy(ds), args, list(differ)
    if "bfloat16" in out:  # DeepSpeed's older spelling; transformers reads only the newer one
        old = out.pop("bfloat16")
        out["bf16"] = old if out.get("bf16") is None else out["bf16"]
    fixed = {field for path, (field, *_) in _FILLED.items() if _at(out, path) not in (None, "auto")}
    for path, (field, is_valid, rule) in _FILLED.items():
        theirs, ours = _at(out, path), getattr(args, field)
        if isinstance(theirs, str):
            theirs = {"true": True, "false": False}.get(theirs.lower(), theirs)
        value, name = (theirs, path) if field in fixed else (ours, f"--{field}")
        if not is_valid(value):
            problems.append(f"{name} is {show(value)}: must be {rule}; correct it")
        elif field in fixed & args.given and theirs != ours:
            differ.append(f"{path} is {show(theirs)} but --{field} is {show(ours)}")
        _put(out, path, value)
        values = dataclasses.replace(values, **{field: value})
    return out, values, fixed, problems, differ


def second_copy_problems(size: Any, world_size: int) -> list[str]:
    """hpZ keeps a second copy of W in every so many consecutive ranks, which ought to be those of a host."""
    if not _is_count(size) or world_size % min(size, world_size) == 0:
        return []
    return [
        f"zero_optimization.zero_hpz_partition_size is {size} with {world_size} ranks: must divide them; set it to the "
        f"number of ranks on a host"
    ]


def _fit_batch(out: dict[str, Any], values: TrainValues, free: bool, differ: list[str]) -> TrainValues:
    """Sets `train_batch_size`, or derives the accumulation from a concrete one if that is `free`."""
    total = out.get("train_batch_size")
    per_step = values.per_device_train_batch_size * values.world_size
    if free and _is_count(total) and total % per_step == 0:
        values = dataclasses.replace(values, gradient_accumulation_steps=total // per_step)
    accumulation = values.gradient_accumulation_steps
    if total not in (None, "auto", per_step * accumulation):
        differ.append(
            f"train_batch_size is {show(total)} but micro-batch {values.per_device_train_batch_size} × "
            f"accumulation {accumulation} × {values.world_size} ranks is {per_step * accumulation}"
        )
    out |= {"train_batch_size": per_step * accumulation, "gradient_accumulation_steps": accumulation}
    return values


def _fill_off_and_sizes(out: dict[str, Any], hidden_size: int | None) -> None:
    for path, value in (("fp16.enabled", False), ("optimizer.params.weight_decay", 0.0)):
        if _at(out, path) == "auto":
            _put(out, path, value)
    if hidden_size is None:
        return
    square = hidden_size * hidden_size  # the Trainer's own formulas
    sizes = {"reduce_bucket_size": square}
    sizes |= dict.fromkeys(("param_persistence_threshold", "stage3_param_persistence_threshold"), 10 * hidden_size)
    for (
        key,
        size,
    ) in sizes.items():  # either spelling, as axolotl has; the prefetch is a matter of layers (`zero3.wrap`)
        if _at(out, f"zero_optimization.{key}") == "auto":
            _put(out, f"zero_optimization.{key}", size)


def compute_dtype(ds: dict[str, Any]) -> str:
    """ "bf16" or "fp32": the dtype in which the model computes."""
    section = ds.get("bf16") if ds.get("bf16") is not None else ds.get("bfloat16")
    return "bf16" if _is_on(_at(section, "enabled")) else "fp32"


def engine_ds_config(ds: dict[str, Any]) -> dict[str, Any]:
    """The dict for `HfDeepSpeedConfig`, `zero.Init` and `deepspeed.initialize`, after `fill_auto`."""
    out = copy.deepcopy(ds)
    for key in ("scheduler", "hd_pissa"):  # the schedule is ours; our section is not DeepSpeed's business
        out.pop(key, None)
    for key in (*_REMOVED_SECTIONS, "torch_autocast"):
        if not _is_on(out.get(key)):  # presence alone raises, and "auto" reads as true in torch_autocast
            out.pop(key, None)
    zero = out.setdefault("zero_optimization", {})
    if zero.get("leaf_module") == leaf_modules.AUTO:
        zero["leaf_module"] = {"classes": [leaf_modules.AUTO]}  # the model names them (`zero3.wrap`)
    for key in [key for key, value in zero.items() if value == "auto" or key.startswith(("mics_", "zeropp_"))]:
        del zero[key]
    # Stage 3 allocates an IPG buffer of reduce_bucket_size elements, 1 GB in bf16 by default. DeepSpeed
    # reduces the gradient of one anchor element here. Slice gradients never pass through it.
    # All that DeepSpeed optimises is one element; the slices' own moments are small and stay on the device.
    zero.pop("offload_optimizer", None)
    zero |= {"contiguous_gradients": False, "reduce_bucket_size": 10_000}
    # We count micro-batches and call step() at our own boundary, so that a step can be skipped jointly.
    # Stage 3 takes overlap_comm along with it (DeepSpeed 0.19.8 asserts stage >= 2).
    out["managed_gradient_accumulation"] = False
    # torch_adam: otherwise FusedAdam or DeepSpeedCPUAdam is compiled at start (90 s) to step the anchor;
    # zero_force_ds_cpu_optimizer would insist on the latter with offload_optimizer.
    lr = _at(ds, "optimizer.params.lr")
    params = {"torch_adam": True, "lr": lr if _is_amount(lr) else 0.0, "weight_decay": 0.0}
    out |= {"optimizer": {"type": "AdamW", "params": params}, "zero_force_ds_cpu_optimizer": False}
    # gradient_clipping stays: DeepSpeed clips what it trains (the anchor), we clip the slice gradients.
    out.setdefault("log_level", "warning")
    return out
