"""Reading the config file, and its `hd_pissa` section: its keys, their defaults, their limits.

pydantic checks types and ranges; this module turns what it finds into one `ConfigError`
line that names every problem of the section, so that a user fixes the file once and not
once per key. Types are strict: `true` is no number and `"16"` is no
integer, because a config that means something else than it says is worse than a refusal.

It knows nothing of models or of the world size. What the rest of the JSON may say is
`ds_config.py`'s business, which is also where callers get `read_ds_config`.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..errors import ConfigError

ALGORITHMS = Path(__file__).parents[1] / "algorithms"
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def show(value: object, limit: int = 100) -> str:
    """`value` as it would stand in the JSON, cut to `limit` characters, never with a line break."""
    text = json.dumps(value, default=repr)  # json.dumps escapes line breaks inside strings
    return text if len(text) <= limit else text[: limit - 1] + "…"


def fail(problems: Iterable[str]) -> NoReturn:
    """Raises ConfigError with all problems joined to one line, whatever the values contain."""
    raise ConfigError(" ".join("; ".join(problems).split()))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that stands twice, as DeepSpeed does: json alone would keep the last one."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"the key {show(twice[0])} stands twice in one object; keep one of them")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    """Refuses NaN and Infinity, which Python's reader takes and JSON does not have."""
    raise ConfigError(f"holds {name}, which is not JSON; give a number")


