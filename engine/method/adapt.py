"""Turns a model into one that HD-PiSSA trains: freeze it, find the targets, swap their class.

A target is a matrix: a Linear's, or a Conv1D's of GPT-2. Experts that a model packs into one three-dimensional
parameter are none, and are left as they are. Which slices the targets then hold is `decompose`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import default_targets
from ..config.section import HDPissaConfig
from ..errors import ConfigError
from ..sharding import zero3
from ..sharding.slicing import ShardRange, SlicePlan
from .layer import SliceConv1D, SliceLinear
from .targets import Target

if TYPE_CHECKING:
    from ..optim.factors import FactorStore

ALL_LINEAR = "all-linear"
# Linears whose class has a forward of its own that computes the same.
SAME_PRODUCT = ("FalconLinear",)


def find_targets(model: nn.Module, config: HDPissaConfig, plan: SlicePlan) -> list[Target]:
    """The weights that `target_modules` names, in model order; a tied weight once.

    Raises:
        ConfigError: nothing matches, a match is not a Linear or shares its weight with something else (tied
            embeddings), or a matrix has too few singular vectors.
    """
    found: dict[int, Target] = {}
    for name, module in _matches(model, config):
        if not is_matrix_layer(module):
            raise ConfigError(_no_matrix(name, module))
        known = found.get(id(module.weight))
        if known:
            known.modules.append(module)
        else:
            found[id(module.weight)] = _describe(name, module, config, plan)
    if not found:
        wanted = default_targets.resolve(config.target_modules, _model_type(model))
        for key in [wanted] if isinstance(wanted, str) else wanted:
            _refuse_parameter(model, "target_modules", key, wanted if isinstance(wanted, str) else [key])
        raise ConfigError(
            f"hd_pissa.target_modules {wanted} matches no module of {type(model).__name__}: "
            f'name some of its Linears ({_linear_suffixes(model)}), or say "{ALL_LINEAR}" for all of them'
        )
    _refuse_idle_entries(model, config)
    _refuse_shared_with_others(model, found)
    _refuse_too_thin(found.values(), plan.slices)
    return list(found.values())


def remarks(model: nn.Module, targets: Sequence[Target], config: HDPissaConfig, plan: SlicePlan) -> list[str]:
    """What the default list means here, and what it leaves out; a line each, for the log."""
    if not default_targets.is_default(config.target_modules):
        return []
    lines, kind = [], _model_type(model)
    if names := default_targets.BY_MODEL_TYPE.get(kind or ""):
        lines.append(f"hd_pissa.target_modules: the default of a {kind} model is {', '.join(names)}")
    trained = {id(t.param) for t in targets}
    head = _output_layer(model)
    idle = {
        name.rsplit(".", 1)[-1]
        for name, module in _decoder(model)
        if is_matrix_layer(module) and module is not head and id(module.weight) not in trained
        if not _named(name, config.exclude_modules)
        if min(zero3.full_shape(matrix(module))) >= plan.slices * config.r
    }
    if idle:
        lines.append(
            f"hd_pissa.target_modules: the default list leaves out {', '.join(sorted(idle))}; to train them, too, name "
            f'all that you want, or say "{ALL_LINEAR}"'
        )
    inner = [(f"{name}.{own}", p) for name, m in _decoder(model) for own, p in m.named_parameters(recurse=False)]
    packed = [(name, p) for name, p in inner if len(zero3.full_shape(p)) == 3]
    if packed:
        share = sum(zero3.full_numel(p) for _, p in packed) / sum(zero3.full_numel(p) for p in model.parameters())
        lines.append(
            f"{share:.0%} of the parameters are packed experts (first: {packed[0][0]}), which are no matrices and stay "
            f"as they are"
        )
    return lines


def _no_matrix(name: str, module: nn.Module) -> str:
    packed = next((n for n, p in module.named_parameters(recurse=False) if len(zero3.full_shape(p)) == 3), None)
    what = f", which packs its experts into {packed}" if packed else ""
    remedy = "train the attention's Linears" if packed else "name it in hd_pissa.exclude_modules"
    return (
        f"hd_pissa.target_modules matches {name}, a {type(module).__name__}{what}: only torch.nn.Linear, and GPT-2's "
        f"Conv1D, can be trained; {remedy}"
    )


def _linear_suffixes(model: nn.Module) -> str:
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if is_matrix_layer(m)}
    return ", ".join(sorted(names)) or "it has none"


def _refuse_idle_entries(model: nn.Module, config: HDPissaConfig) -> None:
    """An entry that matches nothing is a misspelling, except in the default list, which serves many models."""
    names = [n for n, _ in model.named_modules()]
    entries: list[tuple[str, str, Sequence[str] | str]] = []
    unwanted = config.exclude_modules
    entries += [("exclude_modules", key, [key]) for key in unwanted if isinstance(unwanted, list)]
    entries += [("exclude_modules", unwanted, unwanted)] if isinstance(unwanted, str) else []
    entries += [("rank_pattern", key, rf"(.*\.)?({key})") for key in config.rank_pattern]
    if isinstance(config.target_modules, list) and not default_targets.is_default(config.target_modules):
        entries += [("target_modules", key, [key]) for key in config.target_modules]
    for section, key, wanted in entries:
        if section == "exclude_modules":
            _refuse_container(model, key)
        if not any(_named(n, wanted) for n in names):
            _refuse_parameter(model, section, key, wanted)
            raise ConfigError(
                f'hd_pissa.{section}: "{key}" matches no module of {type(model).__name__}: correct or remove it '
                f"(its Linears: {_linear_suffixes(model)})"
            )


def _refuse_shared_with_others(model: nn.Module, targets: dict[int, Target]) -> None:
    """A weight that is an embedding, too, has a gradient there, which no slice would get."""
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) in targets and not is_matrix_layer(module):
                raise ConfigError(
                    f"hd_pissa.target_modules matches {targets[id(p)].name}, which shares its weight with {name}: a "
                    f"{type(module).__name__} cannot be trained by slices; name it in hd_pissa.modules_to_save, or "
                    f"leave it out"
                )


def _refuse_container(model: nn.Module, key: str) -> None:
    """As in PEFT a name stands for the module itself and not for what is in it; ignored, all of it would be trained."""
    found = [(n, m) for n, m in model.named_modules() if _named(n, [key])]
    if found and not any(next(m.parameters(recurse=False), None) is not None for _, m in found):
        raise ConfigError(
            f'hd_pissa.exclude_modules: "{key}" matches {found[0][0]}, a {type(found[0][1]).__name__}, which has no '
            f"weight of its own: name the Linears in it ({_linear_suffixes(found[0][1])})"
        )


def _refuse_parameter(model: nn.Module, section: str, key: str, wanted: Sequence[str] | str) -> None:
    """Names of packed experts look like modules, and were modules in earlier releases of transformers."""
    for name, param in model.named_parameters():
        shape = zero3.full_shape(param)
        if _named(name, wanted) and len(shape) == 3:
            raise ConfigError(
                f'hd_pissa.{section}: "{key}" matches {name}, {shape[0]} experts packed into one parameter '
                f"({' x '.join(map(str, shape))}): only matrices can be trained; remove it, and train the Linears "
                f"({_linear_suffixes(model)})"
            )


def _matches(model: nn.Module, config: HDPissaConfig) -> list[tuple[str, nn.Module]]:
    """PEFT's rules: a list holds names or suffixes, a string is a regular expression or "all-linear".

    The default list counts in the text decoder only: a vision tower gets no gradient from text.
    """
    wanted, unwanted = default_targets.resolve(config.target_modules, _model_type(model)), config.exclude_modules
    if wanted == ALL_LINEAR:
        head = _output_layer(model)
        named = [(n, m) for n, m in model.named_modules() if is_matrix_layer(m) and m is not head]
    else:
        where = _decoder(model) if default_targets.is_default(config.target_modules) else model.named_modules()
        named = [(n, m) for n, m in where if _named(n, wanted)]
    return [(n, m) for n, m in named if not _named(n, unwanted)]


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _output_layer(model: nn.Module) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _decoder(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the text decoder with their names in the model; all of them where it has no such part."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    below = set(inner.modules())
    return [(name, module) for name, module in model.named_modules() if module in below]


def is_matrix_layer(module: nn.Module) -> bool:
    """Whether the module computes what `nn.Linear` or GPT-2's Conv1D does; routers and quantised layers are subclasses
    that do not."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or type(module).__name__ in SAME_PRODUCT
    return is_conv1d(module)


