"""Turns a model into one that HD-PiSSA trains: freeze it, find the targets, swap their class.

Which slices they then hold is `decompose`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from . import zero3
from .config import DEFAULT_TARGETS, HDPissaConfig
from .errors import ConfigError
from .factors import FactorStore
from .layer import SliceLinear
from .slicing import ShardRange, SlicePlan
from .targets import Target

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: HDPissaConfig, plan: SlicePlan) -> list[Target]:
    """The weights that `target_modules` names, in model order; a tied weight once.

    Raises:
        ConfigError: nothing matches, a match is not a Linear, or a matrix has too few singular vectors.
    """
    found: dict[int, Target] = {}
    for name, module in _matches(model, config):
        if not _is_plain_linear(module):
            raise ConfigError(
                f"hd_pissa.target_modules matches {name}, a {type(module).__name__}: only torch.nn.Linear can be "
                f"trained; name it in hd_pissa.exclude_modules"
            )
        assert isinstance(module, nn.Linear)
        known = found.get(id(module.weight))
        if known:
            known.modules.append(module)
        else:
            found[id(module.weight)] = _describe(name, module, config, plan)
    if not found:
        raise ConfigError(
            f"hd_pissa.target_modules {config.target_modules} matches no module of {type(model).__name__}: "
            f"name some of its Linears ({_linear_suffixes(model)})"
        )
    _refuse_idle_entries(model, config)
    return list(found.values())


def _linear_suffixes(model: nn.Module) -> str:
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return ", ".join(sorted(names)) or "it has none"


def _refuse_idle_entries(model: nn.Module, config: HDPissaConfig) -> None:
    """An entry that matches nothing is a misspelling, except in the default list, which serves many models."""
    names = [n for n, _ in model.named_modules()]
    entries: list[tuple[str, str, Sequence[str] | str]] = []
    entries += [("exclude_modules", key, [key]) for key in config.exclude_modules]
    entries += [("rank_pattern", key, rf"(.*\.)?({key})") for key in config.rank_pattern]
    if isinstance(config.target_modules, list) and config.target_modules != list(DEFAULT_TARGETS):
        entries += [("target_modules", key, [key]) for key in config.target_modules]
    for section, key, wanted in entries:
        if not any(_named(n, wanted) for n in names):
            raise ConfigError(
                f'hd_pissa.{section}: "{key}" matches no module of {type(model).__name__}: correct or remove it '
                f"(its Linears: {_linear_suffixes(model)})"
            )


def _matches(model: nn.Module, config: HDPissaConfig) -> list[tuple[str, nn.Module]]:
    """PEFT's rules: a list holds names or suffixes, a string is a regular expression or "all-linear"."""
    wanted, unwanted = config.target_modules, config.exclude_modules
    if wanted == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        named = [(n, m) for n, m in model.named_modules() if _is_plain_linear(m) and m is not head]
    else:
        named = [(n, m) for n, m in model.named_modules() if _named(n, wanted)]
    return [(n, m) for n, m in named if not _named(n, unwanted) and not zero3.is_anchor(n)]


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes what `nn.Linear` does; routers and quantised layers are subclasses that do not."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _named(name: str, wanted: Sequence[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _describe(name: str, module: nn.Linear, config: HDPissaConfig, plan: SlicePlan) -> Target:
    rows, cols = zero3.full_shape(module.weight)
    r = next((r for key, r in config.rank_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), config.r)
    if plan.slices * r > min(rows, cols):
        raise ConfigError(
            f"{name} is {rows} x {cols} and has {min(rows, cols)} singular vectors, {plan.slices} slices of rank {r} "
            f"need {plan.slices * r}: use a smaller hd_pissa.r or hd_pissa.slices, a smaller rank for this module "
            f"in hd_pissa.rank_pattern, or name it in hd_pissa.exclude_modules"
        )
    ranges = [ShardRange.of(k, plan.world_size, rows, cols) for k in range(plan.world_size)]
    return Target(name, module.weight, [module], rows, cols, r, config.scale_for(r), ranges)


def freeze(model: nn.Module) -> None:
    """Nothing of the base model is trained by autograd; W changes through its slices only."""
    for p in model.parameters():
        p.requires_grad_(False)


def install(targets: Sequence[Target], store: FactorStore) -> None:
    """Swaps the class of every target's modules and hands them their factors."""
    for target in targets:
        for module in target.modules:
            module.__class__ = SliceLinear
            module.slice_factors = store.layers[target.name]  # type: ignore[assignment]
