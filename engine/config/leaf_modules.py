"""Which modules ZeRO-3 gathers whole, and how far ahead: DeepSpeed's keys, with "auto" for the model's layers.

Left alone, ZeRO-3 has hooks on every module and fetches each Linear's weight when that Linear runs: some ten fetches
and releases per decoder layer and pass, whose cost does not shrink with the batch. A leaf module has hooks of its own
only, and all that is inside it comes in one go. What is gathered is the same; a whole layer is held at a time.

DeepSpeed wants the names of classes there, which a config for any model cannot know; "auto" stands for those that the
model says must not be split (transformers' `_no_split_modules`, its decoder layers).

Gathers hide behind a layer's computation only if all of the next layer is asked for before. DeepSpeed asks for
parameters until `stage3_prefetch_bucket_size` elements are on their way: its default, and the Trainer's "auto", are a
fraction of a layer of 7B. And it asks for none while `stage3_max_live_parameters` are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read before a launch, too, where torch would take two seconds
    from torch import nn

AUTO = "auto"
# Key, DeepSpeed's default, and how many layers it has to be at least: the next one on its way; the running one, the
# next one, and room for what comes in parts or is not released yet (an embedding, or layers that are soon used again).
AHEAD = (("prefetch_bucket_size", 50_000_000, 1), ("max_live_parameters", 1_000_000_000, 3))
# DeepSpeed's own, where `classes` is not given: experts are chosen by the data, so their order cannot be recorded.
DEFAULT_CLASSES = tuple(
    f"transformers.models.{family}.modeling_{family}.{name}SparseMoeBlock"
    for family, name in (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
)


def fill(
    ds_config: dict[str, Any], model: nn.Module, numel: Callable[[nn.Parameter], int] = lambda p: p.numel()
) -> dict[str, Any]:
    """A config in which "auto" is the names of the model's layers, or absent where the model names none; and in which
    enough is gathered ahead for its largest layer, unless the config has numbers of its own.

    Args:
        ds_config: after `ds_config.engine_ds_config`.
        numel: elements of a whole parameter.
    """
    out = copy.deepcopy(ds_config)
    zero = out.setdefault("zero_optimization", {})
    if _is_auto(zero):
        zero["leaf_module"]["classes"] = _layer_classes(model)
        if not zero["leaf_module"]["classes"]:
            del zero["leaf_module"]
    layers = find(model, zero) + [m for m in model.modules() if type(m).__name__ in _layer_classes(model)]
    largest = max((sum(map(numel, layer.parameters())) for layer in layers), default=0)
    for key, default, count in AHEAD:
        if not {key, f"stage3_{key}"} & zero.keys() and count * largest > default:  # DeepSpeed takes either name
            zero[f"stage3_{key}"] = count * largest
    return out


def _layer_classes(model: nn.Module) -> list[str]:
    return sorted(getattr(model, "_no_split_modules", None) or ())


def find(model: nn.Module, zero: Mapping[str, Any]) -> list[nn.Module]:
    """The modules that DeepSpeed will gather whole under this `zero_optimization`; for who must know it beforehand."""
    leaf = dict(zero.get("leaf_module") or {})
    if _is_auto(zero):
        leaf["classes"] = _layer_classes(model) or None
    classes, names, suffixes = (_list(leaf.get(key)) for key in ("classes", "names", "name_suffixes"))
    classes = list(DEFAULT_CLASSES) if leaf.get("classes") is None else classes
    return [
        module
        for name, module in model.named_modules()
        if type(module).__name__ in classes
        or f"{type(module).__module__}.{type(module).__qualname__}" in classes
        or name in names
        or any(name.endswith(suffix) for suffix in suffixes)
    ]


def _is_auto(zero: Mapping[str, Any]) -> bool:
    leaf = zero.get("leaf_module")
    return isinstance(leaf, dict) and _list(leaf.get("classes")) == [AUTO]


def _list(value: Any) -> list[str]:
    """DeepSpeed takes one name without its brackets."""
    return [value] if isinstance(value, str) else list(value or ())
