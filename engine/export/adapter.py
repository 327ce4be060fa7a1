"""What a PEFT LoRA adapter of a run is: its stacks, names, configuration, and how it is cut to a smaller rank.

The first-order change of a weight over a whole run is  −s · Σ_i (ΣΔB_i A_i + B_i ΣΔA_i),  because A_i and B_i never
change. PEFT computes  W + (lora_alpha / r) · lora_B lora_A.  So with, slice by slice,

    lora_A = [A_i ; −ΣΔA_i]  (2·R·S × I)        lora_B = [−ΣΔB_i | B_i]  (O × 2·R·S)        lora_alpha / r = s

stock PEFT on the untouched base gives the trained model, but for the sum of the steps' second-order terms, which
`residual.py` measures. The format is written without PEFT: its dataclass as JSON, its key names. Knows no ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, "adapter_model.safetensors", "adapter_model.bin")  # PEFT prefers the first kind of weights


@dataclass(frozen=True)
class Adapted:
    """One weight of an adapter.

    Attributes:
        names: module names of all Linears that hold it; the adapter names each.
        r: components of its pair, 2·R·S or what it was cut to.
        scale: s, multiplies the product.
        transposed: whether the model stores the matrix as I × O (Conv1D); the pair is a Linear's all the same.
    """

    names: tuple[str, ...]
    rows: int
    cols: int
    r: int
    scale: float
    transposed: bool = False

    def cut(self, r: int) -> Adapted:
        """The same with at most so many components, and no more than the matrix has."""
        return replace(self, r=min(r, self.r, self.rows, self.cols))

    @property
    def numel(self) -> int:
        return len(self.names) * self.r * (self.rows + self.cols)


def key_A(name: str) -> str:
    return f"base_model.model.{name}.lora_A.weight"


def key_B(name: str) -> str:
    return f"base_model.model.{name}.lora_B.weight"


def stack_A(A_RI: Tensor, sum_A_RI: Tensor) -> Tensor:
    """A slice's rows of lora_A (2·R × I)."""
    return torch.cat([A_RI, -sum_A_RI])


def stack_B(slices: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Columns of lora_B (C × S·2R) for some slices in order, from C rows of each one's B and ΣΔB (C × R)."""
    return torch.cat([part for B_CR, sum_B_CR in slices for part in (-sum_B_CR, B_CR)], 1)


# --- configuration --------------------------------------------------------------------------------


def adapter_config(adapted: Sequence[Adapted], modules: Iterable[str], base: str) -> dict[str, Any]:
    """adapter_config.json, as `peft.LoraConfig` of 0.17 to 0.21 reads it; what it leaves out has PEFT's default.

    Args:
        modules: names of all modules of the model; a suffix stands for many targets only where it means no other.
        base: name or folder of the unmodified model.
    """
    by_name = {name: a for a in adapted for name in a.names}
    suffixes = _unambiguous_suffixes(by_name, modules)
    (r, alpha), _ = Counter((a.r, _alpha(a)) for a in by_name.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": _keys(dict.fromkeys(by_name, True), True, suffixes),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({n: a.r for n, a in by_name.items()}, r, suffixes),
        "alpha_pattern": _pattern({n: _alpha(a) for n, a in by_name.items()}, alpha, suffixes),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(a.transposed for a in adapted),
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "revision": None,
        "auto_mapping": None,
    }


def _alpha(adapted: Adapted) -> int | float:
    """lora_alpha with lora_alpha / r = scale; an integer where it is one, as some servers want it."""
    alpha = adapted.scale * adapted.r
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _suffix(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _unambiguous_suffixes(wanted: Iterable[str], modules: Iterable[str]) -> frozenset[str]:
    """Last parts of names that no other module has: PEFT lets them stand for all that end so."""
    wanted = set(wanted)
    return frozenset(map(_suffix, wanted)) - {_suffix(m) for m in modules if m not in wanted}


def _keys(values: dict[str, Any], value: Any, suffixes: frozenset[str]) -> list[str]:
    """Keys that stand for just the modules with this value: suffixes where all that end so have it, else names."""
    mixed = {_suffix(n) for n, v in values.items() if v != value}
    return sorted({s if (s := _suffix(n)) in suffixes - mixed else n for n, v in values.items() if v == value})


def _pattern(values: dict[str, Any], default: Any, suffixes: frozenset[str]) -> dict[str, Any]:
    """What differs from the default, as PEFT's rank_pattern and alpha_pattern have it."""
    others = sorted({v for v in values.values() if v != default})
    return {key: value for value in others for key in _keys(values, value, suffixes)}


# --- a smaller rank --------------------------------------------------------------------------------


@dataclass
class Tail:
    """What cutting left out: sums of squared singular values, over all weights so far."""

    dropped: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        return (self.dropped / self.whole) ** 0.5 if self.whole else 0.0


def truncate(lora_A: Tensor, lora_B: Tensor, r: int, *, scale: float, tail: Tail) -> tuple[Tensor, Tensor]:
    """The best pair of r components for a product: QR of both stacks and a small SVD, in float64.

    The matrix itself is never formed. Both factors get the roots of the singular values.
    """
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    U, sigma, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    tail.dropped += scale**2 * sigma[r:].square().sum().item()
    tail.whole += scale**2 * sigma.square().sum().item()
    root = sigma[:r].sqrt()
    return root[:, None] * (Vt[:r] @ Q_A.T), (Q_B @ U[:, :r]) * root