def matrix(layer: Any) -> nn.Parameter:
    """The weight of a matrix layer, which torch's types take for a tensor or a module."""
    return layer.weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear whose weight is stored transposed."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _named(name: str, wanted: Sequence[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _describe(name: str, module: nn.Module, config: HDPissaConfig, plan: SlicePlan) -> Target:
    rows, cols = zero3.full_shape(matrix(module))
    r = next((r for key, r in config.rank_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), config.r)
    ranges = [ShardRange.of(k, plan.world_size, rows, cols) for k in range(plan.world_size)]
    scale, transposed = config.scale_for(r), is_conv1d(module)
    return Target(name, matrix(module), [module], rows, cols, r, scale, ranges, transposed=transposed)


def _refuse_too_thin(targets: Iterable[Target], slices: int) -> None:
    """Slices must not overlap. Told of the tightest target: with a rank that suits it the others are fine, too."""
    tightest = max(targets, key=lambda t: t.r / min(t.rows, t.cols))
    there, needed = min(tightest.rows, tightest.cols), slices * tightest.r
    if needed > there:
        raise ConfigError(
            f"{tightest.name} is {tightest.rows} x {tightest.cols} and has {there} singular vectors, {slices} "
            f"slice{'s' * (slices > 1)} of rank {tightest.r} need {needed}: use a smaller hd_pissa.r or "
            f"hd_pissa.slices, a smaller rank for this module in hd_pissa.rank_pattern, or name it in "
            f"hd_pissa.exclude_modules"
        )


def freeze(model: nn.Module) -> None:
    """Nothing of the base model is trained by autograd; W changes through its slices only."""
    for p in model.parameters():
        p.requires_grad_(False)


def install(targets: Sequence[Target], store: FactorStore) -> None:
    """Swaps the class of every target's modules and hands them their factors."""
    for target in targets:
        for module in target.modules:
            module.__class__ = SliceConv1D if target.transposed else SliceLinear
            module.slice_factors = store.layers[target.name]  # type: ignore[assignment]
