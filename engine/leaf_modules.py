"""Which modules ZeRO-3 gathers whole: DeepSpeed's `zero_optimization.leaf_module`, with "auto" for the model's layers.

Left alone, ZeRO-3 has hooks on every module and fetches each Linear's weight when that Linear runs: some ten fetches
and releases per decoder layer and pass, whose cost does not shrink with the batch. A leaf module has hooks of its own
only, and all that is inside it comes in one go. What is gathered is the same; a whole layer is held at a time.

DeepSpeed wants the names of classes there, which a config for any model cannot know; "auto" stands for those that the
model says must not be split (transformers' `_no_split_modules`, its decoder layers).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read before a launch, too, where torch would take two seconds
    from torch import nn

AUTO = "auto"
# DeepSpeed's own, where `classes` is not given: experts are chosen by the data, so their order cannot be recorded.
DEFAULT_CLASSES = tuple(
    f"transformers.models.{family}.modeling_{family}.{name}SparseMoeBlock"
    for family, name in (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
)


def fill(ds_config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A config in which "auto" is the names of the model's layers; without the key where the model names none."""
    if not _is_auto(ds_config.get("zero_optimization", {})):
        return ds_config
    out = copy.deepcopy(ds_config)
    leaf = out["zero_optimization"]["leaf_module"]
    leaf["classes"] = sorted(getattr(model, "_no_split_modules", None) or ())
    if not leaf["classes"]:
        del out["zero_optimization"]["leaf_module"]
    return out


def find(model: nn.Module, zero: Mapping[str, Any]) -> list[nn.Module]:
    """The modules that DeepSpeed will gather whole under this `zero_optimization`; for who must know it beforehand."""
    leaf = fill({"zero_optimization": dict(zero)}, model)["zero_optimization"].get("leaf_module") or {}
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