def read_ds_config(path_or_dict: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The config as a dict that the caller may keep: from a dict, a JSON file or an Accelerate YAML file.

    Raises ConfigError if the file is missing or unreadable, is not valid JSON or YAML (with the line),
    or holds something else than an object.
    """
    if isinstance(path_or_dict, dict):
        return copy.deepcopy(path_or_dict)
    path = Path(path_or_dict)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".yaml", ".yml"):
            return _from_accelerate(yaml.safe_load(text), path)
        ds = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        fail([f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); fix it"])
    except RecursionError:
        fail([f"{path}: nested too deeply for a config; give the path of a DeepSpeed JSON file"])
    except yaml.YAMLError as error:
        fail([f"{path}: not valid YAML ({error}); fix it"])
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fail([f"DeepSpeed config {path}: cannot be read ({reason}); give the path of a DeepSpeed JSON file"])
    except ConfigError as error:
        fail([f"{path}: {error}"])
    if not isinstance(ds, dict):
        fail([f'{path} holds {show(ds, 40)}: must be a JSON object; start from {{"zero_optimization": …}}'])
    return ds


def _from_accelerate(document: Any, path: Path) -> dict[str, Any]:
    """The DeepSpeed config that Accelerate builds from its launch YAML (TRL publishes only those)."""
    section = document.get("deepspeed_config") if isinstance(document, dict) else None
    if not isinstance(section, dict):
        fail(["no `deepspeed_config` section: must be an Accelerate config; give the DeepSpeed JSON instead"])
    if section.get("deepspeed_config_file"):
        return read_ds_config(section["deepspeed_config_file"])
    _refuse_other_splits(document)
    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}  # 2 is Accelerate's default
    for name in ("offload_param", "offload_optimizer"):
        device = section.get(f"{name}_device")
        if device not in (None, "none"):
            zero[name] = {"device": device}
    if "zero3_save_16bit_model" in section:
        zero["stage3_gather_16bit_weights_on_model_save"] = section["zero3_save_16bit_model"]
    ds: dict[str, Any] = {"zero_optimization": zero}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        ds[key] = section.get(key, "auto")
    # `no` leaves the choice to --bf16, as the Trainer does. fp16 and fp8 are refused later on.
    precision = document.get("mixed_precision")
    ds["bf16"] = {"enabled": True if precision == "bf16" else "auto"}
    if precision in ("fp16", "fp8"):
        ds[precision] = {"enabled": True}
    if "hd_pissa" in document:
        ds["hd_pissa"] = document["hd_pissa"]
    return ds


def _refuse_other_splits(document: dict[str, Any]) -> None:
    """Sequences, matrices or replicas that Accelerate would spread over ranks; ignored, the run would be another."""
    sizes = document.get("parallelism_config")
    for key, size in sizes.items() if isinstance(sizes, dict) else ():
        if key.endswith(("tp_size", "cp_size", "sp_size", "dp_replicate_size")) and size not in (None, 1):
            fail([f"{key} is {show(size)}: must be 1, because all ranks together hold each W in one group; set it"])


def _check_method(value: Any) -> str:
    names = sorted(path.stem for path in ALGORITHMS.glob("[!_]*.py"))
    if value not in names:
        raise ValueError(f"must be one of {', '.join(map(show, names))}")
    return value


def _check_slices(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if type(value) is not int or value < 1:  # type(): a bool is an int to isinstance
        raise ValueError('must be an integer of at least 1 or "auto" (one slice per rank)')
    return value


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{show(pattern)} is not a valid regular expression ({error})") from None


def _check_targets(value: Any) -> list[str] | str:
    if isinstance(value, str) and value:
        _check_regex(value)
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) and v for v in value):
        return list(value)
    raise ValueError("must be a non-empty list of module-name suffixes, or one regular expression")


def _check_exclusions(value: Any) -> list[str] | str:
    return [] if value in ([], ()) else _check_targets(value)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Beta = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]


class InitConfig(_Section):
    """How the slices are computed from the pre-trained W."""

    method: Literal["auto", "gram", "randomized", "full"] = "auto"
    placement: Literal["rank0", "round_robin"] = "rank0"  # who decomposes; the slices are the same
    tol: PositiveFloat = 1e-4  # largest accepted relative error of the kept singular triplets
    cache_dir: Annotated[str, Field(min_length=1)] | None = None  # where slices are kept between runs


class DeltaConfig(_Section):
    """How the update of W is formed and exchanged."""

    exchange: Literal["auto", "factor", "dense"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"  # on the wire
    precision: Literal["fp32", "tf32"] = "fp32"  # of the products of all slices' factors
    second_order: bool = True  # the term ΔB_i ΔA_i
    bucket_bytes: PositiveInt = 256 * 2**20


class AdamConfig(_Section):
    """Adam per slice. There is no weight decay in the method, hence none here."""

    # strict=False on the outside only: JSON has lists, not tuples. The two numbers stay strict.
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class MasterConfig(_Section):
    """Where the fp32-precise shard of W is kept."""

    format: Literal["split", "fp32"] = "split"
    device: Literal["auto", "cpu"] = "auto"


class KernelsConfig(_Section):
    """Which implementation computes; "auto" is Triton where it runs."""

    impl: Literal["auto", "triton", "torch"] = "auto"
    # "fused": A x is part of the layer's own product. "auto" is separate until a measured row shows that fused wins.
    linear: Literal["auto", "separate", "fused"] = "auto"


class HDPissaConfig(_Section):
    """The whole section; `from_dict` builds it and words the errors."""

    method: Annotated[str, PlainValidator(_check_method)] = "hd_pissa"  # a file of engine/algorithms/
    r: PositiveInt = 16
    # None means alpha = r, the method itself. Zero is refused: the delta is scaled by alpha / r,
    # so it would train nothing for the whole run.
    lora_alpha: PositiveFloat | None = None
    slices: Annotated[int | Literal["auto"], PlainValidator(_check_slices)] = "auto"
    target_modules: Annotated[list[str] | str, PlainValidator(_check_targets)] = Field(
        default_factory=lambda: list(DEFAULT_TARGETS)
    )
    exclude_modules: Annotated[list[str] | str, PlainValidator(_check_exclusions)] = Field(default_factory=list)
    # PEFT's meaning: a module-name suffix or regex, and the r of the modules that it matches.
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    # PEFT's name: parameters that DeepSpeed's AdamW trains in full.
    modules_to_save: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    modules_to_save_learning_rate: PositiveFloat | None = None  # None: the slices'
    init: InitConfig = Field(default_factory=InitConfig)
    delta: DeltaConfig = Field(default_factory=DeltaConfig)
    adam: AdamConfig = Field(default_factory=AdamConfig)
    master: MasterConfig = Field(default_factory=MasterConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)

    @field_validator("rank_pattern")
    @classmethod
    def _keys_compile(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern in value:
            _check_regex(pattern)
        return value

    @field_validator("modules_to_save_learning_rate")
    @classmethod
    def _has_modules(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and not info.data.get("modules_to_save"):
            raise ValueError("is for modules_to_save, of which there are none")
        return value

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> HDPissaConfig:
        """Checks a section read from JSON; an unfilled "auto" stands for the default.

        Raises ConfigError: one line with every unknown key and every bad value of the section.
        """
        if not isinstance(section, dict):
            fail([f'hd_pissa is {show(section)}: must be an object such as {{"r": 16}}'])
        try:
            given = {k: v for k, v in section.items() if v != "auto" or k not in cls.model_fields}
            return cls.model_validate(given)
        except ValidationError as error:
            problems = [_problem(item) for item in error.errors(include_url=False)]
        fail(problems)

    def with_optimizer(self, params: dict[str, Any]) -> HDPissaConfig:
        """This config with `betas` and `eps` of a DeepSpeed optimizer section where `adam` is silent.

        Raises ConfigError where both speak and disagree, and for values that are no betas or eps.
        """
        theirs = {key: params.get(key) for key in ("betas", "eps") if params.get(key) not in (None, "auto")}
        ours = self.adam.model_dump(mode="json", exclude_unset=True)
        problems = [
            f"optimizer.params.{key} is {show(value)}: must equal hd_pissa.adam.{key} {show(ours[key])}; "
            'set it to "auto"'
            for key, value in theirs.items()
            if key in ours and value != ours[key]
        ]
        if problems:
            fail(problems)
        try:
            adam = AdamConfig.model_validate(ours | theirs)
        except ValidationError as error:  # `ours` was valid, so the optimizer section is not
            items = error.errors(include_url=False)
            fail(_problem(item, ("adam",)).replace("hd_pissa.adam", "optimizer.params") for item in items)
        return self.model_copy(update={"adam": adam})

    def scale_for(self, r: int) -> float:
        """The factor on the delta of a module whose slices have rank `r`."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / r


_SUBSECTIONS: dict[str, type[BaseModel]] = {
    "init": InitConfig,
    "delta": DeltaConfig,
    "adam": AdamConfig,
    "master": MasterConfig,
    "kernels": KernelsConfig,
}


# What other tools call some of our keys, where the nearest name here would be another one.
_ELSEWHERE = {"rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "num_slices": "slices"}


def _unknown_key(path: str, loc: tuple[Any, ...]) -> str:
    """The message for an unknown key: the section that does have it, or the nearest name here."""
    section: type[BaseModel] = HDPissaConfig if len(loc) == 1 else _SUBSECTIONS[loc[0]]
    name, valid = str(loc[-1]), list(section.model_fields)
    homes = [f"hd_pissa.{key}" for key, model in _SUBSECTIONS.items() if name in model.model_fields]
    if name in HDPissaConfig.model_fields:
        homes.append("hd_pissa itself")
    known = _ELSEWHERE.get(name) if len(loc) == 1 else None
    nearest = [known] if known else difflib.get_close_matches(name, valid, n=1)
    if homes:
        hint = f"; move it to {homes[0]}"
    elif nearest:
        hint = f'; did you mean "{nearest[0]}"?'
    else:
        hint = "; remove it"
    return f"{path}: unknown key{hint} (valid keys: {', '.join(valid)})"


def _default_at(loc: tuple[Any, ...]) -> object:
    """The default of the field that holds `loc`; list items and map entries belong to their field."""
    section = _SUBSECTIONS.get(loc[0]) if len(loc) > 1 else None
    if section is not None:
        return section.model_fields[loc[1]].get_default()
    default = HDPissaConfig.model_fields[loc[0]].get_default(call_default_factory=True)
    return {} if isinstance(default, BaseModel) else default


_TYPE_RULES = {
    "int": "must be an integer",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be a string",
    "list": "must be a list",
    "dict": "must be an object",
    "model": "must be an object",
    "tuple": "must be a list of two numbers",
    "missing": "must be a list of two numbers",  # the only fixed-length value is betas
    "too": "must be a list of two numbers",
    "finite": "must be finite",
}


def _rule(item: Any) -> str:
    """The rule that a pydantic error stands for."""
    context = item.get("ctx", {})
    match item["type"]:
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "greater_than":
            return f"must be greater than {context['gt']:g}"
        case "less_than":
            return f"must be less than {context['lt']:g}"
        case "literal_error":
            names = context["expected"].replace("'", '"').replace(" or ", ", ")
            return f"must be one of {names}" if ", " in names else f"must be {names}"
        case "string_too_short":
            return "must not be empty"
        case "value_error":
            return str(context["error"])
    return _TYPE_RULES.get(item["type"].split("_")[0], item["msg"])


def _problem(item: Any, prefix: tuple[str, ...] = ()) -> str:
    """One pydantic error as "path is value: rule; remedy"; `prefix` is the section that was checked."""
    # A short betas list is reported at the missing item, with the whole list as its input.
    loc = prefix + (item["loc"][:-1] if item["type"] == "missing" else item["loc"])
    path = ".".join(["hd_pissa", *map(str, loc)])
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, loc)
    default = show(_default_at(loc))
    return f"{path} is {show(item['input'])}: {_rule(item)}; leave it out for the default {default}"
